"""How the worker talks to a memory: every call in order, one round trip for a whole batch, errors never lost.

Over a network the calls run beside the model's own work, in one thread, so that local attention overlaps them and
what was appended is there when the next question arrives. In process they run at once: there is nothing to wait for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Generic, TypeVar

from torch import Tensor

from memory_service import Attended, AttendGroup, Memory, Scope, SessionScope, Unavailable
from memory_service.types import SessionAppend
from model_worker.settings import Recall

T = TypeVar("T")
_IN_FLIGHT = 8  # Appends on their way before the model waits for the oldest: bounds RAM.


class Promise(Generic[T]):
    """An answer that may still be on its way."""

    def __init__(self, get: Callable[[], T]):
        self._get = get

    def result(self) -> T:
        """Wait for the answer; raises what the call raised."""
        return self._get()


class Reader:
    """Appends to sessions and attends, in the order asked."""

    def __init__(self, memory: Memory):
        self.memory = memory
        self._thread = ThreadPoolExecutor(1, "fot-memory") if memory.connection.remote else None
        self._appends: deque[Future[None]] = deque()

    def append(self, appends: Sequence[SessionAppend]) -> None:
        """Send keys and values on their way; an error is raised by this or a later call."""
        if self._thread is None:
            self.memory.append_sessions(appends)
            return
        while len(self._appends) >= _IN_FLIGHT or (self._appends and self._appends[0].done()):
            self._appends.popleft().result()
        self._appends.append(self._thread.submit(self.memory.append_sessions, appends))

    def flush(self) -> None:
        """Wait until every append has arrived."""
        while self._appends:
            self._appends.popleft().result()

    def attend(
        self, layer: int, questions: Sequence[tuple[Scope, Tensor]], recall: Recall, scale: float
    ) -> Promise[tuple[Attended, ...]]:
        """Ask for attention of queries [H, n, D] over each scope; one round trip for all."""
        groups = [AttendGroup(scope, queries) for scope, queries in questions]
        options = recall.options(scale)

        def ask() -> tuple[Attended, ...]:
            return self.memory.attend_groups(layer, groups, options, timeout_s=recall.timeout_s)

        if self._thread is None:
            answers = ask()
            return Promise(lambda: _checked(answers, recall))
        future = self._thread.submit(ask)

        def wait() -> tuple[Attended, ...]:
            self.flush()  # An append that failed explains more than an answer without it.
            return _checked(future.result(), recall)

        return Promise(wait)

    def close(self) -> None:
        """Stop the thread; calls under way end first."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)


def whole_scope(documents: Scope, sessions: tuple[SessionScope, ...]) -> Scope | None:
    """Documents and a row's own sessions; None if there is nothing to see."""
    if not sessions:
        return None if documents.documents == () and not documents.sessions else documents
    return replace(documents, sessions=(*documents.sessions, *sessions))


def _checked(answers: tuple[Attended, ...], recall: Recall) -> tuple[Attended, ...]:
    """The answers, if enough of every scope was searched."""
    for answer in answers:
        if answer.coverage.fraction < recall.min_coverage:
            raise Unavailable(
                f"only {answer.coverage.searched:,} of {answer.coverage.in_scope:,} tokens in scope were searched, "
                f"less than min_coverage={recall.min_coverage:g}; try again when the service is whole, "
                "or accept less with Recall(min_coverage=…)"
            )
    return answers
