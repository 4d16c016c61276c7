"""`fot snapshot verify`: read every byte of the snapshots under a root, as a restore would. Nothing need be served."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memory_service.cli.console import Json, counted, print_json, print_table, say, size, when
from memory_service.cli.verify import CATALOG, reading
from memory_service.errors import DataLoss, NotFound
from memory_service.storage.vfs import OsVfs
from memory_service.types.callers import Cancel

if TYPE_CHECKING:
    from memory_service.storage.snapshot_file import Description
    from memory_service.storage.snapshot_files import Found, SnapshotFiles


@dataclass(slots=True)
class Checked:
    """What was found of one snapshot, or of one shard's part of it."""

    tenant: str  # Its directory.
    snapshot: str
    shard: str  # Empty: it is of one service.
    memory: str = ""
    created_at: float = 0.0  # Seconds since the epoch.
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    problem: str = ""  # Empty: all is well.
    missing: tuple[str, ...] = ()  # Shards whose part is not under this root.

    @property
    def name(self) -> str:
        return f"{self.snapshot}@{self.shard}" if self.shard else self.snapshot


def verify(
    directory: Annotated[Path, typer.Argument(help="A root of snapshots, or a data directory with snapshots in it.")],
    snapshot: Annotated[str, typer.Option("--id", help="Only the snapshots of this id.")] = "",
    json: Json = False,
) -> None:
    """Read every byte of snapshots, wherever they lie. Exits with 1 if a restore would find any of it damaged."""
    from memory_service.storage.snapshot_files import SnapshotFiles  # Loads torch: fot --help does not wait for it.

    if not directory.is_dir():
        raise NotFound(f"there is no directory {directory}")
    root = directory / "snapshots" if (directory / CATALOG).exists() else directory
    files = SnapshotFiles(root, root, OsVfs())  # Only read: no notes of what is unfinished are made.
    try:
        found = [one for tenant in files.tenants() for one in files.list(tenant) if snapshot in ("", one.id)]
        if not found:
            # Not a success: what checks backups every night must hear that the disk was not mounted.
            raise NotFound(f"there is no snapshot {f'{snapshot!r} ' if snapshot else ''}under {root}")
        checked = _check(files, found)
    finally:
        files.close()
    if json:
        print_json(checked)
    else:
        _tell(checked)
    if any(one.problem for one in checked):
        raise typer.Exit(1)


def _check(files: SnapshotFiles, found: Sequence[Found]) -> list[Checked]:
    told: dict[Found, Description] = {}
    problems: dict[Found, str] = {}
    for one in found:
        try:
            told[one] = files.describe(one)
        except (DataLoss, NotFound) as error:
            problems[one] = error.message
    parts: dict[tuple[str, str], set[str]] = defaultdict(set)
    for one in found:
        parts[one.tenant, one.id].add(one.shard)
    checked = []
    with reading(sum(one.nbytes for one in told.values())) as advance:
        for one in found:
            row = Checked(one.tenant, one.id, one.shard)
            if one in told:
                row.problem = _problem(files, one, advance)
                row.memory, row.created_at = told[one].memory.name, told[one].created_at
                row.documents, row.tokens, row.bytes = told[one].documents, told[one].tokens, told[one].nbytes
                row.missing = tuple(sorted(set(told[one].shards) - parts[one.tenant, one.id])) if one.shard else ()
            else:
                row.problem = problems[one]
            checked.append(row)
    return checked


def _problem(files: SnapshotFiles, one: Found, advance: Callable[[int], None]) -> str:
    """What is wrong with a snapshot; empty if nothing is."""
    from memory_service.store import restored

    try:
        restored.verify(files, one, advance, Cancel())
    except (DataLoss, NotFound) as error:
        return error.message
    return ""


def _tell(checked: Sequence[Checked]) -> None:
    rows = [
        (
            one.name,
            one.tenant,
            one.memory,
            when(one.created_at) if one.memory else "",
            f"{one.documents:,}",
            f"{one.tokens:,}",
            size(one.bytes),
            "damaged" if one.problem else "whole",
        )
        for one in checked
    ]
    print_table("", ("snapshot", "tenant", "memory", "taken", "documents ", "tokens ", "size ", ""), rows, "")
    for one in checked:
        if one.problem:
            say(f"Damaged: {one.tenant}/{one.name}: {one.problem}")
    for (tenant, snapshot), missing in {(one.tenant, one.snapshot): one.missing for one in checked}.items():
        if missing:
            say(f"Elsewhere: of {tenant}/{snapshot}, the parts of shards {', '.join(missing)} are not under this root")
    damaged = sum(bool(one.problem) for one in checked)
    told = f"{damaged:,} damaged" if damaged else "all is well"
    say(f"{counted(len(checked), 'snapshot')}, {size(sum(one.bytes for one in checked))}: {told}.")
