"""Memories that live as long as a measurement: made at any target under a name of their own, deleted afterwards."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from memory_service import DeadlineExceeded, FailedPrecondition, IndexPolicy, Memory, MemorySpec, NotFound, Unavailable
from memory_service.client import Client
from memory_service.client.connection import Connection
from memory_service.types.memories import MemoryInfo
from memory_service.types.operations import OperationState
from memory_service.types.sessions import SessionAppend

Kind = TypeVar("Kind", bound=Memory)

# Built when asked for, so that no background build takes the processor from what is measured.
INDEXED_WHEN_ASKED = 1 << 40


class Watched(Memory):
    """A memory that tells how many tokens its sessions were given."""

    def __init__(self, connection: Connection, info: MemoryInfo, on_tokens: Callable[[int], None] = lambda _: None):
        super().__init__(connection, info, owner=False)
        self._on_tokens = on_tokens
        self.filled_at = time.perf_counter()  # When the last tokens had arrived.

    def append_sessions(self, appends: Sequence[SessionAppend], *, timeout_s: float | None = None) -> None:
        """As `Memory`; tokens count when the last layer has them."""
        super().append_sessions(appends, timeout_s=timeout_s)
        self.filled_at = time.perf_counter()
        last = self.spec.layers[-1]
        if tokens := sum(append.keys.shape[2] for append in appends if last in append.layers):
            self._on_tokens(tokens)


@contextmanager
def fresh_memory(
    client: Client, spec: MemorySpec, study: str, made: Callable[[Connection, MemoryInfo], Kind]
) -> Iterator[Kind]:
    """A new memory with a name nobody else has, "passkey-3f8a…"; deleted at exit."""
    name = f"{study}-{secrets.token_hex(6)}"
    try:
        yield made(client.connection, client.connection.find_memory(name, spec))
    finally:
        # Where nobody answers any more, the error that is on its way says so.
        with suppress(Unavailable, DeadlineExceeded, NotFound):
            client.delete(name)


def built_index(memory: Memory) -> float:
    """Index a memory's documents and wait for it: seconds. Raises FailedPrecondition if there is nothing to index."""
    started = time.perf_counter()
    built = memory.wait(memory.start("index"))
    if built.state is not OperationState.DONE:
        raise FailedPrecondition(f"the index could not be built: {built.message}")
    if not memory.stats().indexed_tokens:
        raise FailedPrecondition(
            f"nothing was indexed: {built.message or 'too few tokens'}; give more --tokens, or --engine exact"
        )
    return time.perf_counter() - started


def index_policy(factory: str) -> IndexPolicy:
    """An index that is built when asked for."""
    return IndexPolicy(factory, INDEXED_WHEN_ASKED)
