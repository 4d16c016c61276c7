"""How long a server serves: until a signal, or in a thread of this process while a block runs."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import uvloop

from memory_service.process.notify import ALIVE, READY, STOPPING, Supervisor


class Serves(Protocol):
    """A server on an event loop."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


Served = TypeVar("Served", bound=Serves)


def run(main: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, on uvloop: it spares a small call a tenth of its time."""
    uvloop.run(main)


async def until_signal(make: Callable[[], Served], started: Callable[[Served], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then let calls under way finish. `started` is told once it listens.

    A supervisor that the environment names (see `notify`) is told too, and from then on that the loop still turns.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    supervisor = Supervisor.of(os.environ)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = make()
    await server.start()
    beating = asyncio.create_task(_beat(supervisor))
    try:
        if started:
            started(server)
        supervisor.tell(READY)
        await stopping.wait()
    finally:
        supervisor.tell(STOPPING)
        await server.stop()
        beating.cancel()
        with suppress(asyncio.CancelledError):
            await beating


async def _beat(supervisor: Supervisor) -> None:
    while supervisor.every_s is not None:
        supervisor.tell(ALIVE)
        await asyncio.sleep(supervisor.every_s)


@contextmanager
def in_thread(make: Callable[[], Served], name: str) -> Iterator[Served]:
    """A server on an event loop of its own, in a thread of this name, while the block runs."""
    started: Future[Served] = Future()
    control: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        try:
            server = make()
            await server.start()
        except BaseException as error:
            started.set_exception(error)
            return
        stopping = asyncio.Event()
        control.append((asyncio.get_running_loop(), stopping))
        started.set_result(server)
        await stopping.wait()
        await server.stop()

    thread = threading.Thread(target=lambda: run(main()), name=name)
    thread.start()
    try:
        yield started.result()
    finally:
        for loop, stopping in control:
            loop.call_soon_threadsafe(stopping.set)
        thread.join()
