"""A service elsewhere, asked over gRPC: the two places that take the steps of `flows`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc import aio

from memory_service.errors import FotError, InvalidArgument, Unavailable
from memory_service.places.flows import Call, Connect, Flow, Send, Sleep, Step, flow_of
from memory_service.places.payload import missing_chunks
from memory_service.places.place import closed
from memory_service.places.targets import Address, Tls
from memory_service.verbs import Verb
from memory_service.wire.chunks import encode_chunk
from memory_service.wire.codec import EPOCH, RPCS, UPLOAD_CHUNKS, Rpc
from memory_service.wire.statuses import read_error

Answer = TypeVar("Answer")

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
MESSAGE_BYTES = 8 << 20
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    # A service that restarts is back within seconds; gRPC's own pauses grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Two clients with different tokens must not share a connection that one of them closes.
    ("grpc.use_local_subchannel_pool", 1),
    # Retries are decided here, by verb.
    ("grpc.enable_retries", 0),
]

# Without a reason of the service's own, these come from gRPC: nobody listens, a server that stops cancels what came too
# late to drain, a stream was reset.
BROKEN_LINE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)


@dataclass(frozen=True, slots=True)
class Line:
    """How long to wait for a service that does not answer."""

    patience_s: float | None = None  # A call that may be repeated is, for so long; None: as flows says.
    connect_ms: int = 100  # For one attempt to connect.
    reconnect_ms: int = 1000  # Between attempts, at most.
    alive_ms: int = 60_000  # After so long without a word a peer is asked whether it is there; …
    answer_ms: int = 20_000  # … and taken for gone if it does not say so.


PATIENT = Line()


class RemotePlace:
    """A service, asked from any number of threads over one connection."""

    remote = True

    def __init__(self, address: Address, line: Line = PATIENT):
        self.target = address.target
        self._patience_s = line.patience_s
        self._metadata = _metadata(address)
        options = _options(address, line)
        if address.tls is None:
            self._channel = grpc.insecure_channel(address.authority, options)
        else:
            self._channel = grpc.secure_channel(address.authority, _credentials(address.tls), options)
        # Bytes in, bytes out: the codec makes and reads them.
        self._methods = {verb: self._method(rpc) for verb, rpc in RPCS.items()}
        self._upload = self._channel.stream_unary(UPLOAD_CHUNKS, None, None)
        self._health = self._channel.unary_unary(HEALTH_CHECK, None, None)
        self._open = True

    def run(self, verb: Verb[Answer], timeout_s: float, epoch: int = 0) -> Answer:
        """Take the steps of the verb's flow, blocking. `epoch` is the shard map's by which the call came here."""
        flow: Flow[Answer] = flow_of(verb, timeout_s, patience_s=self._patience_s)
        metadata = _routed(self._metadata, epoch)
        try:
            step = next(flow)
            while True:
                try:
                    answer = self._take(step, metadata)
                except FotError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]  # a flow's value is its answer

    def close(self) -> None:
        """Close the connection. Harmless twice."""
        self._open = False
        self._channel.close()

    def _take(self, step: Step, metadata: tuple[tuple[str, str], ...]) -> Any:
        if not self._open:
            raise closed(self.target)
        try:
            match step:
                case Call(verb, timeout_s):
                    rpc, method = RPCS[type(verb)], self._methods[type(verb)]
                    answer = method(rpc.encode_request(verb), timeout=timeout_s, metadata=metadata)
                    return rpc.decode_pieces(answer) if rpc.streamed else rpc.decode_answer(answer)
                case Send(timeout_s=timeout_s):
                    self._upload(_chunks(step), timeout=timeout_s, metadata=metadata)
                case Connect(timeout_s):
                    self._health(b"", timeout=timeout_s, wait_for_ready=True)
                case Sleep(seconds):
                    time.sleep(seconds)
        except grpc.RpcError as error:
            if isinstance(step, Connect):
                return _answered(error, self.target)
            raise self._read_error(error) from None

    def _read_error(self, error: grpc.RpcError) -> FotError:
        return read_rpc_error(error, self.target) if self._open else closed(self.target)

    def _method(self, rpc: Rpc) -> Any:
        return (self._channel.unary_stream if rpc.streamed else self._channel.unary_unary)(rpc.path, None, None)


class AsyncRemotePlace:
    """A service, asked on one event loop over one connection."""

    def __init__(self, address: Address, line: Line = PATIENT):
        self.target = address.target
        self._patience_s = line.patience_s
        self._metadata = _metadata(address)
        options = _options(address, line)
        if address.tls is None:
            self._channel = aio.insecure_channel(address.authority, options)
        else:
            self._channel = aio.secure_channel(address.authority, _credentials(address.tls), options)
        self._methods = {verb: self._method(rpc) for verb, rpc in RPCS.items()}
        self._upload = self._channel.stream_unary(UPLOAD_CHUNKS, None, None)
        self._health = self._channel.unary_unary(HEALTH_CHECK, None, None)
        self._open = True

    async def run(self, verb: Verb[Answer], timeout_s: float, epoch: int = 0) -> Answer:
        """Take the steps of the verb's flow. Cancelling the task cancels the call in the service too."""
        flow: Flow[Answer] = flow_of(verb, timeout_s, patience_s=self._patience_s)
        metadata = _routed(self._metadata, epoch)
        try:
            step = next(flow)
            while True:
                try:
                    answer = await self._take(step, metadata)
                except FotError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]  # a flow's value is its answer

    async def close(self) -> None:
        """Close the connection. Harmless twice."""
        self._open = False
        await self._channel.close(None)

    async def _take(self, step: Step, metadata: tuple[tuple[str, str], ...]) -> Any:
        if not self._open:
            raise closed(self.target)
        try:
            match step:
                case Call(verb, timeout_s):
                    rpc, method = RPCS[type(verb)], self._methods[type(verb)]
                    call = method(rpc.encode_request(verb), timeout=timeout_s, metadata=metadata)
                    if rpc.streamed:
                        return rpc.decode_pieces([piece async for piece in call])
                    return rpc.decode_answer(await call)
                case Send(timeout_s=timeout_s):
                    await self._upload(_off_loop(_chunks(step)), timeout=timeout_s, metadata=metadata)
                case Connect(timeout_s):
                    await self._health(b"", timeout=timeout_s, wait_for_ready=True)
                case Sleep(seconds):
                    await asyncio.sleep(seconds)
        except grpc.RpcError as error:
            if isinstance(step, Connect):
                return _answered(error, self.target)
            raise self._read_error(error) from None

    def _read_error(self, error: grpc.RpcError) -> FotError:
        return read_rpc_error(error, self.target) if self._open else closed(self.target)

    def _method(self, rpc: Rpc) -> Any:
        return (self._channel.unary_stream if rpc.streamed else self._channel.unary_unary)(rpc.path, None, None)


