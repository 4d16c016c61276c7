"""`fot verify`: read every stored byte against its checksum; rebuild a lost catalogue from the segments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from memory_service.cli.console import Json, counted, print_json, say, size
from memory_service.errors import DataLoss, NotFound
from memory_service.storage.vfs import OsVfs

if TYPE_CHECKING:
    from memory_service.storage.catalog import Catalog
    from memory_service.storage.segments import SegmentFiles

CATALOG = "catalog.sqlite"


@dataclass(slots=True)
class Report:
    """What a verification found."""

    directory: str
    memories: int = 0
    documents: int = 0
    segments: int = 0
    bytes: int = 0
    adopted: int | None = None  # Documents a rebuilt catalogue found.
    notes: list[str] = field(default_factory=list)  # What was left alone.
    problems: list[str] = field(default_factory=list)  # Data that is damaged or missing.


def verify(
    directory: Annotated[Path, typer.Argument(help="A data directory that nobody serves now.")],
    rebuild_catalog: Annotated[
        bool, typer.Option("--rebuild-catalog", help="First put the catalogue aside and build one from the segments.")
    ] = False,
    json: Json = False,
) -> None:
    """Read every byte of a data directory against its checksum. Exits with 1 if any is damaged."""
    # Load torch: fot --help does not wait for it.
    from memory_service.storage.catalog import Catalog
    from memory_service.storage.segments import SegmentFiles

    if not directory.is_dir():
        raise NotFound(f"there is no directory {directory}")
    report = Report(str(directory))
    vfs = OsVfs()
    lock = vfs.lock(directory / "LOCK")
    try:
        if rebuild_catalog:
            _rebuild(directory, vfs, report)
        elif not (directory / CATALOG).exists():
            raise NotFound(f"{directory} has no catalogue; is it a data directory? If so, add --rebuild-catalog")
        with Catalog.open(directory / CATALOG, vfs=vfs) as catalog, SegmentFiles(directory, vfs) as files:
            _check(catalog, files, report)
    finally:
        vfs.close(lock)
    if json:
        print_json(report)
    else:
        _tell(report)
    if report.problems:
        raise typer.Exit(1)


def _rebuild(directory: Path, vfs: OsVfs, report: Report) -> None:
    from memory_service.store.recovery import rebuild_catalog

    found = rebuild_catalog(directory / CATALOG, directory, vfs)
    report.adopted = found.adopted
    report.notes += found.problems


def _check(catalog: Catalog, files: SegmentFiles, report: Report) -> None:
    memories = catalog.memories()
    segments = [(memory, row.ref) for memory in memories for row in catalog.segments(memory.key)]
    report.memories, report.segments = len(memories), len(segments)
    report.documents = sum(len(catalog.documents(memory.key)) for memory in memories)
    report.bytes = sum(ref.nbytes for _, ref in segments)
    with reading(report.bytes) as advance:
        for memory, ref in segments:
            try:
                files.verify(memory.key, ref, progress=advance)
            except DataLoss as error:
                held = sorted({part.header.document for part in ref.parts})
                named = ", ".join(held[:5]) + (f" and {len(held) - 5} more" if len(held) > 5 else "")
                report.problems.append(f"memory {memory.name} of {memory.tenant}: {error.message}; it holds {named}")


@contextmanager
def reading(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, for people who watch."""
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def _tell(report: Report) -> None:
    if report.adopted is not None:
        held = f"{counted(report.adopted, 'document')} in {counted(report.memories, 'memory')}"
        say(f"Rebuilt the catalogue from the segments: {held}.")
    for note in report.notes:
        say(f"Left alone: {note}")
    for problem in report.problems:
        say(f"Damaged: {problem}")
    held = f"{counted(report.documents, 'document')} in {counted(report.segments, 'segment')}, {size(report.bytes)}"
    say(f"{held}: {counted(len(report.problems), 'segment') + ' damaged' if report.problems else 'all is well'}.")
