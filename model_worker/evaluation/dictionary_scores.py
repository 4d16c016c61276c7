"""What came of questions about a dictionary: which answers were right, and which keys of the memory they rested on.

W windows, R records of a window, A = 4 R queries that answer, H query heads, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_worker.evaluation.wilson import Share

NOWHERE = -1  # The place of padding.
_ROUNDING = 1e-5  # Of a score, by the order in which it was summed.


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The keys that the queries which answer found, best first."""

    places: NDArray[np.int64]  # [W, H, A, K] tokens of the dictionary, NOWHERE for padding.
    scores: Tensor  # [W, H, A, K] float32, scaled; -inf for padding.


@dataclass(frozen=True, slots=True)
class Kept:
    """What an index found of what exact search finds; means over queries and heads."""

    recall: float  # Share of the exact top k.
    mass: float  # Softmax mass of the found keys over that of the exact top k.
    mass_p10: float  # A tenth of the queries keep less.


@dataclass(frozen=True, slots=True)
class Gap:
    """How far the definition's own token stands out from every other key, in nats; the surest head of each query."""

    found: float  # Share of queries that have it among the top k at all.
    mean: float
    p1: float  # A hundredth of the queries have less; below 0 another key scores higher.


def right(answers: Tensor, wanted: Tensor) -> tuple[Share, Share]:
    """Tokens and whole records of [W, R, 4] that are as wanted."""
    same = answers == wanted
    whole = same.all(-1)
    return Share(int(same.sum()), same.numel()), Share(int(whole.sum()), whole.numel())


def slots(answers: Tensor, wanted: Tensor) -> list[float]:
    """The share of right tokens for each of a value's four."""
    return [float(one) for one in (answers == wanted).float().mean((0, 1))]


def kept(found: Found, exact: Found) -> Kept:
    """Compare what was found with the exact top k of the same queries.

    A key counts if it scores as high as the last of the exact top k: of equal keys, such as those of the first token of
    every window, any will do.
    """
    wanted = (exact.scores > -torch.inf).sum(-1)
    last = exact.scores.masked_fill(exact.scores == -torch.inf, torch.inf).amin(-1, keepdim=True)
    hits = (found.scores >= last - _ROUNDING * last.abs().clamp(min=1.0)).sum(-1)
    recall = torch.minimum(hits, wanted).sum() / wanted.sum().clamp(min=1)
    mass = (found.scores.logsumexp(-1) - exact.scores.logsumexp(-1)).exp().nan_to_num(1.0).clamp(max=1.0)
    return Kept(float(recall), float(mass.mean()), float(mass.flatten().quantile(0.1)))


def gap(found: Found, defined: NDArray[np.int64]) -> Gap:
    """How the queries told the right key, at places `defined` [W, A], from the others."""
    own = torch.from_numpy(found.places == defined[:, None, :, None])  # [W, H, A, K]
    mine = found.scores.masked_fill(~own, -torch.inf).amax(-1)
    others = found.scores.masked_fill(own, -torch.inf).amax(-1)
    # Of what was not found it is known only that it scores less than the last that was.
    least = found.scores.masked_fill(found.scores == -torch.inf, torch.inf).amin(-1)
    margin = (torch.where(own.any(-1), mine, least) - others).nan_to_num(posinf=0.0, neginf=0.0).amax(1).flatten()
    return Gap(float(own.any(-1).any(1).float().mean()), float(margin.mean()), float(margin.quantile(0.01)))
