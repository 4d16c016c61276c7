"""One memory, for asyncio: the verbs of `Memory`, awaited.

    async with AsyncMemory.open(":memory:", spec=spec) as memory:
        await memory.put("doc-1", keys, values, metadata={"lang": "py"})
        answer = await memory.attend(layer, queries, top_k=32, where="lang = py")

Shape letters: L memory layers, H key/value heads, G query heads, T tokens, Q queries, D head_dim, K top_k.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self
from weakref import WeakValueDictionary

from torch import Tensor

from memory_service.client.arguments import (
    DENSE,
    TokenIds,
    describe,
    fresh_request_id,
    groups_of,
    options_of,
    put_of,
    put_timeout_s,
    word,
)
from memory_service.client.async_session import AsyncSession
from memory_service.client.connection import AsyncConnection, Opening
from memory_service.client.opening import TIMEOUT_S, open_async_place
from memory_service.client.scopes import ScopeLike, scope_of
from memory_service.filters import Where, filter_of
from memory_service.places.targets import Tls
from memory_service.settings import StoreOptions
from memory_service.types.answers import Attended, Fetched, TopTokens
from memory_service.types.conditions import Scalar
from memory_service.types.documents import DocumentInfo
from memory_service.types.listings import MAX_PAGE_SIZE
from memory_service.types.memories import MemoryInfo, Stats
from memory_service.types.operations import Operation, OperationKind
from memory_service.types.questions import AttendGroup, AttendOptions, Engine
from memory_service.types.sessions import SessionAppend
from memory_service.types.snapshots import Snapshot, fresh_snapshot_id
from memory_service.types.specs import DType, Fingerprint, MemorySpec
from memory_service.verbs import (
    AppendSessions,
    Attend,
    CancelOperation,
    CreateSnapshot,
    DeleteDocument,
    Fetch,
    GetDocument,
    GetMemory,
    GetOperation,
    GetStats,
    ListDocuments,
    ListOperations,
    ListSnapshots,
    OpenSession,
    RenewSession,
    Search,
    StartOperation,
)


class AsyncMemory:
    """One memory: documents to put, sessions to hold, attention over both."""

    def __init__(self, connection: AsyncConnection, info: MemoryInfo, owner: bool = True):
        """Made by `AsyncMemory.open` and `AsyncClient.memory`; `owner` closes the connection."""
        self.connection = connection
        self.name = info.name
        self.spec = info.spec
        self._owner = owner
        self._sessions: WeakValueDictionary[str, AsyncSession] = WeakValueDictionary()

    @classmethod
    def open(
        cls,
        target: str | Path,
        name: str = "default",
        spec: MemorySpec | None = None,
        *,
        token: str | Path | None = None,
        tls: Tls | None = None,
        insecure: bool = False,
        timeout_s: float = TIMEOUT_S,
        options: StoreOptions | None = None,
        on_missing: str | None = None,
    ) -> Opening[AsyncMemory]:
        """Open one memory of a place; with a spec it is created if there is none.

        `target`, `token` and the rest are those of `AsyncClient.open`. Raises NotFound without a spec, WrongModel or
        AlreadyExists if the memory exists with another one, Unavailable if nobody answers.
        """

        async def opened() -> AsyncMemory:
            place = await open_async_place(target, token, tls, insecure, options, spec is not None, on_missing)
            connection = AsyncConnection(place, timeout_s)
            try:
                return cls(connection, await connection.find_memory(name, spec))
            except BaseException:
                await connection.close()
                raise

        return Opening(opened)

    # --- documents ---

    async def put(
        self,
        document: str,
        keys: Tensor,
        values: Tensor,
        *,
        token_ids: TokenIds = None,
        metadata: Mapping[str, Scalar] | None = None,
        replace: bool = False,
        fingerprint: Fingerprint | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> DocumentInfo:
        """Store a document durably and all at once: keys and values [L, H, T, D], not rotated, token ids [T].

        Tensors are rounded to the memory's dtype. `fingerprint` is the encoding model's, by default the memory's.
        The same `request_id` commits once, however often it is sent. Raises AlreadyExists if the id is taken and not
        `replace`, WrongModel, InvalidArgument, QuotaExceeded. Costs one fsync, shared with other writers.
        """
        verb = put_of(
            self.name, self.spec, document, keys, values, token_ids, metadata, replace, fingerprint, request_id
        )
        return await self.connection.run(
            verb, put_timeout_s(verb, self.connection.timeout_s) if timeout_s is None else timeout_s
        )

    async def get(self, document: str) -> DocumentInfo:
        """What is known of a document. Raises NotFound."""
        return await self.connection.run(GetDocument(self.name, document))

    def documents(self, where: Where = None) -> AsyncIterator[DocumentInfo]:
        """Documents by id, those that match `where`; fetched a page at a time."""
        narrowed = filter_of(where)
        return self.connection.items(lambda page: ListDocuments(self.name, narrowed, MAX_PAGE_SIZE, page))

    async def delete(self, document: str, *, request_id: str | None = None) -> None:
        """Delete a document; durable on return. Raises NotFound."""
        await self.connection.run(DeleteDocument(self.name, document, request_id or fresh_request_id()))

    # --- sessions ---

    def session(self, lease_s: float = 600.0, *, fingerprint: Fingerprint | None = None) -> Opening[AsyncSession]:
        """Open a session: private to its owner, in RAM, gone `lease_s` after its last use."""

        async def opened() -> AsyncSession:
            verb = OpenSession(self.name, fingerprint or self.spec.fingerprint, lease_s)
            session = AsyncSession(self, await self.connection.run(verb))
            self._sessions[session.id] = session
            return session

        return Opening(opened)

    async def resume_session(self, session_id: str) -> AsyncSession:
        """Take up a session opened elsewhere by the same owner. Raises SessionExpired."""
        session = AsyncSession(self, await self.connection.run(RenewSession(self.name, session_id)))
        self._sessions[session.id] = session
        return session

    async def append_sessions(self, appends: Sequence[SessionAppend], *, timeout_s: float | None = None) -> None:
        """Append to several sessions in one round trip; `AsyncSession.piece` makes the parts."""
        for info in await self.connection.run(AppendSessions(self.name, tuple(appends)), timeout_s):
            if (session := self._sessions.get(info.id)) is not None:
                session.info = info

    # --- attention ---

    async def attend(
        self,
        layer: int,
        queries: Tensor,
        *,
        scope: ScopeLike = None,
        where: Where = None,
        top_k: int = 0,
        engine: str = Engine.AUTO,
        scale: float | None = None,
        logit_gap: float | None = None,
        search: Mapping[str, float] | None = None,
        tokens: bool = False,
        attribution: bool = False,
        measure: bool = False,
        output_dtype: str = DType.F32,
        timeout_s: float | None = None,
    ) -> Attended:
        """Attention of rotated queries [G, Q, D] over what `scope` and `where` leave visible, in one layer.

        `top_k` 0 is dense: softmax over every visible key; else over the k that score highest. The other options are
        those of `AttendOptions`, the scopes those of `scope_of`. Nothing visible gives lse -inf and output 0.
        """
        options = options_of(
            top_k=top_k,
            engine=engine,
            scale=scale,
            logit_gap=logit_gap,
            search=search,
            tokens=tokens,
            attribution=attribution,
            measure=measure,
            output_dtype=output_dtype,
        )
        answers = await self.attend_groups(layer, [(scope_of(scope, where), queries)], options, timeout_s=timeout_s)
        return answers[0]

    async def attend_groups(
        self,
        layer: int,
        groups: Iterable[AttendGroup | tuple[ScopeLike, Tensor]],
        options: AttendOptions = DENSE,
        *,
        timeout_s: float | None = None,
    ) -> tuple[Attended, ...]:
        """Attention of several (scope, queries) in one round trip; answers in the same order."""
        self.spec.layer_index(layer)
        options.check()
        return await self.connection.run(Attend(self.name, layer, groups_of(groups), options), timeout_s)

    async def search(
        self,
        layer: int,
        queries: Tensor,
        *,
        top_k: int,
        scope: ScopeLike = None,
        where: Where = None,
        engine: str = Engine.AUTO,
        search: Mapping[str, float] | None = None,
        timeout_s: float | None = None,
    ) -> TopTokens:
        """The tokens whose keys score highest against queries [G, Q, D], best first, without their values."""
        options = options_of(top_k=top_k, engine=engine, search=search)
        answers = await self.search_groups(layer, [(scope_of(scope, where), queries)], options, timeout_s=timeout_s)
        return answers[0]

    async def search_groups(
        self,
        layer: int,
        groups: Iterable[AttendGroup | tuple[ScopeLike, Tensor]],
        options: AttendOptions,
        *,
        timeout_s: float | None = None,
    ) -> tuple[TopTokens, ...]:
        """Search for several (scope, queries) in one round trip; answers in the same order."""
        self.spec.layer_index(layer)
        options.check()
        return await self.connection.run(Search(self.name, layer, groups_of(groups), options), timeout_s)

    async def fetch(
        self, source: str, layer: int, first_token: int = 0, tokens: int = 1, *, timeout_s: float | None = None
    ) -> Fetched:
        """Raw keys and values of consecutive tokens of a document, or of a session written "session:<id>"."""
        return await self.connection.run(Fetch(self.name, source, layer, first_token, tokens), timeout_s)

    # --- the memory itself ---

    async def info(self) -> MemoryInfo:
        """Name, spec, documents and tokens at this moment."""
        return await self.connection.run(GetMemory(self.name))

    async def stats(self) -> Stats:
        """Figures of storage, residency, index and sessions."""
        return await self.connection.run(GetStats(self.name))

    async def start(self, kind: str, *, factory: str = "") -> Operation:
        """Start "index", "compact" or "verify" in the background; if it runs already, that one is returned.

        With a `factory`, "index" indexes everything anew with it; the memory's policy stays as it is.
        """
        return await self.connection.run(StartOperation(self.name, word(OperationKind, kind), factory))

    async def snapshot(self, snapshot: str | None = None) -> Operation:
        """Begin to keep the memory as it is at this moment, as a snapshot; by default named by the time.

        `wait` for the operation: once it is DONE, the snapshot exists; its `snapshot` is the id. Raises AlreadyExists
        if the id names another snapshot, FailedPrecondition in RAM, QuotaExceeded.
        """
        return await self.connection.run(CreateSnapshot(self.name, snapshot or fresh_snapshot_id()))

    def snapshots(self) -> AsyncIterator[Snapshot]:
        """Snapshots of the memory of this name, by id."""
        return self.connection.items(lambda page: ListSnapshots(self.name, MAX_PAGE_SIZE, page))

    async def operation(self, operation_id: str) -> Operation:
        """How far an operation has come."""
        return await self.connection.run(GetOperation(operation_id))

    def operations(self) -> AsyncIterator[Operation]:
        """This memory's operations, newest first."""
        return self.connection.items(lambda page: ListOperations(self.name, MAX_PAGE_SIZE, page))

    async def cancel(self, operation: Operation) -> Operation:
        """Ask an operation to stop."""
        return await self.connection.run(CancelOperation(operation.id))

    async def wait(self, operation: Operation, timeout_s: float | None = None) -> Operation:
        """Wait until an operation has ended, well or not; look at its `state`. Raises DeadlineExceeded."""
        return await self.connection.wait(operation, timeout_s)

    async def close(self) -> None:
        """Let go of the connection or of the directory, if this memory was opened by itself. Harmless twice."""
        if self._owner:
            await self.connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} at {self.connection.target} ({describe(self.spec)})>"
