"""How sure a mean is: the bootstrap's percentile interval (Efron 1979), resampling groups of what belongs together.

Texts of one file resemble each other, so their mean is less sure than their number says; files are resampled instead.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean and the interval its true value lies in at 95 %; nan of nothing."""

    value: float
    low: float
    high: float


def mean_of(values: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0) -> Mean:
    """The mean of values, each of a group of its own unless `groups` says otherwise; the same for the same seed."""
    if not len(values):
        return Mean(math.nan, math.nan, math.nan)
    given = np.asarray(values, np.float64)
    names = {name: number for number, name in enumerate(dict.fromkeys(groups or range(len(values))))}
    place = np.array([names[name] for name in (groups or range(len(values)))])
    sums, counts = np.bincount(place, given), np.bincount(place)
    drawn = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(float(given.mean()), float(low), float(high))
