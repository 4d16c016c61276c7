"""Memories made of snapshots again: brought, checked, and there all at once."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memory_service import verbs
from memory_service.errors import DataLoss, FailedPrecondition, FotError
from memory_service.shards import OTHER_NAME, Member
from memory_service.storage.catalog import Catalog
from memory_service.storage.memory_file import MemoryFile
from memory_service.storage.parts import PartHeader, SegmentRef
from memory_service.storage.records import MemoryRow
from memory_service.storage.segments import SegmentFiles
from memory_service.storage.snapshot_file import Contents, Description
from memory_service.storage.snapshot_files import Found
from memory_service.storage.vfs import StorageFailed
from memory_service.store.membership import Membership
from memory_service.store.memories import Memories
from memory_service.store.operations import Operations
from memory_service.store.restored import dead_in, described, segments_of
from memory_service.store.snapshots import Progress, Snapshots, adding, moving
from memory_service.types.callers import Cancel
from memory_service.types.documents import counted
from memory_service.types.names import check_name
from memory_service.types.operations import Operation, OperationKind, OperationState
from memory_service.types.specs import MemorySpec

log = logging.getLogger(__name__)


class Restores:
    """Makes memories of snapshots. Thread-safe."""

    def __init__(
        self,
        snapshots: Snapshots,
        catalog: Catalog,
        segments: SegmentFiles | None,
        operations: Operations,
        membership: Membership,
        memories: Memories,
    ):
        self.snapshots = snapshots
        self._catalog = catalog
        self._segments = segments
        self._operations = operations
        self._membership = membership
        self._memories = memories
        self._lock = threading.Lock()

    def restore(self, tenant: str, verb: verbs.RestoreSnapshot) -> Operation:
        """Make a memory of a snapshot in the background."""
        one = self.snapshots.find(tenant, verb.snapshot)[0]
        told = self._described(one)
        name = verb.memory or told.memory.name
        check_name(name, "a memory's name")
        with self._lock:
            before = self._operations.find(tenant, name, OperationKind.RESTORE, one.id)
            if before is not None and before.state is OperationState.RUNNING:
                return before
            member = self._membership.member
            _check_shards(member, told, name)
            self._memories.reserve(tenant, name, told.tokens * (told.memory.spec.bytes_per_token + 4))

        def work(progress: Progress, cancel: Cancel) -> str:
            try:
                return self._restore(one, MemoryFile(tenant, name, *_kept(told)), member, progress, cancel)
            finally:
                end()

        def end() -> None:
            self.snapshots.let_go(one)
            self._memories.release(tenant, name)

        self.snapshots.hold(one)
        try:
            return self._operations.start(tenant, name, OperationKind.RESTORE, work, one.id)
        except BaseException:
            end()
            raise

    def restore_now(self, one: Found, tenant: str, name: str, progress: Progress, cancel: Cancel) -> str:
        """Make a memory of a snapshot; a sentence on it. DataLoss naming what is damaged; then nothing is left."""
        memory = MemoryFile(tenant, name, *_kept(self._described(one)))
        return self._restore(one, memory, self._membership.member, progress, cancel)

    def _restore(self, one: Found, memory: MemoryFile, member: Member, progress: Progress, cancel: Cancel) -> str:
        told = self._described(one)
        with _named(one.id):
            contents = self.snapshots.files.contents(one, told)
            self._bring(one, told, contents, memory, member, adding(progress, told.nbytes), cancel)
        return f"memory {memory.name} holds {counted(told.documents)} again, {told.tokens:,} tokens"

    def _described(self, one: Found) -> Description:
        with _named(one.id):
            return described(self.snapshots.files, one)

    def _bring(
        self,
        one: Found,
        told: Description,
        contents: Contents,
        memory: MemoryFile,
        member: Member,
        advance: Callable[[int], None],
        cancel: Cancel,
    ) -> None:
        files = self._segments
        assert files is not None
        copies, key = self.snapshots.files.copies, secrets.token_hex(16)

        def take(path: Path, segment: SegmentRef) -> None:
            copies.bring(path, files.place(key, path.name), segment, advance, cancel)

        files.begin_restore(key)
        try:
            segments = segments_of(self.snapshots.files, one, told, contents, take, cancel)
            headers: list[PartHeader] = [part.header for segment in segments for part in segment.parts]
            dead = dead_in(key, headers, contents)
            generations = (*(header.generation for header in headers), *(stone.generation for stone in dead))
            following = max([contents.next_generation, *(number + 1 for number in generations)])
            row = MemoryRow(key, memory.tenant, memory.name, memory.spec, memory.created_at, following)
            cancel.check()
            files.describe_restored(key, memory, dead)
            # Documents that begin to move must not appear behind the back of who moves them.
            with self._membership.steady(member):
                self._catalog.restore(row, segments, contents.documents)
                self._memories.admit(row)
        except StorageFailed:
            raise  # What is on disk is not known: touch nothing, the next open decides.
        except BaseException:
            self._abandon(files, key)
            raise
        with suppress(FotError):  # It is restored; the next open takes the mark away.
            files.end_restore(key)

    def _abandon(self, files: SegmentFiles, key: str) -> None:
        try:
            self._catalog.delete_memory(key)
            files.abandon_memory(key)
            self._catalog.forget_memory(key)
        except FotError as error:
            log.warning("what was restored in vain is removed at the next start: %s", error.message)


def _kept(told: Description) -> tuple[MemorySpec, float]:
    """A memory's spec and age, which it keeps: replicas take what is older than its memory for a leftover."""
    return told.memory.spec, told.memory.created_at


def _check_shards(member: Member, told: Description, name: str) -> None:
    """Raise FailedPrecondition unless this process may hold what the snapshot's did."""
    if member.map is not None and member.map.also:
        raise moving()
    ids = member.map.ids if member.map is not None and member.shard else ()
    alone = len(told.shards) <= 1 and len(ids) <= 1
    if not alone and (sorted(told.shards) != sorted(ids) or told.shard != member.shard):
        was = f"of shard {told.shard} of {', '.join(told.shards)}" if told.shard else "of one service"
        here = f"shard {member.shard} of {', '.join(ids)}" if ids else "one service"
        raise FailedPrecondition(
            f"the snapshot is {was}, this is {here}; restore it into as many shards of the same names, then let "
            "the cluster grow or shrink",
            reason="OTHER_SHARDS",
        )
    if not alone and name != told.memory.name:
        raise FailedPrecondition(OTHER_NAME.format(told.memory.name), reason="OTHER_NAME")


@contextmanager
def _named(snapshot: str) -> Iterator[None]:
    """Say which snapshot is damaged."""
    try:
        yield
    except DataLoss as error:
        raise DataLoss(f"snapshot {snapshot} is damaged: {error.message}") from error
