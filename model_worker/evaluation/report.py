"""What a study found: its protocol, settings, rows and figures, and where it ran; as JSON for machines, tables for us.

report = Report("passkey", PROTOCOL, settings, rows, {"accuracy": 1.0})
check_file(path)        # before hours of work
report.save(path)
show(report, [Column("tokens"), Column("accuracy", form=percent)])
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memory_service.errors import InvalidArgument

Rows = Sequence[Mapping[str, Any]]
Figures = Mapping[str, float]

_UNWATCHED_COLUMNS = 200  # Where nobody's terminal says how wide it is.
_SHORT = 30  # Letters of a cell that is never broken into lines.
_TELLING_FLAGS = {
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "sve", "bf16",
}  # fmt: skip
_VERSIONS = ("fot-memory", "torch", "transformers", "tokenizers", "faiss-cpu", "faiss-gpu", "grpcio", "numpy")


@dataclass(frozen=True, slots=True)
class Report:
    """A study's result."""

    study: str
    protocol: str  # What was done, so that a stranger could do it again.
    settings: Mapping[str, Any]
    rows: Rows
    figures: Figures  # The numbers that are quoted, by name; finite.
    trials: Rows = ()  # Every single measurement, where the rows are means.
    environment: Mapping[str, Any] = field(default_factory=lambda: environment())

    def to_json(self) -> str:
        """Numbers that do not exist (of no trial, say) become null."""
        told = _plain(
            {
                "study": self.study,
                "protocol": " ".join(self.protocol.split()),
                "figures": self.figures,
                "settings": self.settings,
                "rows": self.rows,
                "trials": self.trials,
                "environment": self.environment,
            }
        )
        return json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: Path) -> None:
        """Write the JSON; a reader sees the old file or the new one, never half of it."""
        write_aside(path, self.to_json().encode())


def check_file(path: Path | None, *suffixes: str) -> None:
    """Raise InvalidArgument unless a file can be written there; suffixes such as ".png", if only those will do."""
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        raise InvalidArgument(f"{path} must end in {' or '.join(suffixes)}")
    folder = path.absolute().parent
    if path.is_dir():
        raise InvalidArgument(f"{path} is a directory; give the name of a file")
    if not folder.is_dir():
        raise InvalidArgument(f"there is no directory {folder} to write {path.name} into")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise InvalidArgument(f"{path} may not be written")


def write_aside(path: Path, content: bytes) -> None:
    """Replace a file as one step, durable when this returns."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~_umask())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


# --- Where it ran ---------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What a reader needs to judge the figures: processor, versions, threads, load, date. Asks nobody, runs nothing."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": [round(one, 2) for one in os.getloadavg()],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "flags": sorted(set((_cpuinfo("flags") or _cpuinfo("Features")).split()) & _TELLING_FLAGS),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in _VERSIONS if (found := _version(name)) is not None},
    }


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _plain(value: Any) -> Any:
    """As JSON has it: objects with names as keys, numbers of numpy and torch as numbers, the rest as text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)  # An enumeration's word.
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return _plain(asdict(value))
    if callable(getattr(value, "tolist", None)):  # An array or a tensor.
        return _plain(value.tolist())
    return str(value)


# --- For people -----------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    """98.4 %"""
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def size(tokens: float) -> str:
    """512, 64K, 256K, 1M, 10M; what is no round number of either kind in full."""
    for unit, letter in ((1 << 20, "M"), (1_000_000, "M"), (1 << 10, "K"), (1_000, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit:,.0f}{letter}"
    return f"{tokens:,.0f}"


def nbytes(count: float) -> str:
    """12.3 MiB"""
    if math.isnan(count):
        return "–"
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            value = count / unit
            return f"{value:,.1f} {name}" if value < 99.95 else f"{value:,.0f} {name}"
    return f"{count:,.0f} B"


def duration(seconds: float) -> str:
    """0.42 s, 12.3 s, 2 min 5 s"""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def number(value: object) -> str:
    """12,345 and 0.1235; a dash for what does not exist."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool | str) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: which entry of the rows, under which heading, written how."""

    key: str
    heading: str | None = None  # None: the key, with spaces.
    form: Callable[[Any], str] = number


def show(
    report: Report, columns: Sequence[Column] | None = None, title: str | None = None, sections: str | None = None
) -> None:
    """Print the rows and the figures on standard output; without columns, all entries of the first row.

    `sections` names the entry that a line is drawn for whenever it changes.
    """
    chosen = columns or [Column(key) for key in (report.rows[0] if report.rows else ())]
    console = Console(highlight=False, width=None if _watched() else _UNWATCHED_COLUMNS)
    with console.capture() as captured:
        if report.rows and chosen:
            console.print(table(report.rows, chosen, title or report.study, sections))
        summary = Table(box=None, pad_edge=False, show_header=False)
        summary.add_column(style="dim")
        summary.add_column(justify="right")
        for name, value in report.figures.items():
            summary.add_row(escape(name), number(value))
        if report.figures:
            console.print(summary)
    # Rich fills titles and last columns with spaces.
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
    sys.stdout.flush()


def table(rows: Rows, columns: Sequence[Column], title: str | None = None, sections: str | None = None) -> Table:
    """Rows as a table; words to the left, numbers to the right."""
    made = Table(title=None if title is None else escape(title), title_justify="left", title_style="bold")
    made.box, made.padding = SIMPLE_HEAD, (0, 1, 0, 0)  # Narrow: many columns in a terminal's eighty letters.
    lines = [["–" if (cell := row.get(one.key)) is None else one.form(cell) for one in columns] for row in rows]
    for place, column in enumerate(columns):
        words = all(isinstance(row.get(column.key), str | None) for row in rows)
        short = all(len(line[place]) <= _SHORT for line in lines)
        heading = column.key.replace("_", " ") if column.heading is None else column.heading
        made.add_column(escape(heading), justify="left" if words else "right", no_wrap=short, overflow="fold")
    for place, (row, line) in enumerate(zip(rows, lines, strict=True)):
        if sections is not None and place and row.get(sections) != rows[place - 1].get(sections):
            made.add_section()
        made.add_row(*map(escape, line))
    return made


def _watched() -> bool:
    return sys.stdout.isatty() or "COLUMNS" in os.environ
