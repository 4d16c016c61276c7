"""`fot doctor`: what this machine offers a memory service, and what stands in its way."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from memory_service.cli.console import Json, console, print_json, size
from memory_service.errors import FotError
from memory_service.storage.vfs import OsVfs

WAL_RESET_FIXED = (3, 51, 3)
NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "9p",
    "ceph",
    "lustre",
    "gluster",
    "afs",
    "fuse.s3",
    "fuse.gcs",
    "fuse.sshfs",
    "beegfs",
)
VOLATILE = ("tmpfs", "ramfs")
LOW_SPACE = 5 << 30
LOW_FILES = 4096  # Every segment that is read keeps a file open.
FSYNCS = 20
SLOW_FSYNC_MS = 50.0


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    verdict: Verdict
    found: str
    advice: str = ""


def doctor(
    directory: Annotated[Path, typer.Argument(help="Where the data is, or will be.")] = Path(),
    json: Json = False,
) -> None:
    """Look at this machine and at a data directory. Exits with 1 if something stands in the way."""
    findings = [*_software(), *_hardware(), *_disk(directory)]
    if json:
        print_json(findings)
    else:
        for finding in findings:
            _print(finding)
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        raise typer.Exit(1)


def _print(finding: Finding) -> None:
    mark = {Verdict.OK: "[green]✓[/]", Verdict.WARN: "[yellow]![/]", Verdict.FAIL: "[red]✗[/]"}[finding.verdict]
    console().print(f"{mark} [dim]{finding.what:<14}[/] {escape(finding.found)}")
    if finding.advice:
        console().print(f"  {'':<14} [yellow]{escape(finding.advice)}[/]")


def _software() -> Iterator[Finding]:
    from memory_service.storage.database import SQLITE_VERSION

    yield Finding("Python", Verdict.OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("fot-memory", "torch", "grpcio", "safetensors"):
        yield Finding(name, Verdict.OK, _version(name) or "not installed as a package")
    faiss = [(name, found) for name in ("faiss-cpu", "faiss-gpu") if (found := _version(name))]
    if len(faiss) == 1:
        yield Finding("faiss", Verdict.OK, " ".join(faiss[0]))
    else:
        both = "faiss-cpu and faiss-gpu are both installed and overwrite each other; uninstall one"
        yield Finding("faiss", Verdict.FAIL, "both" if faiss else "missing", both if faiss else "install faiss-cpu")
    yield _sqlite(SQLITE_VERSION)


def _sqlite(found: str) -> Finding:
    fixed = tuple(map(int, found.split("."))) >= WAL_RESET_FIXED
    bug = "before 3.51.3 two connections may corrupt a WAL; harmless here, where one connection owns the catalogue"
    return Finding("SQLite", Verdict.OK if fixed else Verdict.WARN, found, "" if fixed else bug)


def _hardware() -> Iterator[Finding]:
    import torch

    flags = _cpu_flags()
    wide = next(
        (name for name in ("avx512f", "avx2", "asimd", "neon") if name in flags), "no vector instructions known"
    )
    bf16 = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags]
    slow = "bf16 keys are scored in float32: right, but slower than with AVX512-BF16 or AMX"
    yield Finding(
        "CPU",
        Verdict.OK if bf16 else Verdict.WARN,
        f"{len(os.sched_getaffinity(0))} cores, {wide}, {'bf16 by ' + ', '.join(bf16) if bf16 else 'no bf16'}, "
        f"{torch.get_num_threads()} torch threads",
        "" if bf16 else slow,
    )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("RAM", Verdict.OK, size(total))
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            yield Finding(f"cuda:{number}", Verdict.OK, f"{about.name}, {size(about.total_memory)}")
    else:
        yield Finding("CUDA", Verdict.OK, "none; the service runs on the CPU")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < LOW_FILES
    more = f"raise it: ulimit -n {LOW_FILES if hard == resource.RLIM_INFINITY else min(hard, 65_536)}" if few else ""
    yield Finding("open files", Verdict.WARN if few else Verdict.OK, f"at most {soft:,} (hard {hard:,})", more)


def _disk(directory: Path) -> Iterator[Finding]:
    present = next(path for path in (directory.resolve(), *directory.resolve().parents) if path.is_dir())
    kind, mount = _file_system(present)
    if kind.startswith(NETWORK):
        lost = "a network file system may lose locks and fsyncs; use a local disk"
        yield Finding("file system", Verdict.WARN, f"{kind} at {mount}", lost)
    elif kind in VOLATILE:
        yield Finding("file system", Verdict.WARN, f"{kind} at {mount}", "RAM: gone with the machine; use a disk")
    else:
        yield Finding("file system", Verdict.OK, f"{kind} at {mount}")
    usage = shutil.disk_usage(present)
    low = usage.free < LOW_SPACE
    yield Finding(
        "free space",
        Verdict.WARN if low else Verdict.OK,
        f"{size(usage.free)} of {size(usage.total)}",
        "documents are refused when the disk is full" if low else "",
    )
    try:
        median, worst = _fsync_ms(present)
    except (OSError, FotError) as error:
        yield Finding("fsync", Verdict.FAIL, f"cannot write to {present}: {error}", "give a directory you may write to")
        return
    slow = median > SLOW_FSYNC_MS
    yield Finding(
        "fsync",
        Verdict.WARN if slow else Verdict.OK,
        f"{median:.1f} ms, at worst {worst:.1f} ms of {FSYNCS}",
        "every commit waits for one; many writers share it" if slow else "",
    )


def _fsync_ms(directory: Path) -> tuple[float, float]:
    """Median and greatest time of writing 4 KiB and waiting until the disk has them."""
    vfs = OsVfs()
    with tempfile.TemporaryDirectory(prefix=".fot-doctor-", dir=directory) as scratch:
        file = vfs.create(Path(scratch) / "probe", FSYNCS * 4096)
        try:
            taken = []
            for number in range(FSYNCS):
                start = time.perf_counter()
                vfs.pwrite(file, os.urandom(4096), number * 4096)
                vfs.fdatasync(file)
                taken.append((time.perf_counter() - start) * 1e3)
        finally:
            vfs.close(file)
    return statistics.median(taken), max(taken)


def _file_system(path: Path) -> tuple[str, str]:
    """Type and mount point of the file system a path is on."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown", "/"
    best = ("unknown", "/")
    for line in mounts:
        before, _, after = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= len(best[1]):
            best = (after.split()[0], point)
    return best


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(found.partition(":")[2].split())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        if name != "torch":
            return ""
        import torch

        return str(torch.__version__)
