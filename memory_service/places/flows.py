"""What a call does over a line that may break: retries, pieces, resumed uploads. Steps only, no I/O.

A flow is a generator: it yields the next step, and gets the step's answer or its error thrown in. So the sync and the
async place share every rule and differ only in how they take a step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from memory_service.errors import DeadlineExceeded, FotError, NotFound, ResourceExhausted, Unavailable
from memory_service.pieces import Piece, cut_appends, cut_attend, join_appends, join_attended, join_top_tokens
from memory_service.places.payload import check_shape, check_token_ids
from memory_service.types.documents import Document, DocumentInfo
from memory_service.types.uploads import Upload
from memory_service.verbs import (
    AbortUpload,
    AppendSessions,
    Attend,
    BeginUpload,
    CommitUpload,
    GetMemory,
    GetUpload,
    PutDocument,
    Search,
    Verb,
)

Answer = TypeVar("Answer")

UNARY_BYTES = 1 << 20  # Keys and values of a document small enough for one message.
PATIENCE_S = 10.0  # How long an unreachable service is tried: longer than it takes to restart.
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
ABORT_S = 2.0
DRAINING = "DRAINING"  # Reason of an Unavailable that was answered before any work began.


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Send one verb and give back its answer."""

    verb: Verb[Any]
    timeout_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Send:
    """Stream the chunks of a document that an upload misses."""

    memory: str
    upload: Upload
    document: Document
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Connect:
    """Wait until the service can be reached."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait."""

    seconds: float


Step = Call | Send | Connect | Sleep
Flow = Generator[Step, Any, Answer]


def flow_of(
    verb: Verb[Answer],
    timeout_s: float,
    now: Callable[[], float] = time.monotonic,
    patience_s: float | None = None,
) -> Flow[Answer]:
    """The steps that answer a verb over the wire, within `timeout_s`.

    A service that cannot be reached is tried for `patience_s`; None: PATIENCE_S.
    """
    patience_s = PATIENCE_S if patience_s is None else patience_s
    return cast(Flow[Answer], _flow_of(verb, _Budget(timeout_s, now, patience_s)))


def _flow_of(verb: Verb[Any], budget: _Budget) -> Flow[Any]:
    match verb:
        case PutDocument():
            return _put(verb, budget)
        case Attend():
            return _in_pieces(*cut_attend(verb), join_attended, budget)
        case Search():
            return _in_pieces(*cut_attend(verb), join_top_tokens, budget)
        case AppendSessions():
            return _in_pieces(*cut_appends(verb), join_appends, budget)
        case _:
            return _call(verb, budget)


def _call(verb: Verb[Answer], budget: _Budget) -> Flow[Answer]:
    """Ask once, and again where that can do no harm and may help."""
    patience = _Patience(budget)
    while True:
        try:
            if not verb.repeatable:
                # It cannot be sent twice, so first make sure that somebody listens.
                yield from _connect(budget)
            return cast(Answer, (yield Call(verb, budget.left_s)))
        except (Unavailable, ResourceExhausted) as error:
            harmless = verb.repeatable or error.code == DRAINING
            pause = patience.pause_s(error) if harmless else None
            if pause is None:
                raise
        yield Sleep(pause)


def _connect(budget: _Budget) -> Flow[None]:
    """Wait until the service can be reached. Raises Unavailable when patience ends."""
    patience = _Patience(budget)
    while True:
        try:
            yield Connect(min(LONGEST_PAUSE_S, budget.left_s))
            return
        except Unavailable as error:
            pause = patience.pause_s(error)
            if pause is None:
                raise
        yield Sleep(pause)


def _in_pieces(
    messages: list[list[Piece]],
    verbs: Sequence[Verb[Answer]],
    join: Callable[[list[list[Piece]], Sequence[Answer]], Answer],
    budget: _Budget,
) -> Flow[Answer]:
    """Ask piece by piece and join the answers."""
    answers = []
    for verb in verbs:
        answers.append((yield from _call(verb, budget)))
    return answers[0] if len(answers) == 1 else join(messages, answers)


def _put(verb: PutDocument, budget: _Budget) -> Flow[DocumentInfo]:
    """Store a document: small in one message, else begin, stream, commit, going on where the line broke."""
    document = verb.document
    check_token_ids(document.token_ids)
    if document.keys.nbytes + document.values.nbytes <= UNARY_BYTES:
        return (yield from _call(verb, budget))
    # The bytes alone would not tell swapped dimensions.
    check_shape(document, (yield from _call(GetMemory(verb.memory), budget)).spec)
    begin = BeginUpload(
        verb.memory,
        document.id,
        document.tokens,
        verb.fingerprint,
        document.metadata,
        verb.conflict,
        verb.request_id,
        verb.generation,
    )
    upload = yield from _call(begin, budget)
    patience = _Patience(budget)
    try:
        while upload.committed is None:
            try:
                if upload.missing:
                    yield Send(verb.memory, upload, document, budget.left_s)
                return (yield from _call(CommitUpload(verb.memory, upload.id), budget))
            except (Unavailable, ResourceExhausted, NotFound) as error:
                pause = patience.pause_s(error)
                if pause is None:
                    raise
            yield Sleep(pause)
            before = _missing(upload)
            upload = yield from _resumed(begin, upload, budget)
            if _missing(upload) < before:
                patience = _Patience(budget)
    except (Unavailable, NotFound):
        raise
    except FotError:
        yield from _abort(verb.memory, upload)
        raise
    return upload.committed


def _resumed(begin: BeginUpload, upload: Upload, budget: _Budget) -> Flow[Upload]:
    """The upload as the service knows it now; one that it forgot, for it restarted, begins again."""
    try:
        return (yield from _call(GetUpload(begin.memory, upload.id), budget))
    except NotFound:
        return (yield from _call(begin, budget))


def _abort(memory: str, upload: Upload) -> Flow[None]:
    """Free the room of an upload that failed, if that is quick: its lease does so anyway."""
    try:
        yield Call(AbortUpload(memory, upload.id), ABORT_S)
    except FotError:
        return


def _missing(upload: Upload) -> int:
    return sum(chunks for _, _, chunks in upload.missing)


class _Budget:
    """The time of a whole call."""

    def __init__(self, timeout_s: float, now: Callable[[], float], patience_s: float):
        self.now = now
        self.patience_s = patience_s
        self.until = now() + timeout_s

    @property
    def left_s(self) -> float:
        """What is left for the next step. Raises DeadlineExceeded if that is nothing."""
        left = self.until - self.now()
        if left <= 0:
            raise DeadlineExceeded("the deadline passed before the work was done; give more time or a smaller scope")
        return left


class _Patience:
    """How long to wait between attempts, and when to give up."""

    def __init__(self, budget: _Budget):
        self._budget = budget
        self._attempts = 0
        self._first_failure = float("inf")

    def pause_s(self, error: FotError) -> float | None:
        """Seconds until the next attempt, or None if another would not help or would come too late."""
        now = self._budget.now()
        self._first_failure = min(self._first_failure, now)
        until = self._budget.until
        if isinstance(error, ResourceExhausted):
            if error.retry_after_s is None:
                return None
            pause = error.retry_after_s
        else:
            if isinstance(error, Unavailable) and error.code not in (Unavailable.reason, DRAINING):
                return None
            until = min(until, self._first_failure + self._budget.patience_s)
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self._attempts)
        self._attempts += 1
        pause *= random.uniform(0.8, 1.2)
        return pause if now + pause < until else None
