"""Measuring contenders fairly: round-robin within one run, medians, the environment saved beside the figures."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from memory_service.errors import Unavailable
from memory_service.index.faiss_index import set_threads as set_faiss_threads

Figures = dict[str, float]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What a benchmark measured: raw rows, the named figures drawn from them, and where it ran."""

    bench: str
    figures: Figures
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=lambda: environment())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False)


def say(message: str) -> None:
    """Progress for people: standard error, so that standard output stays the table."""
    print(message, file=sys.stderr, flush=True)


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of each contender, taken in turns after one unmeasured call each.

    Taking turns spreads a machine's slow minutes over all contenders, so that their ratio holds on a noisy machine.
    Every other round runs backwards, so that nobody always follows the same neighbour. `before` runs untimed.
    """
    for call in contenders.values():
        if before is not None:
            before()
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            if before is not None:
                before()
            started = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def row(name: str, seconds: Sequence[float], **facts: Any) -> dict[str, Any]:
    """A raw row: the median, the quartiles and every sample, in milliseconds."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "contender": name,
        **facts,
        "median_ms": _ms(statistics.median(seconds)),
        "p25_ms": _ms(quartiles[0]),
        "p75_ms": _ms(quartiles[2]),
        "samples_ms": [_ms(one) for one in seconds],
    }


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster `fast` is: the ratio of medians, 3 decimals."""
    return round(statistics.median(slow) / statistics.median(fast), 3)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)


# --- Where it ran ---------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What a reader needs to judge the figures: processor, versions, threads, revision, load, date."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": _revision(),
        "cpu": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": [round(one, 2) for one in os.getloadavg()],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "flags": sorted(_flags() & _TELLING_FLAGS),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("torch", "faiss-cpu", "faiss-gpu", "grpcio", "protobuf", "numpy")
        },
    }


_TELLING_FLAGS = {
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "sve", "bf16",
}  # fmt: skip


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _flags() -> set[str]:
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _revision() -> str:
    """The git revision of the sources, with "+" if they were edited since; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        edits = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if edits.stdout.strip() else "")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def file_system(path: Path) -> str:
    """The file system under `path`, as type and device; empty where the system does not say."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    real = path.resolve()
    under = [mount for mount in mounts if real.is_relative_to(mount[1])]
    best = max(under, key=lambda mount: len(mount[1]), default=None)
    return f"{best[2]} on {best[0]}" if best else ""


# --- A service in another process -----------------------------------------------------------------------------------


@contextmanager
def served(directory: Path, *, threads: int = 1, start_s: float = 60.0, stop_s: float = 20.0) -> Iterator[str]:
    """The target of a `fot serve` over `directory`, a process of its own on a free loopback port; stopped at exit.

    Its log goes beside the directory. Raises Unavailable with that log if it does not start.
    """
    command = [sys.executable, "-m", "memory_service.cli", "serve", str(directory), "--listen", "127.0.0.1:0"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FOT_")}
    log = directory.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environ | {"OMP_NUM_THREADS": str(threads)}, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield _announced(process, log, start_s)
    finally:
        process.terminate()
        try:
            process.wait(stop_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _announced(process: subprocess.Popen[bytes], log: Path, start_s: float) -> str:
    """The address a starting service writes into its log."""
    until = time.monotonic() + start_s
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"127\.0\.0\.1:([1-9]\d*)", log.read_text()):
            return f"grpc://127.0.0.1:{found[1]}"
        time.sleep(0.05)
    raise Unavailable(f"the service to measure did not start: {log.read_text()[-2000:]}")


# --- For people -----------------------------------------------------------------------------------------------------


@contextmanager
def single_threaded() -> Iterator[None]:
    """One thread for torch and Faiss in this process; torch's number comes back at exit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    set_faiss_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def scratch(directory: Path | None, prefix: str) -> Iterator[Path]:
    """An empty directory for data, inside `directory` or the system's temporary one; removed at exit."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=directory) as path:
        yield Path(path)


def show(title: str, columns: Sequence[str], lines: Sequence[Sequence[object]], figures: Mapping[str, float]) -> None:
    """Print the rows and the figures as tables."""
    console = Console()
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for line in lines:
        table.add_row(
            *[one if isinstance(one, str) else f"{one:,.4g}" if isinstance(one, float) else f"{one:,}" for one in line]
        )
    console.print(table)
    summary = Table("figure", "value", title="figures", title_justify="left")
    summary.columns[1].justify = "right"
    for name, value in figures.items():
        summary.add_row(name, f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")
    console.print(summary)
