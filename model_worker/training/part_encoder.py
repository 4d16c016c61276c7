"""Parts of texts to token ids, quickly where a vocabulary allows it and exactly everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from random import Random

from model_worker.tasks import labels, lookup
from model_worker.tasks.parts import Part, Role
from model_worker.tasks.tokens import Tokenizer

DRAWN = frozenset({Role.NEW, Role.REPEATED, Role.ANSWER, Role.COPIED})  # Digits and hex digits.
CHARACTERS = "0123456789abcdef-"
PROBES = 40
REMEMBERED = 20_000  # Texts; words in labels, and the fixed ones.


class PartEncoder:
    """Token ids of parts joined, and the part that each token belongs to.

    Tokenising thousands of short texts a second would cost more than a training step. Most vocabularies that write
    digits one by one also never join what stands on two sides of a part's border: then a part's ids do not depend on
    its neighbours, and are remembered. Whether it is so is tried on every form of line that training makes.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._remembered: dict[str, list[int]] = {}
        letters = [tokenizer.encode(letter) for letter in CHARACTERS]
        self._characters = dict(zip(CHARACTERS, (ids[-1] for ids in letters if ids), strict=False))
        self.separable = all(len(ids) == 1 for ids in letters) and all(
            self._apart(parts) == self._exactly(parts) for parts in _probes()
        )

    def __call__(self, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
        """Token ids [T] and indices of parts [T]."""
        return self._apart(parts) if self.separable else self._exactly(parts)

    def _exactly(self, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
        return self._tokenizer.encode_parts([part.text for part in parts])

    def _apart(self, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
        encoded = [self._part(part) for part in parts]
        owners = chain.from_iterable([place] * len(ids) for place, ids in enumerate(encoded))
        return list(chain.from_iterable(encoded)), list(owners)

    def _part(self, part: Part) -> list[int]:
        if part.role in DRAWN:
            characters = self._characters
            return [characters[letter] for letter in part.text]
        found = self._remembered.get(part.text)
        if found is None:
            if len(self._remembered) >= REMEMBERED:
                self._remembered.clear()
            found = self._remembered[part.text] = self._tokenizer.encode(part.text)
        return found


def _probes() -> Iterable[Sequence[Part]]:
    rng = Random(0)
    for _ in range(PROBES):
        drawn = labels.Labels(rng)
        label, key = drawn.draw(), labels.number(rng)
        yield labels.stated(label, key, rng)
        yield labels.asked(label, key, rng)
        records = [lookup.record(rng) for _ in range(3)]
        yield [Part(lookup.TASK + lookup.OPENING, Role.PLAIN), *lookup.listed(records)]
        yield [Part('"}', Role.PLAIN), *lookup.asked(records[0])]
        yield [Part('"}', Role.PLAIN), *lookup.continued(records[1])]