def read_rpc_error(error: grpc.RpcError, target: str) -> FotError:
    """The error as the service raised it, or what stands between the service and here."""
    trailers: Any = error.trailing_metadata() or ()
    if error.code() not in BROKEN_LINE or any(key == "grpc-status-details-bin" for key, _ in trailers):
        return read_error(error)
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        why = (error.details() or "no answer").rpartition(": ")[2]
        return Unavailable(f"the service at {target} cannot be reached ({why}); is it running there?")
    return Unavailable(f"the service at {target} broke off the call ({error.details() or 'no reason given'})")


def _answered(error: grpc.RpcError, target: str) -> None:
    """Any answer to the health check will do, even that there is none; Unavailable if nobody gave one."""
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise Unavailable(f"the service at {target} cannot be reached; is it running there?")


def _chunks(step: Send) -> Iterator[bytes]:
    """The messages of an upload stream; only the first names the upload."""
    memory, upload = step.memory, step.upload.id
    for chunk in missing_chunks(step.document, step.upload):
        yield encode_chunk(memory, upload, chunk)
        memory = upload = ""


async def _off_loop(messages: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Make each message in a thread: checksums and copies would hold up the loop."""
    while (message := await asyncio.to_thread(next, messages, None)) is not None:
        yield message


def _metadata(address: Address) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {address.token}"),) if address.token else ()


def _routed(metadata: tuple[tuple[str, str], ...], epoch: int) -> tuple[tuple[str, str], ...]:
    return (*metadata, (EPOCH, str(epoch))) if epoch else metadata


def _options(address: Address, line: Line) -> list[tuple[str, Any]]:
    options = [
        *CHANNEL_OPTIONS,
        ("grpc.min_reconnect_backoff_ms", line.connect_ms),  # It also bounds one attempt, and nothing else does.
        ("grpc.max_reconnect_backoff_ms", line.reconnect_ms),
        ("grpc.keepalive_time_ms", line.alive_ms),
        ("grpc.keepalive_timeout_ms", line.answer_ms),
        ("grpc.http2.ping_timeout_ms", line.answer_ms),  # A minute unless told, whatever the line before says.
    ]
    renamed = address.tls.server_name if address.tls else None
    return [*options, ("grpc.ssl_target_name_override", renamed)] if renamed else options


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(_read(tls.ca), _read(tls.key), _read(tls.certificate))


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgument(f"the TLS file {path} cannot be read: {error.strerror}") from None
