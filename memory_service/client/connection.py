"""A place with a default time for every call, and listings read page by page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Generic, Protocol, TypeVar

from memory_service.client.arguments import check_same_spec
from memory_service.errors import DeadlineExceeded, NotFound
from memory_service.places.place import AsyncPlace, Place
from memory_service.types.listings import Page
from memory_service.types.memories import MemoryInfo
from memory_service.types.operations import Operation, OperationState
from memory_service.types.specs import MemorySpec
from memory_service.verbs import CreateMemory, GetMemory, GetOperation, Verb

Answer = TypeVar("Answer")
Item = TypeVar("Item")

POLL_S = 0.2


class Connection:
    """What `Client`, `Memory` and `Session` share."""

    def __init__(self, place: Place, timeout_s: float):
        self.place = place
        self.timeout_s = timeout_s

    @property
    def remote(self) -> bool:
        """Whether calls cross a network."""
        return self.place.remote

    @property
    def target(self) -> str:
        """Where this is."""
        return self.place.target

    def run(self, verb: Verb[Answer], timeout_s: float | None = None) -> Answer:
        """Ask one verb. Raises `FotError`."""
        return self.place.run(verb, self.timeout_s if timeout_s is None else timeout_s)

    def items(self, ask: Callable[[str], Verb[Page[Item]]]) -> Iterator[Item]:
        """All items of a listing; `ask` makes the verb of a page token."""
        page = self.run(ask(""))
        yield from page.items
        while page.next:
            page = self.run(ask(page.next))
            yield from page.items

    def wait(self, operation: Operation, timeout_s: float | None) -> Operation:
        """The operation once it has ended. Raises DeadlineExceeded."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while operation.state is OperationState.RUNNING:
            if until is not None and time.monotonic() > until:
                raise _still_runs(operation)
            time.sleep(POLL_S)
            operation = self.run(GetOperation(operation.id))
        return operation

    def find_memory(self, name: str, spec: MemorySpec | None) -> MemoryInfo:
        """A memory; with a spec it is created if there is none. Only creating needs an admin's token."""
        try:
            info = self.run(GetMemory(name))
        except NotFound:
            if spec is None:
                raise
            info = self.run(CreateMemory(name, spec))
        if spec is not None:
            check_same_spec(info, spec)
        return info

    def close(self) -> None:
        """Let go of the connection or of the directory. Harmless twice."""
        self.place.close()


class AsyncConnection:
    """`Connection` for asyncio."""

    def __init__(self, place: AsyncPlace, timeout_s: float):
        self.place = place
        self.timeout_s = timeout_s

    @property
    def target(self) -> str:
        """Where this is."""
        return self.place.target

    async def run(self, verb: Verb[Answer], timeout_s: float | None = None) -> Answer:
        """Ask one verb. Raises `FotError`."""
        return await self.place.run(verb, self.timeout_s if timeout_s is None else timeout_s)

    async def items(self, ask: Callable[[str], Verb[Page[Item]]]) -> AsyncIterator[Item]:
        """All items of a listing; `ask` makes the verb of a page token."""
        page = await self.run(ask(""))
        for item in page.items:
            yield item
        while page.next:
            page = await self.run(ask(page.next))
            for item in page.items:
                yield item

    async def wait(self, operation: Operation, timeout_s: float | None) -> Operation:
        """The operation once it has ended. Raises DeadlineExceeded."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while operation.state is OperationState.RUNNING:
            if until is not None and time.monotonic() > until:
                raise _still_runs(operation)
            await asyncio.sleep(POLL_S)
            operation = await self.run(GetOperation(operation.id))
        return operation

    async def find_memory(self, name: str, spec: MemorySpec | None) -> MemoryInfo:
        """A memory; with a spec it is created if there is none. Only creating needs an admin's token."""
        try:
            info = await self.run(GetMemory(name))
        except NotFound:
            if spec is None:
                raise
            info = await self.run(CreateMemory(name, spec))
        if spec is not None:
            check_same_spec(info, spec)
        return info

    async def close(self) -> None:
        """Let go of the connection or of the directory. Harmless twice."""
        await self.place.close()


def _still_runs(operation: Operation) -> DeadlineExceeded:
    return DeadlineExceeded(f"the {operation.kind} of memory {operation.memory!r} still runs")


class _Closing(Protocol):
    async def close(self) -> None: ...


Opened = TypeVar("Opened", bound=_Closing)


class Opening(AbstractAsyncContextManager[Opened], Generic[Opened]):
    """Something being opened: `await` it to keep it, or use it in `async with` to have it closed."""

    def __init__(self, opening: Callable[[], Awaitable[Opened]]):
        self._opening = opening
        self._opened: Opened | None = None

    def __await__(self) -> Generator[object, None, Opened]:
        return self._opening().__await__()

    async def __aenter__(self) -> Opened:
        self._opened = await self._opening()
        return self._opened

    async def __aexit__(self, *error: object) -> None:
        assert self._opened is not None
        await self._opened.close()
