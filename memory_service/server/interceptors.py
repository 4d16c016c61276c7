"""What happens around every call: who is it, may they, what went wrong, how long did it take."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from grpc import aio

from memory_service.errors import (
    FotError,
    Internal,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from memory_service.process.logs import event
from memory_service.server.auth import EVERYONE, TokenFile
from memory_service.server.metrics import Metrics
from memory_service.types.callers import Identity, Role
from memory_service.wire.codec import EPOCH, SERVICE
from memory_service.wire.statuses import write_error

# By whether requests and responses are streams: a handler's function, and what makes such a handler.
_KINDS: Mapping[tuple[bool, bool], Callable[[Any], tuple[Any, Any]]] = {
    (False, False): lambda handler: (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
    (False, True): lambda handler: (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
    (True, False): lambda handler: (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
    (True, True): lambda handler: (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
}
OPEN = None  # In POLICY: needs no token.
DRAINING = "DRAINING"
_OURS = f"/{SERVICE}/"

# The least role of every rpc. One that has no row is refused to everybody.
POLICY: Mapping[str, Role | None] = {
    "/grpc.health.v1.Health/Check": OPEN,
    "/grpc.health.v1.Health/List": OPEN,
    "/grpc.health.v1.Health/Watch": OPEN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.READ,
    _OURS + "CreateMemory": Role.ADMIN,
    _OURS + "GetMemory": Role.READ,
    _OURS + "ListMemories": Role.READ,
    _OURS + "DeleteMemory": Role.ADMIN,
    _OURS + "PutDocument": Role.WRITE,
    _OURS + "BeginUpload": Role.WRITE,
    _OURS + "UploadChunks": Role.WRITE,
    _OURS + "GetUpload": Role.WRITE,
    _OURS + "CommitUpload": Role.WRITE,
    _OURS + "AbortUpload": Role.WRITE,
    _OURS + "GetDocument": Role.READ,
    _OURS + "ListDocuments": Role.READ,
    _OURS + "DeleteDocument": Role.WRITE,
    _OURS + "ListDeleted": Role.WRITE,
    _OURS + "OpenSession": Role.READ,
    _OURS + "AppendSessions": Role.READ,
    _OURS + "RenewSession": Role.READ,
    _OURS + "CloseSession": Role.READ,
    _OURS + "Attend": Role.READ,
    _OURS + "Search": Role.READ,
    _OURS + "Fetch": Role.READ,
    _OURS + "GetStats": Role.READ,
    _OURS + "StartOperation": Role.ADMIN,
    _OURS + "GetOperation": Role.READ,
    _OURS + "ListOperations": Role.READ,
    _OURS + "CancelOperation": Role.ADMIN,
    _OURS + "CreateSnapshot": Role.ADMIN,
    _OURS + "ReleaseHold": Role.ADMIN,
    _OURS + "GetSnapshot": Role.READ,
    _OURS + "ListSnapshots": Role.READ,
    _OURS + "DeleteSnapshot": Role.ADMIN,
    _OURS + "RestoreSnapshot": Role.ADMIN,
    _OURS + "GetShardMap": Role.READ,
    _OURS + "SetShardMap": Role.ADMIN,
    _OURS + "MarkBehind": Role.WRITE,
}


_READS = frozenset(
    _OURS + name
    for name in ("GetMemory", "ListMemories", "GetDocument", "ListDocuments", "Attend", "Search", "Fetch", "GetStats")
    # Of what may lack writes no snapshot is taken, and none is restored beside it.
    + ("CreateSnapshot", "RestoreSnapshot")
)
_CHANGES = frozenset(
    _OURS + name for name in ("PutDocument", "CommitUpload", "DeleteDocument", "CreateMemory", "DeleteMemory")
)
_SET_MAP = _OURS + "SetShardMap"


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler of ours gets instead of the bare context."""

    identity: Identity
    context: aio.ServicerContext[Any, Any]


