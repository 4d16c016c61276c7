"""Haystacks other than the Landmark prompt's: real text, real code, random words, as token ids."""

from __future__ import annotations

from enum import StrEnum
from random import Random

import numpy as np
from numpy.typing import NDArray

from model_worker.tasks import corpus, labels
from model_worker.tasks.corpus import Kind, Split
from model_worker.tasks.tokens import Tokenizer


class Filler(StrEnum):
    """What a haystack is made of."""

    LANDMARK = "landmark"  # "The grass is green. The sky is blue. …", over and over.
    TEXT = "text"  # Documentation and licences.
    CODE = "code"  # Python's library.
    RANDOM = "random"  # Words in no order.


class Texts:
    """Draws haystacks of real texts. Those kept from training come first; only long haystacks have others too."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokenised: dict[tuple[Kind, Split], list[NDArray[np.int64]]] = {}

    def draw(self, filler: Filler, tokens: int, rng: Random) -> NDArray[np.int64]:
        """Token ids of whole files one after the other, or of words; the last is cut. [tokens]"""
        if filler is Filler.RANDOM:
            return self._words(tokens, rng)
        kind = Kind.PROSE if filler is Filler.TEXT else Kind.CODE
        pieces: list[NDArray[np.int64]] = []
        have = 0
        while have < tokens:
            # Longer than everything there is: from the start once more, in another order.
            for split in (Split.HELD_OUT, Split.TRAIN):
                every = self._files(kind, split) if have < tokens else []
                for place in rng.sample(range(len(every)), len(every)):
                    pieces.append(every[place])
                    have += len(every[place])
        return np.concatenate([*pieces, np.empty(0, np.int64)])[:tokens]

    def _words(self, tokens: int, rng: Random) -> NDArray[np.int64]:
        each = [self._tokenizer.encode(f" {word}") for word in labels.words()]
        ids: list[int] = []
        while len(ids) < tokens:
            ids += rng.choice(each)
        return np.array(ids[:tokens], dtype=np.int64)

    def _files(self, kind: Kind, split: Split) -> list[NDArray[np.int64]]:
        if (kind, split) not in self._tokenised:
            found = [one.text for one in corpus.texts(split, kind)]
            encoded = self._tokenizer.encode_many(found)
            self._tokenised[kind, split] = [np.array(ids, dtype=np.int64) for ids in encoded]
        return self._tokenised[kind, split]
