"""How a store whose disk was lost begins: with the newest whole snapshot of every memory under its root.

A memory of which there are snapshots, but none that is whole, stops the beginning: a service without it would answer
as if it had never been.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from memory_service.errors import DataLoss, FailedPrecondition, NotFound
from memory_service.process.logs import event
from memory_service.settings import StoreOptions
from memory_service.storage.snapshot_file import tenant_directory
from memory_service.storage.snapshot_files import Found, SnapshotFiles
from memory_service.storage.vfs import Vfs, replace_file
from memory_service.store.restores import Restores
from memory_service.types.callers import Cancel

NOTE = "BEGINNING"


class _Candidate(NamedTuple):
    created_at: float  # 0: its description is damaged, so it is not known.
    found: Found
    problem: str


class Beginning:
    """A store's beginning; what a crash cuts off goes on at the next open, for it is noted in the data directory."""

    def __init__(self, note: Path, vfs: Vfs, shard: str):
        """Use `Beginning.of`."""
        self._note = note
        self._vfs = vfs
        self._shard = shard
        self._cancel = Cancel()
        self._running = threading.Lock()

    @classmethod
    def of(cls, directory: Path, vfs: Vfs, options: StoreOptions, fresh: bool) -> Beginning | None:
        """Whether this directory (`fresh`: without a catalogue) begins from snapshots; asked before it has one."""
        note = directory / NOTE
        told = {"snapshots": str((options.snapshots or directory / "snapshots").absolute())}
        told["shard"] = options.begin_from_shard
        if note.name in vfs.list_directory(directory):
            told = _noted(note, vfs, told["snapshots"])
        elif fresh and options.begin_from_snapshots:
            replace_file(vfs, note, json.dumps(told).encode())
        else:
            return None
        return cls(note, vfs, told["shard"])

    def run(self, restores: Restores, known: Collection[tuple[str, str]]) -> None:
        """Restore every memory (tenant, name) that is not `known` yet. Raises DataLoss if one has no whole snapshot."""
        with self._running:
            restored = begin(restores, self._shard, known, self._cancel)
            self._vfs.unlink(self._note)
            self._vfs.fsync_directory(self._note.parent)
            event(logging.INFO, "the store has begun", restored=restored)

    def stop(self) -> None:
        """Give up, and wait until that has happened."""
        self._cancel.cancel()
        with self._running:
            pass


def _noted(note: Path, vfs: Vfs, snapshots: str) -> dict[str, str]:
    """What a beginning that was cut off was told. FailedPrecondition if the snapshots are now looked for elsewhere."""
    try:
        told: dict[str, str] = json.loads(vfs.read_file(note))
        root = told["snapshots"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataLoss(f"{note} is damaged; empty {note.parent} and begin anew") from error
    if root != snapshots:
        raise FailedPrecondition(
            f"{note.parent} is still being filled from the snapshots in {root}: serve it with --snapshots {root} until "
            "that is done, or empty it and begin anew"
        )
    return told


def begin(restores: Restores, shard: str, known: Collection[tuple[str, str]], cancel: Cancel) -> int:
    """Restore the memories (tenant, name) that are not `known` yet; how many.

    Of snapshots of several shards under one root, `shard` says whose. Raises DataLoss if a memory has no whole one.
    """
    files = restores.snapshots.files
    lost: list[str] = []
    restored = 0
    memories = _candidates(files, shard)
    for (tenant, name), candidates in sorted(memories.items()):
        if (tenant, name) in known:
            continue
        for one in sorted(candidates, key=lambda one: (one.created_at, one.found.name), reverse=True):
            if _restored(restores, tenant, name, one, cancel):
                restored += 1
                break
        else:
            lost.append(f"{name} of tenant {tenant}")
    if lost:
        raise DataLoss(
            f"no snapshot of memory {', '.join(lost)} is whole; mend them, or remove them from {files.root} to begin "
            "without"
        )
    if not memories:
        event(logging.WARNING, "no snapshots to begin from: the store begins empty", root=str(files.root))
    return restored


def _restored(restores: Restores, tenant: str, name: str, one: _Candidate, cancel: Cancel) -> bool:
    which = one.found.name
    if one.problem:
        return False
    try:
        outcome = restores.restore_now(one.found, tenant, name, lambda done, total: None, cancel)
    except (DataLoss, NotFound) as error:
        told = "a snapshot is damaged; an older one is tried"
        event(logging.ERROR, told, tenant=tenant, memory=name, snapshot=which, problem=error.message)
        return False
    taken = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(one.created_at))
    told = "restored from a snapshot"
    event(logging.INFO, told, tenant=tenant, memory=name, snapshot=which, taken=taken, outcome=outcome)
    return True


def _candidates(files: SnapshotFiles, shard: str) -> dict[tuple[str, str], list[_Candidate]]:
    """All snapshots of a shard, by (tenant, memory)."""
    found = [one for tenant in files.tenants() for one in files.list(tenant)]
    shards = sorted({one.shard for one in found})
    if not shard and len(shards) > 1:
        raise FailedPrecondition(
            f"{files.root} holds snapshots of several shards ({', '.join(filter(None, shards))}); say which to begin "
            "from with --begin-from-shard"
        )
    memories: dict[tuple[str, str], list[_Candidate]] = defaultdict(list)
    for one in found:
        if shard in ("", one.shard):
            name, candidate = _candidate(files, one)
            memories[name].append(candidate)
    return memories


def _candidate(files: SnapshotFiles, one: Found) -> tuple[tuple[str, str], _Candidate]:
    try:
        told = files.describe(one)
        return (told.memory.tenant, told.memory.name), _Candidate(told.created_at, one, "")
    except (DataLoss, NotFound) as error:
        problem = error.message
    try:
        memory = files.memory(one)
        if tenant_directory(memory.tenant) != one.tenant:
            raise DataLoss("it is another tenant's")
    except (DataLoss, NotFound) as error:
        raise DataLoss(
            f"{files.path(one)} does not say which memory it is of ({problem}; {error.message}); mend it, or remove it "
            "to begin without"
        ) from error
    what = "a snapshot's description is damaged; others are tried"
    event(logging.ERROR, what, tenant=memory.tenant, memory=memory.name, snapshot=one.name, problem=problem)
    return (memory.tenant, memory.name), _Candidate(0.0, one, problem)
