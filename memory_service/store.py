"""The store: runs every verb. Who may call is decided above; whose names they are, here.

What is durable, and in which order, is decided in `commits`, `uploads` and `upkeep`; this file is the table of verbs.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from memory_service import engine, verbs
from memory_service.background import Background
from memory_service.beginning import Beginning
from memory_service.catalog import Catalog, MemoryRow
from memory_service.documents import Documents
from memory_service.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    FotError,
    InvalidArgument,
    NotFound,
    QuotaExceeded,
    SessionExpired,
    Unavailable,
)
from memory_service.index import check_factory
from memory_service.live_memory import LiveMemory
from memory_service.membership import Membership
from memory_service.memory_file import MemoryFile
from memory_service.operations import Operations, Work
from memory_service.paging import page_of, page_size
from memory_service.pieces import cut_attend, join_attended
from memory_service.provenance import session_source
from memory_service.recent import Recent
from memory_service.recovery import recover
from memory_service.residency import Residency
from memory_service.restores import Restores
from memory_service.scan import Arena
from memory_service.segments import SegmentFiles
from memory_service.sessions import Session, Sessions
from memory_service.settings import StoreOptions
from memory_service.slabs import read_spans
from memory_service.snapshot_files import SnapshotFiles
from memory_service.snapshots import Snapshots
from memory_service.tombstones import Tombstone
from memory_service.types import (
    Attended,
    AttendGroup,
    Cancel,
    Chunk,
    Fetched,
    Identity,
    MemoryInfo,
    Operation,
    OperationKind,
    Page,
    SessionInfo,
    Stats,
    TopTokens,
    check_name,
)
from memory_service.upkeep import Upkeep
from memory_service.verbs import Verb
from memory_service.vfs import File, OsVfs, StorageFailed, Vfs

log = logging.getLogger(__name__)

A = TypeVar("A")
_PRUNE_S = 3600.0
_PIECE_BYTES = 16 << 20  # Of queries and answers looked at together: at most 32 times as much working memory.


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
        self._device = torch.device(options.device)
        self._lock = threading.Lock()
        self._memories: dict[tuple[str, str], LiveMemory] = {}
        self._residency = Residency(options.resident_bytes)
        self._sessions = Sessions(options, self._device)
        self.membership = Membership(root, vfs)
        self._documents = Documents(catalog, files, options, self._tenant_bytes, self._storage_failed)
        self._operations = Operations(catalog, self._storage_failed)
        kept = None if root is None else SnapshotFiles(options.snapshots or root / "snapshots", root, vfs)
        self._snapshots = Snapshots(files, kept, options, self._operations, self.membership)
        self._restores = Restores(self._snapshots, catalog, files, self._operations, self.membership, self)
        self._reserved: dict[tuple[str, str], int] = {}  # Bytes of memories that are being restored.
        self._beginning: Beginning | None = None
        self._upkeep = Upkeep(catalog, files, vfs, root)
        self._arenas = threading.local()
        self._recent = Recent()
        self._closing = threading.Event()
        self._handlers: dict[type[Verb[Any]], Callable[..., Any]] = {
            verbs.CreateMemory: self._create_memory,
            verbs.GetMemory: self._get_memory,
            verbs.ListMemories: self._list_memories,
            verbs.DeleteMemory: self._delete_memory,
            verbs.PutDocument: lambda t, v, _: self._documents.put(t, self._memory(t, v.memory), v),
            verbs.BeginUpload: lambda t, v, _: self._documents.begin(t, self._memory(t, v.memory), v),
            verbs.GetUpload: lambda t, v, _: self._documents.upload(t, self._memory(t, v.memory), v.upload),
            verbs.CommitUpload: lambda t, v, _: self._documents.commit(t, self._memory(t, v.memory), v.upload),
            verbs.AbortUpload: lambda t, v, _: self._documents.abort(t, v.upload),
            verbs.GetDocument: lambda t, v, _: self._memory(t, v.memory).document(v.document).info,
            verbs.ListDocuments: lambda t, v, _: self._documents.list(self._memory(t, v.memory), v),
            verbs.DeleteDocument: lambda t, v, _: self._documents.delete(t, self._memory(t, v.memory), v),
            verbs.ListDeleted: lambda t, v, _: self._documents.deleted(self._memory(t, v.memory), v),
            verbs.OpenSession: self._open_session,
            verbs.AppendSessions: self._append_sessions,
            verbs.RenewSession: self._renew_session,
            verbs.CloseSession: self._close_session,
            verbs.Attend: self._attend,
            verbs.Search: self._search,
            verbs.Fetch: self._fetch,
            verbs.GetStats: self._get_stats,
            verbs.StartOperation: self._start_operation,
            verbs.GetOperation: self._get_operation,
            verbs.ListOperations: self._list_operations,
            verbs.CancelOperation: self._cancel_operation,
            verbs.CreateSnapshot: lambda t, v, _: self._snapshots.create(t, self._memory(t, v.memory), v),
            verbs.GetSnapshot: lambda t, v, _: self._snapshots.get(t, v.snapshot),
            verbs.ListSnapshots: lambda t, v, _: self._snapshots.list(t, v),
            verbs.DeleteSnapshot: lambda t, v, _: self._snapshots.delete(t, v.snapshot),
            verbs.RestoreSnapshot: lambda t, v, _: self._restores.restore(t, v),
            verbs.GetShardMap: lambda t, v, _: self.membership.member,
            verbs.SetShardMap: lambda t, v, _: self.membership.set(v),
            verbs.MarkBehind: lambda t, v, _: self.membership.mark_behind(v.missed),
        }
        chores = (self._documents.expire, self._sessions.expire, self._recent.expire, self._prune)
        self._background = Background(
            self._live, self._upkeep, self._operations, self._writable, chores, self._storage_failed
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
        with self._lock:
            known = set(self._memories)
        self._beginning.run(self._restores, known)
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
            for row in catalog.memories():
                store._memories[row.tenant, row.name] = store._load(row)
            store._upkeep.sweep_indexes({row.key for row in catalog.memories()})
            store._snapshots.sweep()
            store._beginning = beginning
        except BaseException:
            catalog.close()
            files.close()
            raise
        return store

    def _load(self, row: MemoryRow) -> LiveMemory:
        if self._files is not None:
            # A rebuilt catalogue does not know the generations of documents that compaction left no trace of: a new
            # document of the same id must not get one the log says was deleted.
            deleted = [number for (key, _), number in self._files.tombstones.entries.items() if key == row.key]
            row = replace(row, next_generation=max([row.next_generation, *(number + 1 for number in deleted)]))
        memory = LiveMemory(row, self._files, self._residency, self._device)
        if self._files is not None:
            entries = self._files.tombstones.entries.items()
            memory.graves.update((name, number) for (key, name), number in entries if key == row.key)
        segments = [(one.pk, one.ref) for one in self._catalog.segments(row.key)]
        memory.publish(self._catalog.documents(row.key), segments)
        self._upkeep.load_indexes(memory)
        return memory

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
            self._documents.write(identity.tenant, self._memory(identity.tenant, memory), upload, chunk)
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
            known = self._memories.get((identity.tenant, verb.memory))
            return 0 if known is None else 3 * verb.tokens * known.spec.bytes_per_token // len(known.spec.layers)
        return 4096

    # --- Memories ---------------------------------------------------------------------------------------------------

    def _create_memory(self, tenant: str, verb: verbs.CreateMemory, _: Cancel) -> MemoryInfo:
        check_name(verb.name, "a memory's name")
        verb.spec.check()
        check_factory(verb.spec.index.factory, verb.spec.head_dim)
        with self._lock:
            known = self._memories.get((tenant, verb.name))
            if known is not None:
                if known.spec != verb.spec:
                    raise AlreadyExists(f"memory {verb.name!r} exists with another spec: {known.spec}")
                return known.info
            self._check_name_free(tenant, verb.name)
            created_at = verb.created_at or time.time()
            row = MemoryRow(secrets.token_hex(16), tenant, verb.name, verb.spec, created_at, 1)
            if self._files is not None:
                self._files.create_memory(row.key, MemoryFile(tenant, row.name, row.spec, row.created_at))
            self._catalog.create_memory(row)
            memory = self._memories[tenant, verb.name] = LiveMemory(row, self._files, self._residency, self._device)
            return memory.info

    def _get_memory(self, tenant: str, verb: verbs.GetMemory, _: Cancel) -> MemoryInfo:
        return self._memory(tenant, verb.name).held(verb.placement)

    def _list_memories(self, tenant: str, verb: verbs.ListMemories, _: Cancel) -> Page[MemoryInfo]:
        with self._lock:
            mine = sorted(name for owner, name in self._memories if owner == tenant)
            names, rest = page_of(mine, verb.page_size, verb.page_token)
            return Page(tuple(self._memories[tenant, name].held(verb.placement) for name in names), rest)

    def _delete_memory(self, tenant: str, verb: verbs.DeleteMemory, _: Cancel) -> None:
        memory = self._memory(tenant, verb.name)
        key = memory.row.key
        self._operations.cancel_memory(tenant, verb.name)
        with memory.writing, self._lock:
            if self._memories.get((tenant, verb.name)) is not memory:
                raise NotFound(f"no memory {verb.name!r}")
            self._catalog.delete_memory(key)
            del self._memories[tenant, verb.name]
            if self._files is not None:
                self._files.tombstones.add([Tombstone(key, "", 0)])
            self._sessions.close_memory(key)
            self._documents.abort_memory(memory)
            memory.close(lambda: self._reclaim(key))

    def _reclaim(self, key: str) -> None:
        """Remove a deleted memory's files. What a crash leaves, the next open removes."""
        try:
            self._upkeep.drop_indexes(key)
            if self._files is not None:
                self._files.drop_memory(key)
            self._catalog.forget_memory(key)
        except StorageFailed as error:
            self._storage_failed(error)
        except FotError as error:
            log.warning("could not remove a deleted memory's files yet: %s", error.message)

    def _memory(self, tenant: str, name: str) -> LiveMemory:
        memory = self._memories.get((tenant, name))
        if memory is None:
            raise NotFound(f"no memory {name!r}; create it first")
        return memory

    # --- Memories that are being restored -----------------------------------------------------------------------------

    def reserve(self, tenant: str, name: str, nbytes: int) -> None:
        """Keep a name and room for a memory that is to be. Raises AlreadyExists, QuotaExceeded."""
        with self._lock:
            if (tenant, name) in self._memories:
                raise AlreadyExists(
                    f"there is a memory {name!r} already; restore under another name, or delete that one first"
                )
            self._check_name_free(tenant, name)
            limit, have = self.options.tenant_bytes, self._tenant_bytes(tenant)
            if limit is not None and have + nbytes > limit:
                raise QuotaExceeded(
                    f"the tenant holds {have:,} of {limit:,} bytes and the snapshot has {nbytes:,} more; delete "
                    "documents or ask the operator for a larger quota"
                )
            self._reserved[tenant, name] = nbytes

    def release(self, tenant: str, name: str) -> None:
        """The memory is there, or will not be."""
        with self._lock:
            del self._reserved[tenant, name]

    def admit(self, row: MemoryRow) -> None:
        """Serve a memory that the catalogue knows now."""
        memory = self._load(row)
        with self._lock:
            self._memories[row.tenant, row.name] = memory

    def _check_name_free(self, tenant: str, name: str) -> None:
        if (tenant, name) in self._reserved:
            raise AlreadyExists(f"a memory {name!r} is being restored; wait for that operation, or cancel it")
        mine = [owner for owner, _ in (*self._memories, *self._reserved) if owner == tenant]
        if len(mine) >= self.options.tenant_memories:
            raise QuotaExceeded(f"the tenant has {self.options.tenant_memories} memories, which is its limit")

    # --- Sessions ---------------------------------------------------------------------------------------------------

    def _open_session(self, tenant: str, verb: verbs.OpenSession, _: Cancel) -> SessionInfo:
        memory = self._memory(tenant, verb.memory)
        memory.spec.check_model(verb.fingerprint)
        return self._sessions.open(tenant, verb.memory, memory.row.key, memory.spec, verb.lease_s, verb.session).info

    def _append_sessions(self, tenant: str, verb: verbs.AppendSessions, _: Cancel) -> tuple[SessionInfo, ...]:
        key = self._memory(tenant, verb.memory).row.key
        sessions = [self._sessions.get(tenant, key, append.session) for append in verb.appends]
        for session, append in zip(sessions, verb.appends, strict=True):
            self._sessions.append(session, append)
        return tuple(session.info for session in sessions)

    def _renew_session(self, tenant: str, verb: verbs.RenewSession, _: Cancel) -> SessionInfo:
        return self._sessions.get(tenant, self._memory(tenant, verb.memory).row.key, verb.session).info

    def _close_session(self, tenant: str, verb: verbs.CloseSession, _: Cancel) -> None:
        self._memory(tenant, verb.memory)
        self._sessions.close(tenant, verb.session)

    # --- Attention --------------------------------------------------------------------------------------------------

    def _attend(self, tenant: str, verb: verbs.Attend, cancel: Cancel) -> tuple[Attended, ...]:
        memory = self._memory(tenant, verb.memory)
        layer = memory.spec.layer_index(verb.layer)
        engine.check_groups(memory.spec, verb.groups, verb.options)
        sessions = self._scope_sessions(tenant, memory, verb.groups, layer)
        arena = getattr(self._arenas, "arena", None)
        if arena is None:
            arena = self._arenas.arena = Arena()
        # Queries do not know of each other: cut along them, so that working memory has a bound whatever is asked.
        pieces, parts = cut_attend(verb, _PIECE_BYTES)
        memory.last_used = time.monotonic()
        with memory.reading():
            answers = [
                engine.attend(memory, sessions, layer, part, arena, self._device, cancel, self._recent)
                for part in parts
            ]
        return join_attended(pieces, answers)

    def _search(self, tenant: str, verb: verbs.Search, cancel: Cancel) -> tuple[TopTokens, ...]:
        if not verb.options.top_k:
            raise InvalidArgument("search needs top_k ≥ 1")
        options = replace(verb.options, tokens=True)
        attend = verbs.Attend(verb.memory, verb.layer, verb.groups, options, verb.placement)
        answers = self._attend(tenant, attend, cancel)
        return tuple(answer.tokens for answer in answers if answer.tokens is not None)

    def _scope_sessions(
        self, tenant: str, memory: LiveMemory, groups: Iterable[AttendGroup], layer: int
    ) -> dict[str, Session]:
        scopes = [scope for group in groups for scope in group.scope.sessions]
        found = {scope.id: self._sessions.get(tenant, memory.row.key, scope.id) for scope in scopes}
        if any(found[scope.id].tokens[layer] < scope.at_least for scope in scopes):
            raise SessionExpired("the session misses tokens that were appended elsewhere", reason="SESSION_SHORT")
        return found

    def _fetch(self, tenant: str, verb: verbs.Fetch, _: Cancel) -> Fetched:
        memory = self._memory(tenant, verb.memory)
        layer = memory.spec.layer_index(verb.layer)
        if verb.first_token < 0 or verb.tokens < 1:
            raise InvalidArgument("first_token must be ≥ 0 and tokens ≥ 1")
        prefix = session_source("")
        with memory.reading():
            if verb.source.startswith(prefix):
                session = self._sessions.get(tenant, memory.row.key, verb.source.removeprefix(prefix))
                length = session.tokens[layer]
            else:
                document = memory.document(verb.source)
                length = document.row.tokens
            first, count = verb.first_token, min(verb.tokens, length - verb.first_token)
            if count < 1:
                raise InvalidArgument(f"{verb.source!r} has {length} tokens, there is none at {first}")
            if verb.source.startswith(prefix):
                keys, values, ids = read_spans(session.spans(layer), layer, first, count)
            else:
                keys, values, ids = memory.read(document, layer, first, count)
        return Fetched(keys, values, ids, first)

    # --- Administration ---------------------------------------------------------------------------------------------

    def _get_stats(self, tenant: str, verb: verbs.GetStats, _: Cancel) -> Stats:
        if verb.memory:
            memories: Sequence[LiveMemory] = [self._memory(tenant, verb.memory)]
        else:
            with self._lock:
                memories = [memory for (owner, _), memory in self._memories.items() if owner == tenant]
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
        memory = self._memory(tenant, verb.memory)
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
            self._memory(tenant, verb.memory)
        known = {one.id: one for one in self._operations.list(tenant, verb.memory)}
        ids = list(known)
        if verb.page_token and verb.page_token not in known:
            raise InvalidArgument("page_token is not of this listing; start again without it")
        start = ids.index(verb.page_token) + 1 if verb.page_token else 0
        size = page_size(verb.page_size)
        chosen = ids[start : start + size]
        return Page(tuple(known[one] for one in chosen), chosen[-1] if start + size < len(ids) else "")

    def _cancel_operation(self, tenant: str, verb: verbs.CancelOperation, _: Cancel) -> Operation:
        return self._operations.cancel(tenant, verb.operation)

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _tenant_bytes(self, tenant: str) -> int:
        reserved = sum(nbytes for (owner, _), nbytes in self._reserved.copy().items() if owner == tenant)
        return reserved + sum(one.nbytes for (owner, _), one in self._memories.copy().items() if owner == tenant)

    def _live(self) -> list[LiveMemory]:
        with self._lock:
            return list(self._memories.values())

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