class Guard(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stub only
    """Lets a call through to its handler, or ends it with the status of the error that stopped it.

    Refusals are decided before the request is received, so strangers cannot make the service read anything.
    """

    def __init__(
        self,
        tokens: TokenFile | None,
        most_calls: int,
        metrics: Metrics,
        check_epoch: Callable[[int, bool], None] = lambda epoch, reads: None,
    ):
        """`check_epoch` is told the epoch a call carries, and whether it only reads; it raises what refuses it."""
        self.draining = False
        self._check_epoch = check_epoch
        self._changes = _Changes()
        self._tokens = tokens
        self._most_calls = most_calls
        self.metrics = metrics
        self.calls = 0  # Under way.

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Give gRPC the handler of a call, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler  # gRPC answers UNIMPLEMENTED.
        method = handler_call_details.method
        try:
            identity = self._admit(method, handler_call_details.invocation_metadata)
        except FotError as error:
            event(logging.INFO, "refused", method=method, reason=error.code)
            return self._refusing(method, error)
        epoch = next((value for key, value in handler_call_details.invocation_metadata or () if key == EPOCH), "")
        return self._letting(method, handler, identity, str(epoch))

    def _admit(self, method: str, metadata: Any) -> Identity:
        if method not in POLICY:
            raise PermissionDenied("nobody may call this; the service has no rule for it")
        needed = POLICY[method]
        if needed is OPEN:
            return EVERYONE
        identity = EVERYONE if self._tokens is None else self._identify(self._tokens, metadata)
        if identity.role.rank < needed.rank:
            raise PermissionDenied(f"this needs a token with the role {needed}, yours has {identity.role}")
        if self.draining:
            raise Unavailable("the service is stopping; try another, or this one again soon", reason=DRAINING)
        if self.calls >= self._most_calls:
            self.metrics.rejected("all", "calls")
            raise ResourceExhausted(f"the service is full: {self.calls} calls are under way", retry_after_s=1.0)
        return identity

    @staticmethod
    def _identify(tokens: TokenFile, metadata: Any) -> Identity:
        header = next((value for key, value in metadata if key == "authorization"), "")
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("this service needs a token: send 'authorization: Bearer fot_…'")
        try:
            return tokens.identity(token.strip())
        except Unauthenticated:
            raise
        except Exception as error:
            event(logging.ERROR, "the token file cannot be read", error)
            raise Unauthenticated("the service cannot read its tokens; nobody is let in until it can") from None

    def _letting(
        self, method: str, handler: grpc.RpcMethodHandler[Any, Any], identity: Identity, epoch: str
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler with its errors turned into statuses; of the same kind as the bare one."""
        bare, make = _KINDS[handler.request_streaming, handler.response_streaming](handler)
        ours = method.startswith(_OURS)

        async def answer(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            async with _Watched(self, method, context):
                if epoch:
                    self._check_epoch(_number(epoch), method in _READS)
                if method not in _CHANGES:
                    answer = await bare(request, Call(identity, context) if ours else context)
                    if method == _SET_MAP:
                        await self._changes.settle()
                    return answer
                # Nothing is awaited since the epoch was checked: a map told after that waits for this change.
                with self._changes.under_way():
                    return await bare(request, Call(identity, context))

        async def generate(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            async with _Watched(self, method, context):
                async for response in bare(request, context):
                    yield response

        wrapped = answer if ours or not inspect.isasyncgenfunction(bare) else generate
        return make(wrapped, handler.request_deserializer, handler.response_serializer)  # type: ignore[no-any-return]

    def _refusing(self, method: str, error: FotError) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(requests: Any, context: aio.ServicerContext[Any, Any]) -> None:
            async with _Watched(self, method, context):
                raise error

        # Whatever the call's kind: as a stream it is ended without reading what it sent.
        return grpc.stream_stream_rpc_method_handler(refuse)


def _number(epoch: str) -> int:
    if not epoch.isdecimal() or len(epoch) > 18:
        raise InvalidArgument(f"{EPOCH} must be a whole number")
    return int(epoch)


class _Changes:
    """Changes of documents under way, so that one can wait for all that began before."""

    def __init__(self) -> None:
        self._era = 0
        self._count: Counter[int] = Counter()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        era = self._era
        self._count[era] += 1
        try:
            yield
        finally:
            self._count[era] -= 1
            if not self._count[era]:
                del self._count[era]

    async def settle(self) -> None:
        """Return once all changes that are under way now have ended."""
        self._era += 1
        era = self._era
        while any(one < era for one in self._count):
            await asyncio.sleep(0.002)


class _Watched:
    """Counts and times one call, and turns what it raises into a status."""

    __slots__ = ("_context", "_guard", "_method", "_started")

    def __init__(self, guard: Guard, method: str, context: aio.ServicerContext[Any, Any]):
        self._guard = guard
        self._method = method
        self._context = context

    async def __aenter__(self) -> None:
        self._started = time.perf_counter()
        self._guard.calls += 1

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.calls -= 1
        status, code = None, "OK"
        match error:
            case None:
                pass
            case asyncio.CancelledError():
                code = "CANCELLED"
            case aio.AbortError():
                code = self._context.code().name
            case FotError():
                status = write_error(error)
            case Exception():
                event(logging.ERROR, "a call failed", error, method=self._method)
                status = write_error(Internal("internal error; the service's log says more"))
        elapsed_s = time.perf_counter() - self._started
        self._guard.metrics.observe_call(self._method, status.code.name if status else code)(elapsed_s)
        if status:
            await self._context.abort(*status)
