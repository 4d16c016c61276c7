"""A place: whatever answers verbs."""

from __future__ import annotations

from typing import Protocol, TypeVar

from memory_service.errors import FailedPrecondition
from memory_service.verbs import Verb

Answer = TypeVar("Answer")


class Place(Protocol):
    """Answers verbs."""

    @property
    def target(self) -> str: ...

    @property
    def remote(self) -> bool:
        """Whether calls cross a network."""
        ...

    def run(self, verb: Verb[Answer], timeout_s: float) -> Answer:
        """Raises `FotError`; DeadlineExceeded after `timeout_s`."""
        ...

    def close(self) -> None: ...


class AsyncPlace(Protocol):
    """Answers verbs without blocking the event loop."""

    @property
    def target(self) -> str: ...

    async def run(self, verb: Verb[Answer], timeout_s: float) -> Answer:
        """Raises `FotError`; DeadlineExceeded after `timeout_s`. Cancelling the task stops the work."""
        ...

    async def close(self) -> None: ...


def closed(target: str) -> FailedPrecondition:
    """The error of using what was closed."""
    return FailedPrecondition(f"the connection to {target} was closed; open it again")
