"""Both servers before a worker in this process, until a signal or while a block runs."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from memory_service.server import run
from model_worker.api.guard import Rules
from model_worker.api.http import http_app
from model_worker.api.keys import Keys
from model_worker.api.rpcs import Rpcs
from model_worker.api.server import Addresses, Server
from model_worker.api.traffic import Traffic
from model_worker.api.worker import Worker


def server_of(worker: Worker, keys: Keys, addresses: Addresses) -> Server:
    """HTTP and gRPC, where addresses are given. Raises InvalidArgument for addresses that must not be served."""
    rules = Rules(keys, Traffic(worker.limits.calls), worker.limits.timeout_s)
    return Server(http_app(worker, keys, rules.traffic), Rpcs(worker, rules.traffic), rules, addresses)


async def serve(
    worker: Worker, keys: Keys, addresses: Addresses, started: Callable[[Server], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then let calls under way finish. `started` is told once it listens."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = server_of(worker, keys, addresses)
    await server.start()
    try:
        if started:
            started(server)
        await stopping.wait()
    finally:
        await server.stop()


@contextmanager
def running(worker: Worker, keys: Keys, addresses: Addresses) -> Iterator[Server]:
    """A server in a thread of this process while the block runs."""
    started: Future[Server] = Future()
    control: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        try:
            server = server_of(worker, keys, addresses)
            await server.start()
        except BaseException as error:
            started.set_exception(error)
            return
        stopping = asyncio.Event()
        control.append((asyncio.get_running_loop(), stopping))
        started.set_result(server)
        await stopping.wait()
        await server.stop()

    thread = threading.Thread(target=lambda: run(main()), name="fot-api")
    thread.start()
    try:
        yield started.result()
    finally:
        for loop, stopping in control:
            loop.call_soon_threadsafe(stopping.set)
        thread.join()
