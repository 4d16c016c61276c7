"""A cluster as a place: takes the steps of a verb's way with threads, or on an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from memory_service.cluster.directory import Directory
from memory_service.cluster.options import ClusterOptions
from memory_service.cluster.router import Router
from memory_service.cluster.steps import Ask, First, Flow, NewMap, Pause, Step, Together
from memory_service.errors import FotError
from memory_service.places.place import closed
from memory_service.places.remote import AsyncRemotePlace, Line, RemotePlace
from memory_service.places.targets import Address
from memory_service.verbs import Verb

Answer = TypeVar("Answer")

# There may be another replica: a process that hangs must not cost the whole deadline. And what is written while one
# that is back is not yet tried again, it misses.
IMPATIENT = Line(patience_s=0.0, connect_ms=2000, reconnect_ms=200, alive_ms=10_000, answer_ms=5_000)
_THREADS = 64  # Of one depth: a call to many shards, of which each asks replicas.


class Lines:
    """Connections to the processes of a cluster, each opened when it is first asked. Thread-safe."""

    def __init__(self, address_of: Callable[[str], Address], line: Line = IMPATIENT):
        """`address_of` makes an authority the address to connect to."""
        self._address_of = address_of
        self._line = line
        self._lock = threading.Lock()
        self._places: dict[str, RemotePlace] = {}

    def place(self, authority: str) -> RemotePlace:
        """The connection to a process."""
        with self._lock:
            found = self._places.get(authority)
            if found is None:
                found = self._places[authority] = RemotePlace(self._address_of(authority), self._line)
            return found

    def close(self) -> None:
        """Close them all. Harmless twice."""
        with self._lock:
            for place in self._places.values():
                place.close()


class ClusterPlace:
    """A cluster, asked from any number of threads."""

    remote = True

    def __init__(self, directory: Directory, lines: Lines, options: ClusterOptions):
        self.target = directory.target
        self.router = Router(options)
        self._directory = directory
        self._lines = lines
        self._lock = threading.Lock()
        # A pool a depth: who waits for others never holds the thread they need.
        self._pools: list[ThreadPoolExecutor] = []
        self._open = True

    def run(self, verb: Verb[Answer], timeout_s: float) -> Answer:
        """Take the steps of the verb's way, blocking."""
        return self._drive(self.router.flow(verb, timeout_s), 0)

    def close(self) -> None:
        """Close the connections. Harmless twice."""
        self._open = False
        with self._lock:
            pools, self._pools = self._pools, []
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        self._lines.close()

    def _drive(self, flow: Flow[Answer], depth: int) -> Answer:
        try:
            step = next(flow)
            while True:
                try:
                    answer = self._take(step, depth)
                except FotError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]  # a flow's value is its answer

    def _take(self, step: Step, depth: int) -> Any:
        if not self._open:
            raise closed(self.target)
        match step:
            case Ask(address, verb, timeout_s, epoch):
                return self._lines.place(address).run(verb, timeout_s, epoch)
            case Together(flows):
                return self._together(flows, depth)
            case First():
                return self._first(step, depth)
            case NewMap(above):
                return self._directory.find(above)
            case Pause(seconds):
                time.sleep(seconds)
        return None

    def _together(self, flows: Sequence[Flow[Any]], depth: int) -> list[Any]:
        if not flows:
            return []
        pool = self._pool(depth) if len(flows) > 1 else None
        others = [pool.submit(self._value, flow, depth + 1) for flow in flows[1:]] if pool else []
        return [self._value(flows[0], depth + 1), *(one.result() for one in others)]

    def _value(self, flow: Flow[Any], depth: int) -> Any:
        try:
            return self._drive(flow, depth)
        except FotError as error:
            return error

    def _first(self, step: First, depth: int) -> Any:
        pool = self._pool(depth)
        first: Future[Any] = pool.submit(self._value, step.flow, depth + 1)
        wait([first], step.delay_s)
        if first.done() and not isinstance(first.result(), FotError):
            return first.result()
        other: Future[Any] = pool.submit(self._value, step.other, depth + 1)
        running = {first, other}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for one in done:
                if not isinstance(one.result(), FotError):
                    return one.result()
        raise other.result()

    def _pool(self, depth: int) -> ThreadPoolExecutor:
        with self._lock:
            if not self._open:
                raise closed(self.target)
            while len(self._pools) <= depth:
                name = f"fot-cluster-{len(self._pools)}"
                self._pools.append(ThreadPoolExecutor(_THREADS, thread_name_prefix=name))
            return self._pools[depth]


class AsyncClusterPlace:
    """A cluster, asked on one event loop."""

    def __init__(
        self, directory: Directory, lines: Lines, address_of: Callable[[str], Address], options: ClusterOptions
    ):
        """`lines` are the directory's own; they are closed with this."""
        self.target = directory.target
        self.router = Router(options)
        self._directory = directory
        self._lines = lines
        self._address_of = address_of
        self._places: dict[str, AsyncRemotePlace] = {}
        self._open = True

    async def run(self, verb: Verb[Answer], timeout_s: float) -> Answer:
        """Take the steps of the verb's way. Cancelling the task cancels the calls in the services too."""
        return await self._drive(self.router.flow(verb, timeout_s))

    async def close(self) -> None:
        """Close the connections. Harmless twice."""
        self._open = False
        for place in self._places.values():
            await place.close()
        await asyncio.to_thread(self._lines.close)

    async def _drive(self, flow: Flow[Answer]) -> Answer:
        try:
            step = next(flow)
            while True:
                try:
                    answer = await self._take(step)
                except FotError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]  # a flow's value is its answer

    async def _take(self, step: Step) -> Any:
        if not self._open:
            raise closed(self.target)
        match step:
            case Ask(address, verb, timeout_s, epoch):
                return await self._place(address).run(verb, timeout_s, epoch)
            case Together(flows):
                return list(await asyncio.gather(*(self._value(flow) for flow in flows)))
            case First():
                return await self._first(step)
            case NewMap(above):
                return await asyncio.to_thread(self._directory.find, above)
            case Pause(seconds):
                await asyncio.sleep(seconds)
        return None

    async def _value(self, flow: Flow[Any]) -> Any:
        try:
            return await self._drive(flow)
        except FotError as error:
            return error

    async def _first(self, step: First) -> Any:
        running = {asyncio.ensure_future(self._value(step.flow))}
        try:
            done, _ = await asyncio.wait(running, timeout=step.delay_s)
            for one in done:
                if not isinstance(one.result(), FotError):
                    return one.result()
            other = asyncio.ensure_future(self._value(step.other))
            running = {one for one in (*running, other) if not one.done()}
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    if not isinstance(one.result(), FotError):
                        return one.result()
            raise other.result()
        finally:
            for task in running:
                task.cancel()

    def _place(self, authority: str) -> AsyncRemotePlace:
        found = self._places.get(authority)
        if found is None:
            found = self._places[authority] = AsyncRemotePlace(self._address_of(authority), IMPATIENT)
        return found
