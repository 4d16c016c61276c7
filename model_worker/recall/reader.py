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

from memory_service import (
    Attended,
    AttendGroup,
    DeadlineExceeded,
    FotError,
    Memory,
    Scope,
    SessionScope,
    Unavailable,
)
from memory_service.types.sessions import SessionAppend
from model_worker.settings import Recall

T = TypeVar("T")
_IN_FLIGHT = 8  # Appends on their way before the model waits for the oldest: bounds RAM.
_NOBODYS = (Unavailable, DeadlineExceeded)  # Errors of the service, not of a question: all questions share them.


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

    def append_apart(self, appends: Sequence[SessionAppend], on_error: Callable[[int, FotError], None]) -> None:
        """The same for rows that have nothing to do with each other: `on_error` hears which appends failed, and why.

        It has heard of all of them before an answer asked for later is there.
        """

        def send() -> None:
            try:
                self.memory.append_sessions(appends)
            except FotError as error:
                for number, one in enumerate(appends):
                    # What was appended before is skipped, so sending all of them again is safe.
                    if failed := error if _is_shared(error, appends) else self._failed(one):
                        on_error(number, failed)

        if self._thread is None:
            send()
            return
        while len(self._appends) >= _IN_FLIGHT or (self._appends and self._appends[0].done()):
            self._appends.popleft().result()
        self._appends.append(self._thread.submit(send))

    def _failed(self, append: SessionAppend) -> FotError | None:
        try:
            self.memory.append_sessions([append])
        except FotError as error:
            return error
        return None

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

        found = self._soon(ask)

        def wait() -> tuple[Attended, ...]:
            self.flush()  # An append that failed explains more than an answer without it.
            answers = found.result()
            for answer in answers:
                if (missing := uncovered(answer, recall)) is not None:
                    raise missing
            return answers

        return Promise(wait)

    def attend_apart(
        self, layer: int, questions: Sequence[tuple[Scope, Tensor]], recall: Recall, scale: float
    ) -> Promise[tuple[Attended | FotError, ...]]:
        """The same for questions that have nothing to do with each other: one that cannot be answered gets its error.

        Coverage is the caller's to check. One round trip; after an error of a question, one more for each.
        """
        groups = [AttendGroup(scope, queries) for scope, queries in questions]
        options = recall.options(scale)

        def ask() -> tuple[Attended | FotError, ...]:
            try:
                return self.memory.attend_groups(layer, groups, options, timeout_s=recall.timeout_s)
            except FotError as error:
                if _is_shared(error, groups):
                    return (error,) * len(groups)
                return tuple(alone(group) for group in groups)

        def alone(group: AttendGroup) -> Attended | FotError:
            try:
                return self.memory.attend_groups(layer, [group], options, timeout_s=recall.timeout_s)[0]
            except FotError as error:
                return error

        return self._soon(ask)

    def _soon(self, call: Callable[[], T]) -> Promise[T]:
        """Do it after all that was asked before: in the thread where there is one, else now."""
        if self._thread is None:
            found = call()
            return Promise(lambda: found)
        return Promise(self._thread.submit(call).result)

    def close(self) -> None:
        """Stop the thread; calls under way end first."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)


def whole_scope(documents: Scope, sessions: tuple[SessionScope, ...]) -> Scope | None:
    """Documents and a row's own sessions; None if there is nothing to see."""
    if not sessions:
        return None if documents.documents == () and not documents.sessions else documents
    return replace(documents, sessions=(*documents.sessions, *sessions))


def uncovered(answer: Attended, recall: Recall) -> Unavailable | None:
    """What to say of an answer for which less of the scope was searched than asked for."""
    if answer.coverage.fraction >= recall.min_coverage:
        return None
    return Unavailable(
        f"only {answer.coverage.searched:,} of {answer.coverage.in_scope:,} tokens in scope were searched, "
        f"less than min_coverage={recall.min_coverage:g}; try again when the service is whole, "
        "or accept less with Recall(min_coverage=…)"
    )


def _is_shared(error: FotError, questions: Sequence[object]) -> bool:
    """Whether an error is one of all questions: asking each again would find it again, and take as long."""
    return len(questions) == 1 or isinstance(error, _NOBODYS)
