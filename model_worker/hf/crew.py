"""Threads that run passes side by side, each with its share of the cores: nobody waits for others at every product."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

from model_worker.attention.room import Room

T = TypeVar("T")
_MOST = 8  # Threads, each with working memory of its own; beyond, several of torch's threads share a pass.


class Crew:
    """Up to `threads` threads that share torch's evenly; a crew of one is the caller itself. Use `with`."""

    def __init__(self, threads: int):
        self._all = torch.get_num_threads()
        self.threads = max(1, min(threads, self._all, _MOST))
        self._share = self._all // self.threads
        self._pool: ThreadPoolExecutor | None = None
        self._own = threading.local()
        self._own.room = Room()
        self._begun = threading.Barrier(self.threads + 1)

    def submit(self, work: Callable[[Room], T]) -> Future[T]:
        """Start work that calls torch without gradients and writes to the room of its thread."""
        if self._pool is not None:
            return self._pool.submit(self._run, work)
        done: Future[T] = Future()
        done.set_result(self._run(work))
        return done

    def _run(self, work: Callable[[Room], T]) -> T:
        with torch.no_grad():  # A mode is a thread's own.
            room: Room = self._own.room
            return work(room)

    def __enter__(self) -> Self:
        if self.threads == 1:
            return self
        self._pool = ThreadPoolExecutor(self.threads, "fot-load", self._begin)
        try:
            for _ in range(self.threads):
                self._pool.submit(int)  # A thread starts with the first work it gets.
            self._begun.wait()
        except BaseException:
            self._begun.abort()
            self._pool.shutdown()
            torch.set_num_threads(self._all)
            raise
        # The caller has its share too: where it calls torch with more, OpenMP's threads wait for their next work
        # spinning, on the cores of the crew.
        torch.set_num_threads(self._share)
        return self

    def _begin(self) -> None:
        self._own.room = Room()
        torch.get_num_threads()  # A thread's first question gives it the process's number; only then can it be changed.
        torch.set_num_threads(self._share)
        self._begun.wait()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            # The number set last, wherever it was set, is what any new thread of the process begins with.
            torch.set_num_threads(self._all)
