"""Keys with labels, as people would write them down: "The door code of the harbour is 4711."."""

from __future__ import annotations

import functools
from importlib import resources
from random import Random

from memory_service.errors import InvalidArgument
from model_worker.tasks.parts import Part, Role

PLAIN = "pass key"
KINDS = (
    PLAIN,
    "access code",
    "secret number",
    "door code",
    "magic number",
    "password",
    "code word",
    "vault key",
    "token",
    "pin",
    "serial number",
    "key",
)
HELD_OUT_WORDS = 250  # The last of words.txt, which training never sees in a label.


@functools.cache
def words(held_out: bool = False) -> tuple[str, ...]:
    """English words of three to nine letters: the labels of training, or those kept for evaluation.

    The list is the commonest words of the texts of `corpus` (Python 3.11), shuffled, and must never change: weights are
    trained with it, and what was kept from them is told by it.
    """
    every = resources.files("model_worker.tasks").joinpath("words.txt").read_text("utf-8").split()
    return tuple(every[-HELD_OUT_WORDS:] if held_out else every[:-HELD_OUT_WORDS])


class Labels:
    """Draws labels, no two of them equal: one set for everything that is read together."""

    def __init__(self, rng: Random, *, held_out: bool = False, close: float = 0.0):
        """`close`: share of labels that take up the words of an earlier one, as in "key of X" and "token of X"."""
        self._rng = rng
        self._words = words(held_out)
        self._held_out = held_out
        self._close = close
        self._drawn: set[str] = set()
        self._taken: list[str] = []  # The words of labels so far.

    def plain(self) -> str:
        """The Landmark prompt's own label; once, or InvalidArgument."""
        if PLAIN in self._drawn:
            raise InvalidArgument(f"the label {PLAIN!r} is taken")
        self._drawn.add(PLAIN)
        return PLAIN

    def draw(self) -> str:
        """A new label. Held-out labels always have a word of their own, and none is the plain one."""
        while True:
            label = self._label()
            if label not in self._drawn and label != PLAIN:
                self._drawn.add(label)
                return label

    def _label(self) -> str:
        rng = self._rng
        kind = PLAIN if rng.random() < 0.5 else rng.choice(KINDS)
        form = rng.random()
        word = rng.choice(self._words)
        if rng.random() < 0.4:
            word += " " + rng.choice(self._words)
        if self._close:  # Else nothing is drawn: what models were trained on must stay what it was.
            word = self._near(word)
        if form < 0.4:
            return f"{kind} of {word}"
        if form < 0.7:
            return f"{kind} for {word}"
        if form < 0.95 or self._held_out:
            return f"{word} {kind}"
        return kind

    def _near(self, word: str) -> str:
        """The words of an earlier label, or a word more or less than they are, in place of these."""
        rng = self._rng
        if self._taken and rng.random() < self._close:
            near = rng.choice(self._taken)
            first, _, second = near.partition(" ")
            if rng.random() < 0.3:
                near = second or f"{rng.choice(self._words)} {first}"
            return near
        self._taken.append(word)
        return word


def number(rng: Random) -> str:
    """A key: mostly five digits, else as the Landmark script draws it or one to eight digits of any kind."""
    form = rng.random()
    if form < 0.6:
        return str(rng.randint(10_000, 99_999))
    if form < 0.85:
        return str(rng.randint(1, 49_999))
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 8)))


def stated(label: str, key: str, rng: Random) -> list[Part]:
    """A line that gives a key: mostly in the Landmark prompt's words, which say it twice."""
    form = rng.random()
    if form < 0.7:
        return stated_twice(label, key)
    beginning = "\nThe" if form < 0.85 else "\nNote that the"
    return [
        Part(beginning, Role.PLAIN),
        Part(f" {label}", Role.PLAIN),
        Part(" is ", Role.PLAIN),
        Part(key, Role.NEW),
        Part(".\n", Role.PLAIN),
    ]


def stated_twice(label: str, key: str) -> list[Part]:
    """The Landmark prompt's line."""
    return [
        Part("\nThe", Role.PLAIN),
        Part(f" {label}", Role.PLAIN),
        Part(" is ", Role.PLAIN),
        Part(key, Role.NEW),
        Part(". Remember it. ", Role.PLAIN),
        Part(key, Role.REPEATED),
        Part(" is the", Role.PLAIN),
        Part(f" {label}", Role.PLAIN),
        Part(".\n", Role.PLAIN),
    ]


def asked(label: str, key: str, rng: Random) -> list[Part]:
    """A question and its answer, or only the beginning of the statement."""
    named = Part(f" {label}", Role.QUESTION)
    question = [Part("\nThe", Role.QUESTION), named]
    if rng.random() < 0.7:
        question = [Part("\nWhat is the", Role.QUESTION), named, Part("? The", Role.QUESTION), named]
    # The space is predictable and its token often stands alone, so it is not the answer's.
    return [*question, Part(" is ", Role.QUESTION), Part(key, Role.ANSWER), Part(".", Role.STOP)]
