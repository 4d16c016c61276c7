"""Every place a memory can be, opened alike, and the async client worn as the sync one."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from memory_service import AsyncClient, AsyncMemory, AsyncSession, Client, Memory, Session, StoreOptions
from memory_service.client.connection import Opening
from memory_service.server.server import running
from memory_service.settings import ServerSettings
from memory_service.store.store import Store

QUIET = StoreOptions(background=False)
PLACES = ("memory", "directory", "grpc", "async directory", "async grpc")


@contextmanager
def serving(directory: Path | None, **settings: Any) -> Iterator[str]:
    """The target of a service in this process; over RAM without a directory."""
    given = {"listen": "127.0.0.1:0", "drain_grace_s": 1.0} | settings
    with Store.open(directory, QUIET) as store, running(store, ServerSettings(**given)) as address:
        yield address if address.startswith("unix:") else f"grpc://{address}"


@contextmanager
def client_at(place: str, directory: Path) -> Iterator[Client]:
    """A client of one of `PLACES`."""
    with ExitStack() as closing:
        target, options = str(directory / "data"), QUIET
        if place == "memory":
            target = ":memory:"
        if place.endswith("grpc"):
            target, options = closing.enter_context(serving(directory / "data")), None
        if place.startswith("async"):
            loop = closing.enter_context(asyncio.Runner())
            opened = worn(AsyncClient.open(target, options=options), loop)
            closing.callback(opened.close)
            yield cast(Client, opened)
        else:
            yield closing.enter_context(Client.open(target, options=options))


def worn(value: Any, loop: asyncio.Runner) -> Any:
    """An async thing as its sync twin: what it would make one wait for is waited for."""
    if isinstance(value, Opening):

        async def opened() -> Any:
            return await value

        return worn(loop.run(opened()), loop)
    if inspect.iscoroutine(value):
        return worn(loop.run(value), loop)
    if isinstance(value, AsyncIterator):

        async def listed() -> list[Any]:
            return [item async for item in value]

        return iter(loop.run(listed()))
    if isinstance(value, AsyncClient | AsyncMemory | AsyncSession):
        return _Worn(value, loop)
    return value


class _Worn:
    """Not a subclass of what it stands for: a verb that the async side lacks fails the test."""

    def __init__(self, inner: AsyncClient | AsyncMemory | AsyncSession, loop: asyncio.Runner):
        self._inner = inner
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found
        return lambda *args, **named: worn(found(*args, **named), self._loop)

    def __enter__(self) -> _Worn:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._inner).replace("Async", "")


SYNC_AND_ASYNC = ((Client, AsyncClient), (Memory, AsyncMemory), (Session, AsyncSession))
