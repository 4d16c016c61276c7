"""Threads that run passes side by side: with one core's arithmetic each, nobody waits for the others at every product."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

from model_worker.attention.room import Room

T = TypeVar("T")


class Crew:
    """`threads` that share torch's threads evenly; one of them is the caller's own. Use `with`."""

    def __init__(self, threads: int):
        self._all = torch.get_num_threads()
        self.threads = max(1, min(threads, self._all))
        self._own = Room()
        self._rooms = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        # Modes are a thread's own; buffers made in one cannot be written to in the other.
        self._inference = torch.is_inference_mode_enabled()

    def submit(self, work: Callable[[Room], T]) -> Future[T]:
        """Start work that calls torch without gradients and writes to a room of its thread."""
        if self._pool is None:
            done: Future[T] = Future()
            done.set_result(work(self._own))
            return done
        return self._pool.submit(self._run, work)

    def _run(self, work: Callable[[Room], T]) -> T:
        with torch.inference_mode(self._inference), torch.no_grad():
            return work(self._rooms.room)

    def __enter__(self) -> Self:
        if self.threads > 1:
            begun = threading.Barrier(self.threads + 1)
            self._pool = ThreadPoolExecutor(self.threads, "fot-load", self._begin, (begun,))
            for _ in range(self.threads):
                self._pool.submit(lambda: None)
            begun.wait()
            # How many threads a new thread of the process begins with is the number set last, wherever it was set.
            torch.set_num_threads(self._all)
        return self

    def _begin(self, begun: threading.Barrier) -> None:
        self._rooms.room = Room()
        torch.get_num_threads()  # The first question sets the process's number; only then it can be changed.
        torch.set_num_threads(self._all // self.threads)
        begun.wait()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
