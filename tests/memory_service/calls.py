"""Raw calls to a service under test: any verb or bytes, with any token, over a plain gRPC channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import torch

from memory_service.errors import FotError
from memory_service.types.callers import Cancel, Identity
from memory_service.types.questions import AttendGroup, AttendOptions
from memory_service.types.scopes import Scope
from memory_service.types.specs import Fingerprint, MemorySpec
from memory_service.types.uploads import Chunk
from memory_service.verbs import Attend, Verb
from memory_service.wire.codec import RPCS, UPLOAD_CHUNKS
from memory_service.wire.statuses import read_error, write_error

MODEL = Fingerprint("tiny")
SPEC = MemorySpec(MODEL, layers=(1, 3), kv_heads=1, head_dim=4)


class Caller:
    """One channel to a service."""

    def __init__(self, address: str, token: str | None = None, credentials: grpc.ChannelCredentials | None = None):
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        if credentials:
            self.channel = grpc.secure_channel(address, credentials, options)
        else:
            self.channel = grpc.insecure_channel(address, options)
        self.metadata = [("authorization", f"Bearer {token}")] if token else []

    def ask(self, verb: Verb[Any], timeout_s: float | None = 20.0) -> Any:
        """The verb's answer. Raises the service's FotError."""
        rpc = RPCS[type(verb)]
        raw = self.send(rpc.path, rpc.encode_request(verb), rpc.streamed, timeout_s)
        return rpc.decode_pieces(raw) if rpc.streamed else rpc.decode_answer(raw)

    def send(self, path: str, request: bytes, streamed: bool = False, timeout_s: float | None = 20.0) -> Any:
        """The bytes that answer these bytes; a list if the answer is a stream."""
        method = (self.channel.unary_stream if streamed else self.channel.unary_unary)(path)
        with translated():
            answer = method(request, timeout=timeout_s, metadata=self.metadata)
            return list(answer) if streamed else answer

    def stream(self, path: str, requests: Iterable[bytes], timeout_s: float = 20.0) -> Any:
        """The bytes that answer a stream of messages."""
        with translated():
            return self.channel.stream_unary(path)(iter(requests), timeout=timeout_s, metadata=self.metadata)

    def upload(self, messages: Iterable[bytes]) -> Any:
        """Stream these messages as an upload."""
        return self.stream(UPLOAD_CHUNKS, messages)


@contextmanager
def calling(address: str, token: str | None = None, **given: Any) -> Iterator[Caller]:
    """A caller of the service at `address`."""
    caller = Caller(address, token, **given)
    try:
        yield caller
    finally:
        caller.channel.close()


@contextmanager
def translated() -> Iterator[None]:
    """Raise the service's own error instead of gRPC's."""
    try:
        yield
    except grpc.RpcError as error:
        raise read_error(error) from None


def outcome(call: Callable[[], Any]) -> str:
    """The name of the status the call ends with."""
    try:
        call()
    except FotError as error:
        return write_error(error).code.name
    return "OK"


def attend(rows: int = 1, **options: Any) -> Attend:
    """A call of one group over all documents."""
    return Attend("m", 1, (AttendGroup(Scope(), torch.zeros(1, rows, 4)),), AttendOptions(**options))


class SpyStore:
    """A store whose answer is a function of the verb, for what a real one does too well: be slow, fail, be huge."""

    def __init__(self, answer: Callable[[Verb[Any], Cancel], Any], estimate: int = 0):
        self.answer = answer
        self.scratch_bytes = estimate
        self.ready = True
        self.read_only_reason: str | None = None
        self.behind = False
        self.chunks: list[Chunk] = []

    def run(self, identity: Identity, verb: Verb[Any], cancel: Cancel | None = None) -> Any:
        return self.answer(verb, cancel or Cancel())

    def check_epoch(self, epoch: int, reads: bool) -> None:
        pass

    def write_chunk(self, identity: Identity, memory: str, upload: str, chunk: Chunk) -> None:
        self.chunks.append(chunk)

    def estimate(self, identity: Identity, verb: Verb[Any]) -> int:
        return self.scratch_bytes
