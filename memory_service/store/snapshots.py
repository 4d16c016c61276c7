"""Snapshots of memories: taken, listed, deleted, made into memories again.

Taking one only notes what the memory is at that moment; its segments never change, and stay on disk while they are
read. A restored memory exists once every byte was checked: its rows appear in one transaction of the catalogue.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

from memory_service import verbs
from memory_service.errors import AlreadyExists, DataLoss, FailedPrecondition, FotError, NotFound, QuotaExceeded
from memory_service.paging import page_of
from memory_service.settings import StoreOptions
from memory_service.storage.memory_file import MemoryFile
from memory_service.storage.parts import SegmentRef
from memory_service.storage.records import MemoryRow
from memory_service.storage.segments import SegmentFiles
from memory_service.storage.snapshot_file import Contents, Description, SegmentEntry, directory_name, tenant_directory
from memory_service.storage.snapshot_files import Found, SnapshotFiles
from memory_service.storage.vfs import StorageFailed
from memory_service.store.holds import Hold
from memory_service.store.live_document import LiveDocument
from memory_service.store.live_memory import LiveMemory
from memory_service.store.membership import Membership
from memory_service.store.operations import Operations
from memory_service.types.callers import Cancel
from memory_service.types.documents import counted
from memory_service.types.listings import Page
from memory_service.types.operations import Operation, OperationKind, OperationState
from memory_service.types.snapshots import Snapshot, check_hold, check_snapshot_id, fresh_snapshot_id

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # Bytes done, bytes in all.


class Noted(NamedTuple):
    """What a memory is, as long as nobody writes to it; its files stay until `release`."""

    row: MemoryRow
    documents: dict[str, LiveDocument]
    segments: dict[int, SegmentRef]
    graves: dict[str, int]
    hold: Hold | None  # Of those who would change it.
    release: ExitStack


@dataclass(frozen=True, slots=True)
class Moment:
    """A memory at one moment; its files stay until `release`."""

    description: Description
    contents: Contents
    segments: tuple[SegmentRef, ...]
    release: ExitStack


class Snapshots:
    """The snapshots of all tenants. Thread-safe. Without files of its own a store has none."""

    def __init__(
        self,
        segments: SegmentFiles | None,
        files: SnapshotFiles | None,
        options: StoreOptions,
        operations: Operations,
        membership: Membership,
    ):
        self._segments = segments
        self._snapshot_files = files
        self._options = options
        self._operations = operations
        self._membership = membership
        self._lock = threading.Lock()
        self._making: set[Found] = set()
        self._held: list[Found] = []  # By restores.
        self._holds: dict[tuple[str, str], Hold] = {}  # Of writers, by tenant and snapshot: the latest.

    def close(self) -> None:
        """Close every file."""
        if self._snapshot_files is not None:
            self._snapshot_files.close()

    def sweep(self) -> None:
        """Remove what an earlier run left half-made."""
        if self._snapshot_files is None:
            return
        try:
            if swept := self._snapshot_files.sweep():
                log.warning("recovery: removed %d half-made snapshots", swept)
        except StorageFailed:
            raise
        except FotError as error:
            log.warning("half-made snapshots could not be removed yet: %s", error.message)

    # --- Looking ----------------------------------------------------------------------------------------------------

    def get(self, tenant: str, snapshot: str) -> Snapshot:
        """One snapshot; NotFound."""
        return self._told(self.find(tenant, snapshot)[0])

    def _told(self, one: Found) -> Snapshot:
        try:
            return self.files.describe(one).snapshot
        except (DataLoss, NotFound) as error:
            return Snapshot(one.id, "", 0.0, shard=one.shard, problem=error.message)

    def find(self, tenant: str, snapshot: str) -> list[Found]:
        """The directories of a snapshot, this process's own shard's first; NotFound if there is none."""
        check_snapshot_id(snapshot)
        found = [one for one in self.files.list(tenant_directory(tenant)) if one.id == snapshot]
        if not found:
            raise NotFound(f"no snapshot {snapshot!r}")
        mine = self._membership.member.shard
        return sorted(found, key=lambda one: (one.shard != mine, one.shard != "", one.name))

    def list(self, tenant: str, verb: verbs.ListSnapshots) -> Page[Snapshot]:
        """A page of the snapshots of one memory or of all, by id."""
        known = {one.name: one for one in self.files.list(tenant_directory(tenant))}
        if verb.memory:
            known = {name: one for name, one in known.items() if self._told(one).memory == verb.memory}
        names, rest = page_of(sorted(known), verb.page_size, verb.page_token)
        return Page(tuple(self._told(known[name]) for name in names), rest)

    def hold(self, one: Found) -> None:
        """Keep a snapshot from being deleted, until `let_go`."""
        with self._lock:
            self._held.append(one)

    def let_go(self, one: Found) -> None:
        """It may be deleted again."""
        with self._lock:
            self._held.remove(one)

    @property
    def files(self) -> SnapshotFiles:
        """The files. Raises FailedPrecondition if there can be none."""
        if self._snapshot_files is None:
            raise FailedPrecondition(
                "a store in RAM has no files to keep as a snapshot; open a directory, or a service over one",
                reason="NO_FILES",
            )
        return self._snapshot_files

    # --- Taking -----------------------------------------------------------------------------------------------------

    def create(self, tenant: str, memory: LiveMemory, verb: verbs.CreateSnapshot) -> Operation:
        """Note what the memory is now, and keep that in the background."""
        files = self.files
        name = memory.row.name
        snapshot = verb.snapshot or fresh_snapshot_id()
        check_snapshot_id(snapshot)
        check_hold(verb.hold_s)
        with self._lock:
            before = self._operations.find(tenant, name, OperationKind.SNAPSHOT, snapshot)
            if before is not None and before.state is OperationState.RUNNING:
                known = self._holds.get((tenant, snapshot))
                return replace(before, held_until=known.until) if known and known.holds else before
            member = self._membership.member
            if member.map is not None and member.map.also:
                raise moving()
            place = Found(tenant_directory(tenant), directory_name(snapshot, member.shard if member.map else ""))
            if place not in self._making and files.exists(place):
                if before is not None and before.state is OperationState.DONE:
                    return before
                raise AlreadyExists(f"there is a snapshot {snapshot!r} already; delete it, or choose another id")
            self._check_count(tenant, place)
            cancel = Cancel()
            noted = _note(memory, verb.hold_s, cancel)
            self._making.add(place)
            try:
                work = self._making_work(memory, place, self._moment(noted, snapshot), noted.hold)
                begun = self._operations.start(tenant, name, OperationKind.SNAPSHOT, work, snapshot, cancel)
            except BaseException:
                cancel.cancel()
                self._making.discard(place)
                noted.release.close()
                raise
            if noted.hold is None:
                return begun
            self._holds = {key: one for key, one in self._holds.items() if one.holds} | {(tenant, snapshot): noted.hold}
            return replace(begun, held_until=noted.hold.until)

    def release(self, tenant: str, operation: str) -> Operation:
        """Let the writers go that an operation of `create` holds; harmless twice. FailedPrecondition if too late."""
        found = self._operations.get(tenant, operation)
        hold = self._holds.get((tenant, found.snapshot)) if found.kind is OperationKind.SNAPSHOT else None
        going_on = found.kind is OperationKind.SNAPSHOT and found.state in (OperationState.RUNNING, OperationState.DONE)
        if not (going_on if hold is None else hold.release()):
            raise FailedPrecondition(
                f"operation {operation} holds no writers any more; take the snapshot again", reason="HOLD_ENDED"
            )
        return found

    def _check_count(self, tenant: str, place: Found) -> None:
        kept = {one for one in self.files.list(place.tenant) if one.shard == place.shard}
        kept |= {one for one in self._making if one.tenant == place.tenant}
        if len(kept) >= self._options.tenant_snapshots:
            raise QuotaExceeded(
                f"the tenant has {self._options.tenant_snapshots} snapshots, which is its limit; delete some"
            )

    def _moment(self, noted: Noted, snapshot: str) -> Moment:
        row = noted.row
        # In the order of their commits: restored in another, sums over them would end in other last bits.
        live = sorted((one.row for one in noted.documents.values()), key=lambda row: row.pk)
        segments = tuple(noted.segments[pk] for pk in sorted({pk for one in live for pk, _ in one.parts}))
        dead = [(name, last) for name, last in noted.graves.items() if name and name not in noted.documents]
        contents = Contents(
            next_generation=row.next_generation,
            documents=tuple((one.id, one.generation) for one in live),
            deleted=tuple(sorted(dead)),
            segments=tuple(SegmentEntry(s.path, s.nbytes, s.header_bytes, s.header_crc) for s in segments),
        )
        member = self._membership.member
        told = Description(
            id=snapshot,
            memory=MemoryFile(row.tenant, row.name, row.spec, row.created_at),
            created_at=time.time(),
            documents=len(live),
            tokens=sum(one.tokens for one in live),
            nbytes=sum(one.nbytes for one in segments),
            shard=member.shard if member.map else "",
            shards=member.map.ids if member.map and member.shard else (),
            contents_nbytes=0,
            contents_crc=0,
        )
        return Moment(told, contents, segments, noted.release)

    def _making_work(
        self, memory: LiveMemory, place: Found, moment: Moment, hold: Hold | None
    ) -> Callable[[Progress, Cancel], str]:
        def work(progress: Progress, cancel: Cancel) -> str:
            try:
                with moment.release:
                    if hold is not None and hold.wait() and not hold.released:
                        cancel.check()
                        raise FailedPrecondition("nobody let the writers go in time", reason="HOLD_ENDED")
                    return self._make(memory, moment, progress, cancel)
            finally:
                with self._lock:
                    self._making.discard(place)

        return work

    def _make(self, memory: LiveMemory, moment: Moment, progress: Progress, cancel: Cancel) -> str:
        assert self._segments is not None
        told = moment.description
        places = [(self._segments.place(memory.row.key, one.path), one) for one in moment.segments]
        copied = self.files.make(told, moment.contents, places, adding(progress, told.nbytes), cancel)
        linked = len(places) - copied
        return (
            f"snapshot {told.id} holds {counted(told.documents)}: "
            f"segments linked {linked:,}, copied {copied:,}; {told.nbytes:,} bytes"
        )

    # --- Deleting ---------------------------------------------------------------------------------------------------

    def delete(self, tenant: str, snapshot: str) -> None:
        """Delete a snapshot: this shard's part of it, or what there is if there is none of this shard."""
        with self._lock:
            check_snapshot_id(snapshot)
            directory = tenant_directory(tenant)
            if any((one.tenant, one.id) == (directory, snapshot) for one in self._making):
                raise FailedPrecondition(f"snapshot {snapshot!r} is still being made; cancel that operation instead")
            found = self.find(tenant, snapshot)
            shard = found[0].shard
            mine = [one for one in found if one.shard == shard] if shard == self._membership.member.shard else found
            if any(one in self._held for one in mine):
                raise FailedPrecondition(f"snapshot {snapshot!r} is being restored; wait for that operation")
            for one in mine:
                self.files.delete(one)


def _note(memory: LiveMemory, hold_s: float, cancel: Cancel) -> Noted:
    with memory.writing, ExitStack() as keeping:
        keeping.enter_context(memory.reading())
        if memory.deleted:
            raise NotFound(f"no memory {memory.row.name!r}; create it first")
        hold = Hold(hold_s, cancel) if hold_s else None
        if hold is not None:
            memory.hold_writers(hold)
        documents, segments, graves = memory.documents.copy(), memory.segments.copy(), memory.graves.copy()
        return Noted(memory.row, documents, segments, graves, hold, keeping.pop_all())


def adding(progress: Progress, total: int) -> Callable[[int], None]:
    """`progress` told in steps."""
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return advance


def moving() -> FailedPrecondition:
    """The error of what needs documents to stay where they are."""
    return FailedPrecondition("documents are moving between shards; wait until that is done", reason="MOVING")
