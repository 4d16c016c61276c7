"""The steps of a call to a cluster, without I/O, as in `places.flows`: sync and async places share every rule."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from memory_service.errors import DeadlineExceeded, FotError, StaleMap
from memory_service.verbs import Verb

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """Ask one process; its answer or its error is the step's. Epoch 0: not as a client of a cluster."""

    address: str
    verb: Verb[Any]
    timeout_s: float
    epoch: int


@dataclass(frozen=True, slots=True, eq=False)
class Together:
    """Take several flows at the same time. Gives what each came to, in order: answers, and errors as values."""

    flows: Sequence[Flow[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class First:
    """Take one flow, and after a delay or its failure the other too: the first answer, else the first's error."""

    flow: Flow[Any]
    other: Flow[Any]
    delay_s: float


@dataclass(frozen=True, slots=True)
class NewMap:
    """Get a shard map with a higher epoch than this, if there is one; else the one that holds."""

    above: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait."""

    seconds: float


Step = Ask | Together | First | NewMap | Pause
Flow = Generator[Step, Any, Answer]


class Budget:
    """The time of a whole call."""

    def __init__(self, timeout_s: float, now: Callable[[], float] = time.monotonic):
        self.now = now
        self.until = now() + timeout_s

    @property
    def left_s(self) -> float:
        """What is left for the next step. Raises DeadlineExceeded if that is nothing."""
        left = self.until - self.now()
        if left <= 0:
            raise DeadlineExceeded("the deadline passed before the work was done; give more time or a smaller scope")
        return left


def outcomes(found: Sequence[Any]) -> Sequence[Any]:
    """What `Together` gave, unless one was told that the map is old: then all were routed by an old one."""
    for one in found:
        if isinstance(one, StaleMap):
            raise one
    return found


def answers(found: Sequence[Any]) -> list[Any]:
    """What `Together` gave, all of it answers. Raises the first error."""
    for one in outcomes(found):
        if isinstance(one, FotError):
            raise one
    return list(found)
