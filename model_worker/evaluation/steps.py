"""A study's steps: pieces of work that do not depend on each other, done here in turn, or elsewhere side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from model_worker.evaluation.subject import Subject, Tell

Say = Callable[[str], None]  # What is done now.
Work = Callable[[Sequence[Subject], Any, Say], Any]  # A step's outcome; a function that a name stands for.


class Each(Protocol):
    """Does every step of a study."""

    def __call__(self, work: Work, steps: Sequence[Any]) -> Iterator[Any]:
        """The outcomes, in the order of the steps. Raises what `work` raises."""


class InTurn:
    """One step after another, in this process."""

    def __init__(self, subjects: Sequence[Subject], tell: Tell):
        self._subjects, self._tell = subjects, tell

    def __call__(self, work: Work, steps: Sequence[Any]) -> Iterator[Any]:
        """Tells which step is done and what the step says."""
        for number, step in enumerate(steps):

            def say(words: str, number: int = number) -> None:
                self._tell(number, len(steps), words)

            yield work(self._subjects, step, say)
