"""What a worker is asked for and what it tells: requests in, events out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from memory_service import Memory
from model_worker.answering.answers import GREEDY, Sampling
from model_worker.recall.sources import TELLING, Sources, Telling
from model_worker.settings import Recall


@dataclass(frozen=True, slots=True)
class Request:
    """A text to go on from."""

    ids: tuple[int, ...]  # The prompt.
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()  # Texts that end the answer and are not part of it.
    recall: Recall = field(default_factory=Recall)  # What of the memory it may see, and how that is asked.
    telling: Telling = TELLING
    memory: Memory | None = None  # Where documents and the session are; None: the model's own.
    conversation: str | None = None  # Kept after the answer: a later prompt that begins with this text goes on from it.


class Finish(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # The model ended it, or a text of `stop` came.
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of an answer, whole characters only."""

    text: str
    tokens: int  # New since the piece before.


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of an answer."""

    reason: Finish
    prompt_tokens: int
    cached_tokens: int  # Of the prompt, taken over from the conversation.
    completion_tokens: int
    sources: Sources
    queued_s: float
    first_token_s: float  # From submission; nan if there was none.
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Instead of `Finished`: what went wrong."""

    error: Exception


Event = Text | Finished | Failed


class Ticket(Protocol):
    """A request that was taken."""

    def cancel(self) -> None:
        """End it; what it holds is freed, and `Finished` with CANCELLED is its last event. Harmless twice."""
        ...


class Generates(Protocol):
    """Whoever answers requests: one at a time or many at once."""

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        """Queue a request. `on_event` is called from the worker's thread and must not block.

        Raises InvalidArgument for a request that cannot be answered, ResourceExhausted if the queue is full.
        """
        ...
