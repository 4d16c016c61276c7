"""Token ids of texts in which one passage stands many times: tokenised where it differs, repeated where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_worker.tasks.tokens import Tokenizer

FEW = 4  # Times that a passage is tokenised in earnest; its first and its last stand beside other text.


@dataclass(frozen=True, slots=True)
class Repeat:
    """A passage, so many times."""

    text: str
    times: int


@dataclass(frozen=True, slots=True)
class _Found:
    at: int  # Token of the short text where more repetitions go.
    ids: list[int]  # Of one repetition.


Run = str | Repeat


def text_of(runs: Sequence[Run]) -> str:
    """The whole text."""
    return "".join(run if isinstance(run, str) else run.text * run.times for run in runs)


def token_ids(tokenizer: Tokenizer, runs: Sequence[Run]) -> NDArray[np.int64]:
    """What `tokenizer.encode(text_of(runs))` gives, in the time its different parts take. [T]

    How a tokenizer cuts a text depends on what stands near, so past a few repetitions every further one adds the same
    tokens. That is tried out with one more of each and then with several more of all; where it is not so, the whole
    text is tokenised, at some million tokens a minute.
    """
    if all(isinstance(run, str) or run.times <= FEW + 4 for run in runs):
        return np.array(tokenizer.encode(text_of(runs)), dtype=np.int64)
    many = [place for place, run in enumerate(runs) if isinstance(run, Repeat) and run.times > FEW]
    short = tokenizer.encode(text_of(_with(runs, dict.fromkeys(many, FEW))))
    found = {}
    for place in many:
        longer = tokenizer.encode(text_of(_with(runs, {**dict.fromkeys(many, FEW), place: FEW + 1})))
        one = _inserted(short, longer)
        if one is None:
            return np.array(tokenizer.encode(text_of(runs)), dtype=np.int64)
        found[place] = one
    trial = {place: FEW + 2 + turn for turn, place in enumerate(many)}
    if tokenizer.encode(text_of(_with(runs, trial))) != _expanded(short, found, trial).tolist():
        return np.array(tokenizer.encode(text_of(runs)), dtype=np.int64)
    return _expanded(short, found, {place: _times(runs[place]) for place in many})


def _with(runs: Sequence[Run], times: dict[int, int]) -> list[Run]:
    return [
        Repeat(run.text, times.get(place, run.times)) if isinstance(run, Repeat) else run
        for place, run in enumerate(runs)
    ]


def _times(run: Run) -> int:
    return run.times if isinstance(run, Repeat) else 1


def _inserted(short: list[int], longer: list[int]) -> _Found | None:
    """The tokens that were put into `short` to give `longer`, and where; None if they are not all in one place."""
    more = len(longer) - len(short)
    common = next(
        (n for n, (a, b) in enumerate(zip(short, longer, strict=False)) if a != b), min(len(short), len(longer))
    )
    if more <= 0 or short[common:] != longer[common + more :]:
        return None
    return _Found(common, longer[common : common + more])


def _expanded(short: list[int], found: dict[int, _Found], times: dict[int, int]) -> NDArray[np.int64]:
    pieces = []
    last = 0
    for place in sorted(found):
        one = found[place]
        pieces += [np.array(short[last : one.at], dtype=np.int64)]
        pieces += [np.tile(np.array(one.ids, dtype=np.int64), times[place] - FEW)]
        last = one.at
    pieces.append(np.array(short[last:], dtype=np.int64))
    return np.concatenate(pieces)
