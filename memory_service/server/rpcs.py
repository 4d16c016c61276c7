"""The rpcs: decode, ask the store in a thread, encode. Rules live in the store; errors become statuses in the guard."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterable, Callable
from typing import Any, Protocol, TypeVar

import grpc

from memory_service.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted
from memory_service.server.admission import Pool
from memory_service.server.auth import PageTokens
from memory_service.server.interceptors import Call
from memory_service.server.metrics import Metrics
from memory_service.settings import ServerSettings
from memory_service.types.callers import Cancel, Identity
from memory_service.types.listings import Page
from memory_service.types.uploads import Chunk
from memory_service.v1 import memory_pb2 as pb
from memory_service.verbs import (
    AbortUpload,
    AppendSessions,
    Attend,
    BeginUpload,
    CloseSession,
    CommitUpload,
    CreateMemory,
    DeleteDocument,
    DeleteMemory,
    GetUpload,
    ListDeleted,
    ListDocuments,
    ListMemories,
    ListOperations,
    ListSnapshots,
    OpenSession,
    PutDocument,
    ReleaseHold,
    RenewSession,
    Search,
    Verb,
)
from memory_service.wire.chunks import decode_chunk
from memory_service.wire.codec import RPCS, SERVICE, UPLOAD_CHUNKS, Rpc, answer_bytes

Answer = TypeVar("Answer")

PIPELINE = 4  # Chunks of one stream on their way to the disk.
CHUNK_BYTES = 1 << 20
_MESSAGE_MARGIN = 64 << 10  # Of an answer, beside its tensors.
# The last lets go those who fill the other pools.
_ATTEND = (Attend, Search, AppendSessions, OpenSession, RenewSession, CloseSession, ReleaseHold)
_INGEST = (PutDocument, BeginUpload, GetUpload, CommitUpload, AbortUpload, DeleteDocument, CreateMemory, DeleteMemory)
_LISTINGS = (ListMemories, ListDocuments, ListDeleted, ListOperations, ListSnapshots)


class AnyStore(Protocol):
    """What the service asks of a store, from many threads at once."""

    def run(self, identity: Identity, verb: Verb[Answer], cancel: Cancel | None = None) -> Answer: ...

    def write_chunk(self, identity: Identity, memory: str, upload: str, chunk: Chunk) -> None: ...

    def estimate(self, identity: Identity, verb: Verb[Any]) -> int: ...


class Service:
    """Handlers of every rpc of MemoryService. They take and give bytes: (de)serialising is done in the threads too."""

    def __init__(self, store: AnyStore, settings: ServerSettings, pages: PageTokens, metrics: Metrics):
        self._store = store
        self._settings = settings
        self._pages = pages
        self._metrics = metrics
        attend_threads = settings.attend_threads or os.cpu_count() or 1
        queue = settings.queue
        self._attend = Pool("attend", attend_threads, queue, settings.attend_bytes, metrics)
        self._ingest = Pool("ingest", settings.ingest_threads, queue, settings.ingest_bytes, metrics)
        self._upload = Pool(
            "upload", settings.upload_threads, settings.uploads * PIPELINE, settings.ingest_bytes, metrics
        )
        self._admin = Pool("admin", settings.admin_threads, queue, settings.attend_bytes, metrics)
        # Fetches hold their answer until a possibly slow reader took it; that must not keep others waiting.
        self._fetch = Pool("fetch", settings.admin_threads, queue, settings.attend_bytes, metrics)
        self._uploads = 0

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """For `grpc.aio.Server.add_generic_rpc_handlers`; they take a `Call` where gRPC's take a context."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            UPLOAD_CHUNKS.rpartition("/")[2]: grpc.stream_unary_rpc_method_handler(self._upload_chunks)
        }
        for kind, rpc in RPCS.items():
            pool = self._attend if kind in _ATTEND else self._ingest if kind in _INGEST else self._admin
            if rpc.streamed:
                handlers[rpc.name] = grpc.unary_stream_rpc_method_handler(self._streaming(rpc, self._fetch))
            else:
                handlers[rpc.name] = grpc.unary_unary_rpc_method_handler(self._unary(rpc, pool))
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def close(self) -> None:
        """Let running work finish and drop the rest."""
        for pool in (self._attend, self._ingest, self._upload, self._admin, self._fetch):
            pool.close()

    # --- One request -------------------------------------------------------------------------------------------------

    def _unary(self, rpc: Rpc, pool: Pool) -> Callable[[bytes, Call], Any]:
        async def answer(raw: bytes, call: Call) -> bytes:
            cancel = Cancel(self._timeout_s(call))

            def work() -> bytes:
                verb = self._decode(rpc, raw, call.identity, cancel)
                scratch_bytes = self._store.estimate(call.identity, verb)
                pool.reserve(scratch_bytes, cancel)
                try:
                    return self._encode(rpc, verb, call.identity, self._store.run(call.identity, verb, cancel))
                finally:
                    pool.release(scratch_bytes)

            return await _result(pool.submit(work, len(raw)), cancel)

        return answer

    def _streaming(self, rpc: Rpc, pool: Pool) -> Callable[[bytes, Call], Any]:
        async def answer(raw: bytes, call: Call) -> None:
            timeout_s = self._timeout_s(call)
            cancel = Cancel(timeout_s)
            held_bytes = 0

            def work() -> list[bytes]:
                nonlocal held_bytes
                verb = self._decode(rpc, raw, call.identity, cancel)
                pieces = list(rpc.encode_pieces(self._store.run(call.identity, verb, cancel)))
                answer_bytes = sum(map(len, pieces))
                pool.reserve(answer_bytes, cancel)
                held_bytes = answer_bytes
                return pieces

            future = pool.submit(work, len(raw))
            try:
                async with asyncio.timeout(timeout_s):
                    for piece in await _result(asyncio.shield(future), cancel):
                        await call.context.write(piece)
            except TimeoutError:
                raise DeadlineExceeded("the answer was not read in time; ask for fewer tokens at once") from None
            finally:
                # Held until it is sent, or until the thread that makes it for nobody is done.
                future.add_done_callback(lambda _: pool.release(held_bytes))

        return answer

    def _timeout_s(self, call: Call) -> float:
        given_s: Any = call.context.time_remaining()  # None without a deadline, which its type does not say.
        timeout_s = self._settings.default_timeout_s if given_s is None else given_s
        return float(min(timeout_s, self._settings.max_timeout_s))

    def _decode(self, rpc: Rpc, raw: bytes, identity: Identity, cancel: Cancel) -> Verb[Any]:
        cancel.check()  # It may have waited in the queue for longer than the caller did.
        verb = rpc.decode_request(raw)
        if isinstance(verb, _LISTINGS):
            return self._pages.opened(identity, verb)
        if isinstance(verb, Attend | Search):
            verb.options.check()  # Before its numbers are added up.
            self._check_answer_fits(answer_bytes(verb) + _MESSAGE_MARGIN)
        return verb

    def _encode(self, rpc: Rpc, verb: Verb[Any], identity: Identity, answer: Any) -> bytes:
        if isinstance(verb, _LISTINGS):
            answer = Page(answer.items, self._pages.seal(identity, verb, answer.next))
        encoded = rpc.encode_answer(answer)
        self._check_answer_fits(len(encoded))
        return encoded

    def _check_answer_fits(self, size_bytes: int) -> None:
        if size_bytes > self._settings.message_bytes:
            raise ResourceExhausted(
                f"the answer would have {size_bytes} bytes, more than the {self._settings.message_bytes} of a message; "
                "ask for fewer queries, a smaller top_k or a smaller page"
            )

    # --- Uploads -----------------------------------------------------------------------------------------------------

    async def _upload_chunks(self, messages: AsyncIterable[bytes], call: Call) -> bytes:
        if self._uploads >= self._settings.uploads:
            self._metrics.rejected("upload", "streams")
            raise ResourceExhausted(f"{self._uploads} uploads are under way; try again later", retry_after_s=1.0)
        self._uploads += 1
        stream = _UploadStream(self._store, self._upload, call.identity)
        try:
            await self._receive(messages, stream)
        finally:
            self._uploads -= 1
            self._metrics.uploaded(stream.bytes)
        return pb.UploadChunksResponse(chunks=stream.chunks, bytes=stream.bytes).SerializeToString()

    async def _receive(self, messages: AsyncIterable[bytes], stream: _UploadStream) -> None:
        idle_s = self._settings.stream_idle_s
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(idle_s) as idle:
                async for message in messages:
                    idle.reschedule(None)  # Waiting for the disk is not the sender's idleness.
                    await stream.write(message)
                    idle.reschedule(loop.time() + idle_s)
        except TimeoutError:
            raise DeadlineExceeded(f"no chunk came for {idle_s:g} s; ask what is missing and go on") from None
        finally:
            await stream.flush()


