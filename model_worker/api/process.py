"""Both servers before a worker in this process, until a signal or while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from memory_service.process.lifetime import in_thread, until_signal
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
    await until_signal(lambda: server_of(worker, keys, addresses), started)


@contextmanager
def running(worker: Worker, keys: Keys, addresses: Addresses) -> Iterator[Server]:
    """A server in a thread of this process while the block runs."""
    with in_thread(lambda: server_of(worker, keys, addresses), "fot-api") as server:
        yield server
