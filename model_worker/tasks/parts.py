"""Texts in parts that say what a model can know of them: what is stated, asked, and answered."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple


class Role(StrEnum):
    """What predicting a part's tokens would show."""

    PLAIN = "plain"  # Language, and the fixed words of a statement.
    NEW = "new"  # Drawn at random just here: nobody can predict it.
    REPEATED = "repeated"  # Stands a few tokens before.
    QUESTION = "question"
    ANSWER = "answer"  # Stands in memory, or wherever the question points.
    STOP = "stop"  # Tells that the answer is complete.
    COPIED = "copied"  # The rest of a long answer: its beginning has found the place.


class Part(NamedTuple):
    """A piece of text with one role."""

    text: str
    role: Role


def text_of(parts: Iterable[Part]) -> str:
    """The parts joined."""
    return "".join(part.text for part in parts)
