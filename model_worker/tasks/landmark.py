"""The passkey prompt of Landmark Attention (2305.16300) and LongLLaMA: a key in a haystack, and a question.

    There is an important info hidden inside a lot of irrelevant text. …
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. The gra
    The pass key is 4711. Remember it. 4711 is the pass key.
    The grass is green. The sky is blue. …
    What is the pass key? The pass key is

The haystack is cut by characters, as in the authors' scripts, and may be of any length; theirs ends at 449,999.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import numpy as np
from numpy.typing import NDArray

from memory_service.errors import InvalidArgument
from model_worker.tasks import repeats
from model_worker.tasks.fillers import Filler, Texts
from model_worker.tasks.labels import PLAIN, Labels
from model_worker.tasks.repeats import Repeat, Run
from model_worker.tasks.tokens import Tokenizer

DESCRIPTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
MOST_KEYS = 49_999  # Keys are 1 to this, so they have one digit to five.
TRIES = 8


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and the answer that must follow it."""

    ids: NDArray[np.int64] = field(repr=False)  # [T]
    answer: tuple[int, ...]  # Token ids of a space and the key.
    key: str
    label: str
    line: range  # The tokens of the line that states the key.
    runs: tuple[Run, ...] | None = field(default=None, repr=False)

    def text(self, tokenizer: Tokenizer) -> str:
        """The prompt as text, whose ids these are."""
        return tokenizer.decode(self.ids.tolist()) if self.runs is None else repeats.text_of(self.runs)


class Passkeys:
    """Makes prompts for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._texts = Texts(tokenizer)

    def prompt(
        self,
        tokens: int,
        depth: float,
        rng: Random,
        *,
        label: str = PLAIN,
        key: str | None = None,
        filler: Filler | str = Filler.LANDMARK,
    ) -> Prompt:
        """A prompt of about `tokens` tokens (within 64 and never more than that above) whose key stands at a depth.

        `depth` is 0 for the haystack's beginning and 1 for its end. `key` is 1 to 49,999 if it is not given. Raises
        InvalidArgument if so few tokens hold no prompt.
        """
        if not 0 <= depth <= 1:
            raise InvalidArgument(f"a depth is 0 to 1, got {depth}")
        key = str(rng.randint(1, MOST_KEYS)) if key is None else key
        if Filler(filler) is not Filler.LANDMARK:
            return self._among_texts(tokens, depth, rng, label, key, Filler(filler))
        least = len(self._tokenizer.encode(repeats.text_of(runs_of(0, 0, label, key))))
        period = len(self._tokenizer.encode(f" {FILLER}" * 2)) - len(self._tokenizer.encode(f" {FILLER}"))
        room = tokens - least
        if room < 0:
            raise InvalidArgument(f"the prompt alone has {least} tokens, more than the {tokens} asked for")
        characters = room * (len(FILLER) + 1) // period
        for _ in range(TRIES):
            made = self.of_characters(characters, int(characters * depth), label, key)
            over = len(made.ids) - tokens
            if abs(over) <= period:
                return made
            # Where the haystack is cut, a word falls into more tokens than its characters let expect.
            characters = max(0, characters - over * (len(FILLER) + 1) // period)
        return made

    def of_characters(self, characters: int, before: int, label: str = PLAIN, key: str = "12345") -> Prompt:
        """A prompt whose haystack has so many characters, `before` of them before the key: as the authors draw it."""
        if not 0 <= before <= characters:
            raise InvalidArgument(f"of {characters} characters, 0 to all stand before the key; got {before}")
        runs = runs_of(characters, before, label, key)
        ids = repeats.token_ids(self._tokenizer, runs)
        line = f"\n{stated(label, key)}\n"
        place = runs.index(line)
        begin, end = (len(repeats.token_ids(self._tokenizer, part)) for part in (runs[:place], runs[: place + 1]))
        return Prompt(ids, _answer(self._tokenizer, label, key), key, label, range(begin, end), tuple(runs))

    def distractors(
        self,
        count: int,
        tokens: int,
        drawn: Labels,
        rng: Random,
        *,
        filler: Filler | str = Filler.LANDMARK,
    ) -> list[NDArray[np.int64]]:
        """Documents of `tokens` tokens, each with one key under a label of its own somewhere in it. [count] of [tokens]

        Labels come from `drawn`, so that none of them is the prompt's. Raises InvalidArgument if a line does not fit.
        """
        return [self._document(tokens, drawn.draw(), rng, Filler(filler)) for _ in range(count)]

    def _document(self, tokens: int, label: str, rng: Random, filler: Filler) -> NDArray[np.int64]:
        line = self._encode(f"\n{stated(label, str(rng.randint(1, MOST_KEYS)))}\n")
        if len(line) > tokens:
            raise InvalidArgument(f"a key's line has {len(line)} tokens, a document of {tokens} cannot hold it")
        text = self._filler(tokens - len(line), rng, filler)
        at = rng.randint(0, len(text))
        return np.concatenate([text[:at], line, text[at:]])

    def _filler(self, tokens: int, rng: Random, filler: Filler) -> NDArray[np.int64]:
        if filler is not Filler.LANDMARK:
            return self._texts.draw(filler, tokens, rng)
        period = self._encode(f" {FILLER}")
        start = rng.randrange(len(period))
        return np.resize(np.roll(period, -start), tokens)

    def _among_texts(self, tokens: int, depth: float, rng: Random, label: str, key: str, filler: Filler) -> Prompt:
        head = self._encode(f"{DESCRIPTION}\n")
        line = self._encode(f"\n{stated(label, key)}\n")
        question = self._encode(f"\n{asked(label)}")
        room = tokens - len(head) - len(line) - len(question)
        if room < 0:
            raise InvalidArgument(f"the prompt alone has {tokens - room} tokens, more than the {tokens} asked for")
        text = self._texts.draw(filler, room, rng)
        at = int(room * depth)
        ids = np.concatenate([head, text[:at], line, text[at:], question])
        begin = len(head) + at
        return Prompt(ids, _answer(self._tokenizer, label, key), key, label, range(begin, begin + len(line)))

    def _encode(self, text: str) -> NDArray[np.int64]:
        return np.array(self._tokenizer.encode(text), dtype=np.int64)


def stated(label: str, key: str) -> str:
    """The line that is to be found."""
    return f"The {label} is {key}. Remember it. {key} is the {label}."


def asked(label: str) -> str:
    """The last line."""
    return f"What is the {label}? The {label} is"


def runs_of(characters: int, before: int, label: str, key: str) -> list[Run]:
    """The prompt's text; both pieces of the haystack begin with its first sentence."""
    return [
        f"{DESCRIPTION}\n",
        *_haystack(before),
        f"\n{stated(label, key)}\n",
        *_haystack(characters - before),
        f"\n{asked(label)}",
    ]


def _haystack(characters: int) -> list[Run]:
    """The first so many characters of the sentences repeated, with a space between."""
    if characters <= len(FILLER):
        return [FILLER[:characters]]
    passage = f" {FILLER}"
    times, rest = divmod(characters - len(FILLER), len(passage))
    return [FILLER, Repeat(passage, times), passage[:rest]]


def _answer(tokenizer: Tokenizer, label: str, key: str) -> tuple[int, ...]:
    question = tokenizer.encode(asked(label))
    whole = tokenizer.encode(f"{asked(label)} {key}")
    if whole[: len(question)] != question:
        raise InvalidArgument(f"this tokenizer joins the end of the question with the key {key!r}")
    return tuple(whole[len(question) :])
