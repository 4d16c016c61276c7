"""How much work is let in: threads, a bounded queue and a bounded number of bytes for each kind of call.

Whoever does not fit is turned away at once, with a hint when to come back; nobody waits at the door. So a service
asked for twice what it can do still does what it can.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from memory_service.errors import ResourceExhausted
from memory_service.server.metrics import Metrics
from memory_service.types.callers import Cancel

Answer = TypeVar("Answer")

_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.05, 5.0
_PATIENCE_S = 0.05  # Between looks at whether a call that waits for scratch is still wanted.
_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    work: Callable[[], Any]
    request_bytes: int
    future: asyncio.Future[Any]


class Pool:
    """Threads for one kind of call. `size_bytes` bounds the requests let in, and again the scratch they work with.

    Not concurrent.futures: its futures cost a tenth of a small call's time.
    """

    def __init__(self, name: str, threads: int, queue: int, size_bytes: int, metrics: Metrics):
        self.name = name
        self._most_calls = threads + queue
        self._size_bytes = size_bytes
        self._metrics = metrics
        self._state = threading.Condition(threading.Lock())
        self._calls = self._request_bytes = self._scratch_bytes = 0
        self._call_s = 0.001  # A moving average.
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"fot-{name}-{n}", daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        metrics.watch_pool(name, lambda: self._calls, lambda: self._request_bytes + self._scratch_bytes)

    def submit(self, work: Callable[[], Answer], request_bytes: int) -> asyncio.Future[Answer]:
        """Run `work` in a thread; called on an event loop. Raises ResourceExhausted at once if the pool is full.

        Cancelling the future drops work that has not begun, and forgets the answer of work that has.
        """
        self._enter(request_bytes)
        future = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(work, request_bytes, future))
        return future

    def reserve(self, scratch_bytes: int, cancel: Cancel) -> None:
        """Wait, in the pool's thread, until this much scratch is free; then `release` it.

        Raises ResourceExhausted if there is never so much, and what `cancel` raises if the call is no longer wanted.
        """
        if scratch_bytes > self._size_bytes:
            raise ResourceExhausted(
                f"this call needs {scratch_bytes} bytes of working memory, the service gives {self._size_bytes}; "
                "ask for fewer queries or tokens at once"
            )
        with self._state:
            while self._scratch_bytes + scratch_bytes > self._size_bytes:
                cancel.check()
                self._state.wait(_PATIENCE_S)
            self._scratch_bytes += scratch_bytes

    def release(self, scratch_bytes: int) -> None:
        """Give scratch back."""
        with self._state:
            self._scratch_bytes -= scratch_bytes
            self._state.notify_all()

    def close(self) -> None:
        """Let what was submitted finish, and the threads end."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _enter(self, request_bytes: int) -> None:
        with self._state:
            if self._calls >= self._most_calls:
                limit = "calls"
            elif self._request_bytes + request_bytes > self._size_bytes:
                limit = "bytes"
            else:
                self._calls += 1
                self._request_bytes += request_bytes
                return
            calls = self._calls
        self._metrics.rejected(self.name, limit)
        wait_s = calls / len(self._threads) * self._call_s
        raise ResourceExhausted(
            f"the service is full: {calls} {self.name} calls are under way; try again later",
            retry_after_s=min(max(wait_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S),
        )

    def _work(self) -> None:
        while job := self._jobs.get():
            answer, error = None, None
            if not job.future.cancelled():
                started = time.perf_counter()
                try:
                    answer = job.work()
                except BaseException as raised:
                    error = raised
                self._call_s += _SMOOTHING * (time.perf_counter() - started - self._call_s)
            with self._state:
                self._calls -= 1
                self._request_bytes -= job.request_bytes
            # A loop that is closed has nobody left who waits.
            with suppress(RuntimeError):
                job.future.get_loop().call_soon_threadsafe(_settle, job.future, answer, error)
            # An idle thread must not keep the last request and its answer alive.
            del job, answer, error


def _settle(future: asyncio.Future[Any], answer: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(answer)
    else:
        future.set_exception(error)