class _UploadStream:
    """Writes the chunks of one stream, a few at a time and in any order."""

    def __init__(self, store: AnyStore, pool: Pool, identity: Identity):
        self.chunks = 0
        self.bytes = 0
        self._store = store
        self._pool = pool
        self._identity = identity
        self._names = ("", "")
        self._writing: deque[asyncio.Future[int]] = deque()

    async def write(self, message: bytes) -> None:
        """Start writing a chunk; waits while the pipeline is full. Raises what an earlier chunk met."""
        if not self._names[1]:
            first = decode_chunk(message)
            self._names = (first.memory, first.upload)
            if not all(self._names):
                raise InvalidArgument("the first message of an upload stream must name the memory and the upload")
        self._writing.append(self._pool.submit(lambda: self._write(message), len(message)))
        if len(self._writing) >= PIPELINE:
            await self._settle_oldest()

    async def flush(self) -> None:
        """Wait for all chunks. Raises what one of them met."""
        settled = await asyncio.gather(*self._writing, return_exceptions=True)
        self._writing.clear()
        for found in settled:
            if isinstance(found, BaseException):
                raise found
            self.bytes += found
            self.chunks += 1

    async def _settle_oldest(self) -> None:
        self.bytes += await self._writing.popleft()
        self.chunks += 1

    def _write(self, message: bytes) -> int:
        memory, upload, chunk = decode_chunk(message)
        if (memory or self._names[0], upload or self._names[1]) != self._names:
            raise InvalidArgument("one stream carries one upload; open another for another")
        if not 0 < len(chunk.data) <= CHUNK_BYTES:
            raise InvalidArgument(f"a chunk must have 1 to {CHUNK_BYTES} bytes, got {len(chunk.data)}")
        self._store.write_chunk(self._identity, *self._names, chunk)
        return len(chunk.data)


async def _result(future: asyncio.Future[Answer], cancel: Cancel) -> Answer:
    """What a pool's thread answers; if the caller leaves, the thread is told to stop."""
    try:
        return await future
    except asyncio.CancelledError:
        cancel.cancel()
        raise
