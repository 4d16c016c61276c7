"""What happens around every gRPC call: who is it, may they, is there room, how long may it take, what went wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc import aio

from memory_service.errors import DeadlineExceeded, FotError, Internal, PermissionDenied
from memory_service.process.logs import event
from memory_service.types.callers import Identity
from memory_service.wire.statuses import WireStatus, write_error
from model_worker.api.keys import Keys, check_role
from model_worker.api.policy import POLICY, SERVICE
from model_worker.api.traffic import Traffic

_OURS = f"/{SERVICE}/"
_OPEN = frozenset(f"/grpc.health.v1.Health/{name}" for name in ("Check", "List", "Watch"))
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
Metadata = Iterable[tuple[str, str | bytes]]


class Rules:
    """The rules of every call, whoever runs the server."""

    def __init__(self, keys: Keys, traffic: Traffic, timeout_s: float):
        self.keys = keys
        self.traffic = traffic
        self._timeout_s = timeout_s

    def admit(self, rpc: str, metadata: Metadata) -> Identity:
        """Who calls an rpc of ours. Raises Unauthenticated and PermissionDenied."""
        identity = self.keys.identity(str(next((value for key, value in metadata if key == "authorization"), "")))
        if rpc not in POLICY:
            raise PermissionDenied("nobody may call this; the worker has no rule for it")
        check_role(identity, POLICY[rpc])
        return identity

    def known(self, metadata: Metadata) -> None:
        """Raise Unauthenticated unless whoever calls has a key."""
        self.keys.identity(str(next((value for key, value in metadata if key == "authorization"), "")))

    @asynccontextmanager
    async def call(self, rpc: str, remaining_s: float | None) -> AsyncIterator[None]:
        """A call under way; all that goes wrong in it is raised as one of our errors, except being cancelled."""
        timeout_s = self._timeout_s if remaining_s is None else min(remaining_s, self._timeout_s)
        try:
            with self.traffic.call(rpc):
                try:
                    async with asyncio.timeout(timeout_s):
                        yield
                except TimeoutError:
                    raise DeadlineExceeded("the deadline passed before the work was done") from None
        except (FotError, aio.AbortError):
            raise
        except Exception as error:
            event(logging.ERROR, "a call failed", error, method=rpc)
            raise Internal("internal error; the worker's log says more") from None


def status_of(error: FotError) -> WireStatus:
    """How an error ends a call: the same details as the memory service's."""
    return write_error(error)


class Guard(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stub only
    """Applies the rules in a server of our own. Refusals are decided before the request is received."""

    def __init__(self, rules: Rules):
        self._rules = rules

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Give gRPC the handler of a call, wrapped."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method in _OPEN:
            return handler
        metadata: Any = handler_call_details.invocation_metadata or ()
        try:
            if method.startswith(_OURS):
                rpc = method.removeprefix(_OURS)
                return self._letting(rpc, handler, self._rules.admit(rpc, metadata))
            if method != _REFLECTION:
                raise PermissionDenied("nobody may call this; the worker has no rule for it")
            self._rules.known(metadata)
            return handler
        except FotError as error:
            event(logging.INFO, "refused", method=method, reason=error.code)
            return _refusing(error)

    def _letting(self, rpc: str, handler: Any, identity: Identity) -> Any:
        rules = self._rules

        async def answer(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            try:
                async with rules.call(rpc, context.time_remaining()):
                    return await bare(request, identity)
            except FotError as error:
                await context.abort(*status_of(error))

        async def stream(request: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                async with rules.call(rpc, context.time_remaining()):
                    responses = bare(request, identity)
                    try:
                        async for response in responses:
                            yield response
                    finally:
                        await responses.aclose()
            except FotError as error:
                await context.abort(*status_of(error))

        bare: Any
        if handler.response_streaming:
            bare, make, wrapped = handler.unary_stream, grpc.unary_stream_rpc_method_handler, stream
        elif handler.request_streaming:
            bare, make, wrapped = handler.stream_unary, grpc.stream_unary_rpc_method_handler, answer  # type: ignore[assignment]
        else:
            bare, make, wrapped = handler.unary_unary, grpc.unary_unary_rpc_method_handler, answer  # type: ignore[assignment]
        return make(wrapped, handler.request_deserializer, handler.response_serializer)


def _refusing(error: FotError) -> Any:
    async def refuse(requests: Any, context: aio.ServicerContext[Any, Any]) -> None:
        await context.abort(*status_of(error))

    # Whatever the call's kind: as a stream it is ended without reading what it sent.
    return grpc.stream_stream_rpc_method_handler(refuse)
