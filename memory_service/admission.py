"""How much work is let in: threads, a bounded queue and a bounded number of bytes for each kind of call.

Whoever does not fit is turned away at once, with a hint when to come back; nobody waits at the door. So a service
asked for twice what it can do still does what it can.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from memory_service.errors import ResourceExhausted
from memory_service.metrics import Metrics
from memory_service.types import Cancel

Answer = TypeVar("Answer")

_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.05, 5.0
_PATIENCE_S = 0.05  # Between looks at whether a waiting call is still wanted.
_SMOOTHING = 0.1


class Pool:
    """Threads for one kind of call. `size_bytes` bounds the requests let in, and again the scratch they work with."""

    def __init__(self, name: str, threads: int, queue: int, size_bytes: int, metrics: Metrics):
        self.name = name
        self._threads = threads
        self._most_calls = threads + queue
        self._size_bytes = size_bytes
        self._metrics = metrics
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"fot-{name}")
        self._state = threading.Condition()
        self._calls = self._request_bytes = self._scratch_bytes = 0
        self._call_s = 0.001  # A moving average.
        metrics.watch_pool(name, lambda: self._calls, lambda: self._request_bytes + self._scratch_bytes)

    def submit(self, work: Callable[[], Answer], request_bytes: int) -> Future[Answer]:
        """Run `work` in a thread. Raises ResourceExhausted at once if the pool is full."""
        self._enter(request_bytes)
        try:
            future = self._executor.submit(self._timed, work)
        except RuntimeError:
            self._leave(request_bytes)
            raise
        future.add_done_callback(lambda _: self._leave(request_bytes))
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
        """Drop what waits and let what runs finish."""
        self._executor.shutdown(wait=True, cancel_futures=True)

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
            wait_s = self._calls / self._threads * self._call_s
        self._metrics.rejected(self.name, limit)
        raise ResourceExhausted(
            f"the service is full: {self._calls} {self.name} calls are under way; try again later",
            retry_after_s=min(max(wait_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S),
        )

    def _leave(self, request_bytes: int) -> None:
        with self._state:
            self._calls -= 1
            self._request_bytes -= request_bytes

    def _timed(self, work: Callable[[], Answer]) -> Answer:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self._call_s += _SMOOTHING * (time.perf_counter() - started - self._call_s)
