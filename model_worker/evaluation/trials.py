"""Trials of a search for keys: which prompt is asked, where its key stands, what came of it, and the shares of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from torch import Tensor

from memory_service.errors import InvalidArgument
from model_worker.evaluation.wilson import Share


@dataclass(frozen=True, slots=True)
class Trial:
    """What is asked: a prompt of about so many tokens with its key at a depth of 0 (first line) to 1 (last)."""

    number: int  # Of all trials, from 0.
    tokens: int
    depth: float
    seed: str  # Of everything random in it.

    @property
    def rng(self) -> Random:
        """The same draws whenever it is asked for."""
        return Random(self.seed)


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A trial's prompt, ready to be read."""

    trial: Trial
    ids: Tensor  # [T] int64
    answer: tuple[int, ...]  # Token ids that must follow.
    key: str
    label: str
    line: range  # The tokens of the line that holds the key.
    others: tuple[Tensor, ...] = ()  # Documents that stand in memory beside it, [T] each.

    @property
    def tokens(self) -> int:
        """Of the prompt and the documents beside it, as asked for."""
        return self.trial.tokens + sum(len(one) for one in self.others)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model answered, and what it took."""

    ids: tuple[int, ...]
    tokens: int  # That went to memory: the prompt but its end, and other documents.
    prefill_s: float  # Until they were there.
    index_s: float  # Building an index over them, if one was wanted.
    answer_s: float  # From then to the last token of the answer.
    nbytes: int  # In memory: keys and values, and the index.
    mass: float | None = None  # Share of the attention that the key's line got, mean over heads and answer tokens.


@dataclass(frozen=True, slots=True)
class Outcome:
    """A trial and what came of it."""

    trial: Trial
    tokens: int  # Of the prompt.
    key: str
    label: str
    said: str
    found: bool  # Every token of the answer as it should be.
    asked: Asked
    seconds: float

    def row(self) -> dict[str, Any]:
        """As it is written to JSON."""
        asked = self.asked
        return {
            "tokens": self.tokens, "depth": round(self.trial.depth, 4), "label": self.label, "key": self.key,
            "said": self.said, "found": self.found, "tokens_in_memory": asked.tokens, "bytes": asked.nbytes,
            "prefill_s": asked.prefill_s, "index_s": asked.index_s, "answer_s": asked.answer_s,
            "seconds": self.seconds, "key_mass": asked.mass,
        }  # fmt: skip


def trials_of(lengths: Sequence[int], trials: int, seed: int) -> Iterator[Trial]:
    """`trials` of each length, short ones first; depths are spread evenly, each anywhere in its own stretch."""
    number = 0
    for tokens in sorted(lengths):
        for place in range(trials):
            rng = f"{seed}/{tokens}/{place}"
            yield Trial(number, tokens, (place + Random(f"depth/{rng}").random()) / trials, rng)
            number += 1


@dataclass(frozen=True, slots=True)
class Band:
    """The trials of a length whose keys stand between two depths."""

    tokens: int  # As asked for.
    low: float
    high: float
    outcomes: tuple[Outcome, ...]

    @property
    def share(self) -> Share:
        return Share(sum(one.found for one in self.outcomes), len(self.outcomes))

    @property
    def name(self) -> str:
        """0–10 %"""
        form = ".0f" if self.high - self.low >= 0.01 else ".3g"  # Narrower ones would be named alike.
        return f"{100 * self.low:{form}}–{100 * self.high:{form}} %"

    def row(self) -> dict[str, Any]:
        """As it is written to JSON and tables; means over its trials."""
        share = self.share
        of = [one.asked for one in self.outcomes]
        prefill_s = sum(one.prefill_s for one in of)
        masses = [one.mass for one in of if one.mass is not None]
        return {
            "tokens": self.tokens, "depth": self.name, "depth_low": self.low, "depth_high": self.high,
            "found": share.found, "trials": share.trials, "accuracy": share.value, "low": share.low, "high": share.high,
            "interval": f"{100 * share.low:.3g}–{100 * share.high:.3g} %" if share.trials else None,
            "score": f"{share.found}/{share.trials}",
            "prompt_tokens": _mean(one.tokens for one in self.outcomes),
            "prefill_tokens_per_s": sum(one.tokens for one in of) / prefill_s if prefill_s else math.nan,
            "answer_s": _mean(one.answer_s for one in of), "seconds": _mean(one.seconds for one in self.outcomes),
            "bytes": _mean(one.nbytes for one in of), "key_mass": _mean(masses),
        }  # fmt: skip


def bands_of(outcomes: Sequence[Outcome], depths: int) -> list[Band]:
    """The outcomes by length and depth, `depths` equal stretches a length; empty ones too."""
    if depths < 1:
        raise InvalidArgument(f"there is at least one stretch of depths, got {depths}")
    bands = []
    for tokens in sorted({one.trial.tokens for one in outcomes}):
        here = [one for one in outcomes if one.trial.tokens == tokens]
        for place in range(depths):
            inside = tuple(one for one in here if min(int(one.trial.depth * depths), depths - 1) == place)
            bands.append(Band(tokens, place / depths, (place + 1) / depths, inside))
    return bands


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return statistics.fmean(known) if known else math.nan
