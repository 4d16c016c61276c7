"""Conversations: what a row held when its answer ended, kept for the prompt that goes on from there."""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from memory_service import Memory
from model_worker.decoder.state import State
from model_worker.recall.line import manner_of
from model_worker.serving.job import Job
from model_worker.serving.requests import Request

Name = tuple[Memory | None, str]  # A memory is its own identity: nothing is ever shared between two.


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A conversation between two prompts."""

    state: State
    manner: Hashable  # What it saw of its memory, and how.
    bytes: int
    until: float


class Conversations:
    """The last conversations, each under its memory and name. For one thread."""

    def __init__(self, most: int, keep_s: float, let_go: Callable[[Callable[[], None], Memory | None], None]):
        """`let_go` frees what nobody will go on from."""
        self._most = most
        self._keep_s = keep_s
        self._let_go = let_go
        self._kept: OrderedDict[Name, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Of their windows."""
        return sum(one.bytes for one in self._kept.values())

    def take(self, job: Job) -> tuple[State, int] | None:
        """The state the prompt goes on from and how many of its tokens it holds; it is the caller's then.

        Only the newest tokens can be taken back, those still in the window: enough where an answer's last words come
        back as other tokens. A prompt that parts earlier, or sees other documents, begins from scratch.
        """
        name = _name(job)
        kept = None if name is None else self._kept.pop(name, None)
        if kept is None:
            return None
        same = _shared(kept.state.lines[0].ids, job.request.ids)
        if kept.manner == _manner(job.request) and kept.state.rewind(same):
            return kept.state, same
        self._let_go(kept.state.close, job.memory)
        return None

    def keep(self, job: Job, state: State, size: int) -> bool:
        """Keep what an answered request held; false if it names no conversation."""
        name = _name(job)
        if name is None or not self._most:
            return False
        if (before := self._kept.pop(name, None)) is not None:
            self._let_go(before.state.close, job.memory)
        self._kept[name] = Kept(state, _manner(job.request), size, time.monotonic() + self._keep_s)
        while len(self._kept) > self._most:
            self.drop_oldest()
        return True

    def drop_oldest(self) -> bool:
        """Let go of the one that was used least lately; false if there is none."""
        if not self._kept:
            return False
        (memory, _), kept = self._kept.popitem(last=False)
        self._let_go(kept.state.close, memory)
        return True

    def expire(self) -> float | None:
        """Let go of those whose time is over; seconds until the next one's is."""
        now = time.monotonic()
        while self._kept:
            left = next(iter(self._kept.values())).until - now
            if left > 0:
                return left
            self.drop_oldest()
        return None

    def clear(self) -> None:
        """Let go of all."""
        while self.drop_oldest():
            pass


def _name(job: Job) -> Name | None:
    conversation = job.request.conversation
    return None if conversation is None else (job.memory, conversation)


def _manner(request: Request) -> Hashable:
    scope = request.recall.scope()
    return (scope, manner_of(request.recall))


def _shared(held: array[int], ids: Sequence[int]) -> int:
    """How many tokens both begin with, less what must be fed for the next one to be known."""
    most = min(len(held), len(ids) - 1)
    given = array("q", ids[:most])
    if held[:most] == given:
        return most
    pairs: Iterator[tuple[int, int]] = zip(held, given, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
