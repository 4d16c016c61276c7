"""What does tasks, and the actor that it is in: what it tells while it works comes back at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeVar

from memory_service.errors import FotError

AT_ONCE = 2  # Tasks of a worker.
_TOLD = (FotError, OSError)

TaskIn = TypeVar("TaskIn", contravariant=True)
AnswerOut = TypeVar("AnswerOut", covariant=True)
Tell = Callable[[Any], None]


class Worker(Protocol[TaskIn, AnswerOut]):
    """Does tasks, two at a time in threads."""

    def work(self, task: TaskIn, tell: Tell) -> AnswerOut:
        """Raises FotError or OSError for what another worker could not do either."""


class WorkerActor:
    """A worker in a process of Ray's."""

    def __init__(self) -> None:
        self._worker: Worker[Any, Any] | None = None

    def open(self, make: Callable[[], Worker[Any, Any]], threads: int) -> Exception | None:
        """What opening failed with, as a value: raised, Ray would wrap it."""
        import torch

        torch.set_num_threads(threads)
        try:
            self._worker = make()
        except _TOLD as error:
            return error
        return None

    def work(self, task: Any) -> Iterator[list[tuple[str, Any]]]:
        """What the worker tells, as it tells it, and its answer or error last; what comes together goes together."""
        queue: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        Thread(target=self._work, args=(task, queue), daemon=True).start()
        kind = "told"
        while kind == "told":
            said = [queue.get()]
            with suppress(Empty):
                while said[-1][0] == "told":
                    said.append(queue.get_nowait())
            kind, what = said[-1]
            if kind == "broken":
                raise what
            yield said

    def _work(self, task: Any, said: SimpleQueue[tuple[str, Any]]) -> None:
        assert self._worker is not None
        try:
            said.put(("done", self._worker.work(task, lambda what: said.put(("told", what)))))
        except _TOLD as error:
            said.put(("failed", error))
        except BaseException as error:  # Raised in the thread that Ray watches.
            said.put(("broken", error))
