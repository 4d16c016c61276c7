"""The store: runs every verb. Who may call is decided above; whose names they are, here.

What is durable, and in which order, is decided in `commits`, `uploads` and `upkeep`; this file is the table of verbs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from memory_service import verbs
from memory_service.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    Unavailable,
)
from memory_service.index.factories import check_factory
from memory_service.settings import StoreOptions
from memory_service.storage.catalog import Catalog
from memory_service.storage.segments import SegmentFiles
from memory_service.storage.snapshot_files import SnapshotFiles
from memory_service.storage.vfs import File, OsVfs, StorageFailed, Vfs
from memory_service.store.background import Background
from memory_service.store.beginning import Beginning
from memory_service.store.documents import Documents
from memory_service.store.live_memory import LiveMemory
from memory_service.store.membership import Membership
from memory_service.store.memories import Memories
from memory_service.store.operations import Operations, Work
from memory_service.store.queries import Queries
from memory_service.store.recovery import recover
from memory_service.store.restores import Restores
from memory_service.store.sessions import Sessions
from memory_service.store.snapshots import Snapshots
from memory_service.store.upkeep import Upkeep
from memory_service.types.callers import Cancel, Identity
from memory_service.types.listings import Page
from memory_service.types.memories import Stats
from memory_service.types.operations import Operation, OperationKind
from memory_service.types.sessions import SessionInfo
from memory_service.types.uploads import Chunk
from memory_service.verbs import Verb

log = logging.getLogger(__name__)

A = TypeVar("A")
_PRUNE_S = 3600.0


class Store:
    """All memories of one directory, or of RAM. Thread-safe; one process a directory."""

    def __init__(
        self, catalog: Catalog, files: SegmentFiles | None, root: Path | None, vfs: Vfs, options: StoreOptions
    ):
        """Use `Store.open`."""
        self.options = options
        self.ready = False
        self.read_only_reason: str | None = None
        self._catalog = catalog
        self._files = files
        self._vfs = vfs
        self._lock_file: File | None = None
        device = torch.device(options.device)
        self._upkeep = Upkeep(catalog, files, vfs, root)
        self._memories = Memories(catalog, files, self._upkeep, options, device, self._storage_failed)
        self._sessions = Sessions(options, device)
        self._queries = Queries(self._memories, self._sessions, device)
        self.membership = Membership(root, vfs)
        self._documents = Documents(catalog, files, options, self._memories.bytes_of, self._storage_failed)
        self._operations = Operations(catalog, self._storage_failed)
        kept = None if root is None else SnapshotFiles(options.snapshots or root / "snapshots", root, vfs)
        self._snapshots = Snapshots(files, kept, options, self._operations, self.membership)
        self._restores = Restores(self._snapshots, catalog, files, self._operations, self.membership, self._memories)
        self._beginning: Beginning | None = None
        self._closing = threading.Event()
        get = self._memories.get
        self._handlers: dict[type[Verb[Any]], Callable[..., Any]] = {
            verbs.CreateMemory: lambda t, v, _: self._memories.create(t, v),
            verbs.GetMemory: lambda t, v, _: get(t, v.name).held(v.placement),
            verbs.ListMemories: lambda t, v, _: self._memories.list(t, v),
            verbs.DeleteMemory: self._delete_memory,
            verbs.PutDocument: lambda t, v, _: self._documents.put(t, get(t, v.memory), v),
            verbs.BeginUpload: lambda t, v, _: self._documents.begin(t, get(t, v.memory), v),
            verbs.GetUpload: lambda t, v, _: self._documents.upload(t, get(t, v.memory), v.upload),
            verbs.CommitUpload: lambda t, v, _: self._documents.commit(t, get(t, v.memory), v.upload),
            verbs.AbortUpload: lambda t, v, _: self._documents.abort(t, v.upload),
            verbs.GetDocument: lambda t, v, _: get(t, v.memory).document(v.document).info,
            verbs.ListDocuments: lambda t, v, _: self._documents.list(get(t, v.memory), v),
            verbs.DeleteDocument: lambda t, v, _: self._documents.delete(t, get(t, v.memory), v),
            verbs.ListDeleted: lambda t, v, _: self._documents.deleted(get(t, v.memory), v),
            verbs.OpenSession: self._open_session,
            verbs.AppendSessions: self._append_sessions,
            verbs.RenewSession: self._renew_session,
            verbs.CloseSession: self._close_session,
            verbs.Attend: self._queries.attend,
            verbs.Search: self._queries.search,
            verbs.Fetch: lambda t, v, _: self._queries.fetch(t, v),
            verbs.GetStats: self._get_stats,
            verbs.StartOperation: self._start_operation,
            verbs.GetOperation: self._get_operation,
            verbs.ListOperations: self._list_operations,
            verbs.CancelOperation: self._cancel_operation,
            verbs.CreateSnapshot: lambda t, v, _: self._snapshots.create(t, get(t, v.memory), v),
            verbs.ReleaseHold: lambda t, v, _: self._snapshots.release(t, v.operation),
            verbs.GetSnapshot: lambda t, v, _: self._snapshots.get(t, v.snapshot),
            verbs.ListSnapshots: lambda t, v, _: self._snapshots.list(t, v),
            verbs.DeleteSnapshot: lambda t, v, _: self._snapshots.delete(t, v.snapshot),
            verbs.RestoreSnapshot: lambda t, v, _: self._restores.restore(t, v),
            verbs.GetShardMap: lambda t, v, _: self.membership.member,
            verbs.SetShardMap: lambda t, v, _: self.membership.set(v),
            verbs.MarkBehind: lambda t, v, _: self.membership.mark_behind(v.missed),
        }
        chores = (self._documents.expire, self._sessions.expire, self._queries.expire, self._prune)
        self._background = Background(
            self._memories.all, self._upkeep, self._operations, self._writable, chores, self._storage_failed
        )
        self._pruned = time.monotonic()

    # --- Life -------------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        directory: Path | None,
        options: StoreOptions | None = None,
        vfs: Vfs | None = None,
        *,
        begin: bool = True,
    ) -> Store:
        """Open a directory (made if missing), or a store in RAM. Recovers from whatever interrupted the last run.

        Raises FailedPrecondition if another process has the directory, DataLoss if the catalogue is damaged. What
        begins from snapshots does so before it returns, unless the caller is to call `begin`.
        """
        options = options or StoreOptions()
        vfs = vfs or OsVfs()
        if directory is None:
            if options.begin_from_snapshots:
                raise InvalidArgument("a store in RAM does not begin from snapshots; give it a directory")
            store = cls(Catalog.open(None), None, None, vfs, options)
        else:
            vfs.make_directory(directory)
            lock = vfs.lock(directory / "LOCK")
            try:
                store = cls._open_directory(directory, options, vfs)
            except BaseException:
                vfs.close(lock)
                raise
            store._lock_file = lock
        if store._beginning is None:
            store._start()
        elif begin:
            try:
                store.begin()
            except BaseException:
                store.close()
                raise
        return store

    @property
    def beginning(self) -> bool:
        """Whether the store answers nothing yet: it is still to be filled from snapshots."""
        return self._beginning is not None

    def begin(self) -> None:
        """Fill the store from snapshots, if it is to begin so. Raises DataLoss if a memory has no whole one."""
        if self._beginning is None:
            return
        self._beginning.run(self._restores, self._memories.names())
        self._beginning = None
        self._start()

    def _start(self) -> None:
        self.ready = True
        if self.options.background:
            self._background.start()

    @classmethod
    def _open_directory(cls, directory: Path, options: StoreOptions, vfs: Vfs) -> Store:
        fresh = "catalog.sqlite" not in vfs.list_directory(directory)
        files = SegmentFiles(directory, vfs)
        try:
            if fresh and files.memory_keys():
                raise DataLoss(
                    f"{directory} holds memories but no catalogue; bring it back with `fot verify --rebuild-catalog`"
                )
            beginning = Beginning.of(directory, vfs, options, fresh)
            on_commit = getattr(vfs, "note_catalog", None)
            path = directory / "catalog.sqlite"
            catalog = Catalog.open(path, vfs=vfs, on_commit=None if on_commit is None else lambda: on_commit(path))
        except BaseException:
            files.close()
            raise
        try:
            found = recover(catalog, files)
            for problem in found.problems:
                log.warning("recovery: %s", problem)
            for key, name in found.missing:
                log.error(
                    "recovery: segment %s of memory %s is missing or cut short; its documents are lost", name, key
                )
            store = cls(catalog, files, directory, vfs, options)
            store._memories.load()
            store._snapshots.sweep()
            store._beginning = beginning
        except BaseException:
            catalog.close()
            files.close()
            raise
        return store

    def close(self) -> None:
        """Stop background work and let the directory go. What was acknowledged is durable already."""
        if self._closing.is_set():
            return
        self.ready = False
        self._closing.set()
        if self._beginning is not None:
            self._beginning.stop()
        self._background.stop()
        self._operations.close()
        self._snapshots.close()
        if self._files is not None:
            self._files.close()
        self._catalog.close()
        if self._lock_file is not None:
            self._vfs.close(self._lock_file)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- Verbs ------------------------------------------------------------------------------------------------------

    def run(self, identity: Identity, verb: Verb[A], cancel: Cancel | None = None) -> A:
        """Do what the verb says for this tenant. Blocking; raises FotError."""
        if self._closing.is_set():
            raise Unavailable("the store is closed")
        if self._beginning is not None:
            raise Unavailable("the service is being filled from snapshots; try again when it is ready")
        if self.read_only_reason and isinstance(verb, _WRITES):
            raise Unavailable(f"the store is read-only: {self.read_only_reason}", reason="READ_ONLY")
        cancel = cancel or Cancel()
        cancel.check()
        try:
            return cast(A, self._handlers[type(verb)](identity.tenant, verb, cancel))
        except StorageFailed as error:
            self._storage_failed(error)
            raise

    def write_chunk(self, identity: Identity, memory: str, upload: str, chunk: Chunk) -> None:
        """Take a chunk of an upload; InvalidArgument if it does not fit, NotFound if there is no such upload."""
        if self.read_only_reason:
            raise Unavailable(f"the store is read-only: {self.read_only_reason}", reason="READ_ONLY")
        try:
            self._documents.write(identity.tenant, self._memories.get(identity.tenant, memory), upload, chunk)
        except StorageFailed as error:
            self._storage_failed(error)
            raise

    @property
    def behind(self) -> bool:
        """Whether this replica may lack writes, and answers no reads until it is healed."""
        return self.membership.member.behind

    def check_epoch(self, epoch: int, reads: bool) -> None:
        """Raise StaleMap if a call was routed by an older shard map, Unavailable if it must not be answered here."""
        self.membership.check(epoch, reads)

    def estimate(self, identity: Identity, verb: Verb[Any]) -> int:
        """Bytes of working memory a verb will need; cheap, never raises."""
        if isinstance(verb, verbs.Attend | verbs.Search):
            rows = sum(group.queries.shape[0] * group.queries.shape[1] for group in verb.groups)
            dim = max((group.queries.shape[-1] for group in verb.groups), default=0)
            return rows * (12 * dim + verb.options.top_k * (32 + 8 * dim)) + self.options.scratch_bytes // 4
        if isinstance(verb, verbs.PutDocument):
            return 2 * (verb.document.keys.nbytes + verb.document.values.nbytes)
        if isinstance(verb, verbs.AppendSessions):
            return sum(append.keys.nbytes + append.values.nbytes for append in verb.appends)
        if isinstance(verb, verbs.Fetch):
            known = self._memories.find(identity.tenant, verb.memory)
            return 0 if known is None else 3 * verb.tokens * known.spec.bytes_per_token // len(known.spec.layers)
        return 4096

    # --- Memories ---------------------------------------------------------------------------------------------------

    def _delete_memory(self, tenant: str, verb: verbs.DeleteMemory, _: Cancel) -> None:
        self._memories.get(tenant, verb.name)
        self._operations.cancel_memory(tenant, verb.name)
        self._memories.delete(tenant, verb.name, self._let_go)

    def _let_go(self, memory: LiveMemory) -> None:
        self._sessions.close_memory(memory.row.key)
        self._documents.abort_memory(memory)

    # --- Sessions ---------------------------------------------------------------------------------------------------

    def _open_session(self, tenant: str, verb: verbs.OpenSession, _: Cancel) -> SessionInfo:
        memory = self._memories.get(tenant, verb.memory)
        memory.spec.check_model(verb.fingerprint)
        return self._sessions.open(tenant, verb.memory, memory.row.key, memory.spec, verb.lease_s, verb.session).info

    def _append_sessions(self, tenant: str, verb: verbs.AppendSessions, _: Cancel) -> tuple[SessionInfo, ...]:
        key = self._memories.get(tenant, verb.memory).row.key
        sessions = [self._sessions.get(tenant, key, append.session) for append in verb.appends]
        for session, append in zip(sessions, verb.appends, strict=True):
            self._sessions.append(session, append)
        return tuple(session.info for session in sessions)

    def _renew_session(self, tenant: str, verb: verbs.RenewSession, _: Cancel) -> SessionInfo:
        return self._sessions.get(tenant, self._memories.get(tenant, verb.memory).row.key, verb.session).info

    def _close_session(self, tenant: str, verb: verbs.CloseSession, _: Cancel) -> None:
        self._memories.get(tenant, verb.memory)
        self._sessions.close(tenant, verb.session)

    # --- Administration ---------------------------------------------------------------------------------------------

    def _get_stats(self, tenant: str, verb: verbs.GetStats, _: Cancel) -> Stats:
        if verb.memory:
            memories = [self._memories.get(tenant, verb.memory)]
        else:
            memories = self._memories.of(tenant)
        held = [one.held(verb.placement) for one in memories]
        sessions, session_bytes = self._sessions.count(tenant, memories[0].row.key if verb.memory else None)
        return Stats(
            memory=verb.memory,
            documents=sum(one.documents for one in held),
            tokens=sum(one.tokens for one in held),
            bytes=sum(one.bytes for one in held),
            segments=sum(len(one.segments) for one in memories),
            dead_bytes=sum(one.dead_bytes for one in memories),
            resident_bytes=sum(one.resident_bytes for one in memories),
            resident_tokens=sum(stop - start for one in memories for slab in one.slabs for start, stop in slab.runs),
            indexed_tokens=sum(unit.tokens for one in memories for unit in one.units),
            index_bytes=sum(unit.nbytes for one in memories for unit in one.units),
            sessions=sessions,
            session_bytes=session_bytes,
        )

    def _start_operation(self, tenant: str, verb: verbs.StartOperation, _: Cancel) -> Operation:
        memory = self._memories.get(tenant, verb.memory)
        if verb.kind in (OperationKind.SNAPSHOT, OperationKind.RESTORE):
            raise InvalidArgument(f"{verb.kind} has a call of its own: CreateSnapshot, RestoreSnapshot")
        if verb.kind is OperationKind.INDEX and memory.spec.index.factory == "none":
            raise FailedPrecondition(f"memory {verb.memory!r} was created with index factory none: it is never indexed")
        if verb.factory:
            if verb.kind is not OperationKind.INDEX or verb.factory == "none":
                raise InvalidArgument(f"{verb.kind} takes no factory {verb.factory!r}: it says how an index is built")
            check_factory(verb.factory, memory.spec.head_dim)
        return self._operations.start(tenant, verb.memory, verb.kind, self._work(memory, verb.kind, verb.factory))

    def _work(self, memory: LiveMemory, kind: OperationKind, factory: str) -> Work:
        if kind is OperationKind.INDEX:
            return lambda progress, cancel: self._upkeep.build_index(memory, progress, cancel, factory)
        if kind is OperationKind.COMPACT:
            return lambda progress, cancel: self._upkeep.compact(memory, progress, cancel)
        return lambda progress, cancel: self._upkeep.verify(memory, progress, cancel)

    def _get_operation(self, tenant: str, verb: verbs.GetOperation, _: Cancel) -> Operation:
        return self._operations.get(tenant, verb.operation)

    def _list_operations(self, tenant: str, verb: verbs.ListOperations, _: Cancel) -> Page[Operation]:
        if verb.memory:
            self._memories.get(tenant, verb.memory)
        return self._operations.page(tenant, verb)

    def _cancel_operation(self, tenant: str, verb: verbs.CancelOperation, _: Cancel) -> Operation:
        return self._operations.cancel(tenant, verb.operation)

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _writable(self) -> bool:
        return self.read_only_reason is None

    def _prune(self) -> None:
        """Forget old request ids, now and then."""
        if time.monotonic() - self._pruned > _PRUNE_S and self._writable():
            self._pruned = time.monotonic()
            self._catalog.prune(time.time())

    def _storage_failed(self, error: StorageFailed) -> None:
        """An fsync or write failed: what is on disk is no longer known, so nothing more is written (never retried)."""
        if self.read_only_reason is None:
            log.error("the store is read-only from now on: %s", error.message)
        self.read_only_reason = error.message
        self.ready = False


# Verbs that need the disk to be trustworthy.
_WRITES = (
    verbs.CreateMemory,
    verbs.DeleteMemory,
    verbs.PutDocument,
    verbs.BeginUpload,
    verbs.CommitUpload,
    verbs.DeleteDocument,
    verbs.StartOperation,
    verbs.CreateSnapshot,
    verbs.DeleteSnapshot,
    verbs.RestoreSnapshot,
    verbs.SetShardMap,
)
