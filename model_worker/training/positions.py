"""Where a window's tokens stand while a model learns to reach further: CREAM, PoSE or RandPos, by their samplers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from memory_service.errors import InvalidArgument
from model_worker.positions.cream import Branch, BranchDraw, Cream, Middle, Pose, RandomPositions, Sampler, Tokens
from model_worker.training.config import PositionsConfig, Recipe

_STREAM = 0xB0  # Keeps these draws apart from those of other things with the same seed.
_SAMPLERS: dict[Recipe, type[Cream | Pose | RandomPositions]] = {
    Recipe.CREAM: Cream,
    Recipe.POSE: Pose,
    Recipe.RANDPOS: RandomPositions,
}
_WORDS = {"middle": Middle, "branch_draw": BranchDraw, "tokens": Tokens}


def sampler_of(config: PositionsConfig, window: int) -> Sampler:
    """The sampler that `config` names, for windows of so many tokens. Raises InvalidArgument."""
    options = dict(config.options)
    try:
        for name, kind in _WORDS.items():
            if name in options:
                options[name] = kind(options[name])
        if "branches" in options:
            options["branches"] = tuple(Branch(one) for one in options["branches"])
        return _SAMPLERS[config.recipe](window=window, factor=config.factor, **options)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"[positions] {error}") from error


def positions_of(sampler: Sampler, shape: Sequence[int], seed: int, number: int) -> Tensor:
    """Positions [rows, window] of batch `number`: every window is whole, its positions jump. Raises InvalidArgument."""
    rows, window = shape
    if window != sampler.window:
        raise InvalidArgument(
            f"[positions] are sampled for windows of {sampler.window} tokens, the [fot] window, but a shape has "
            f"{window}: give all shapes the same"
        )
    generator = np.random.default_rng((_STREAM, seed, number))
    # A text of just one window: there is nothing to leave out, so only positions are taken from the placement.
    return torch.stack([placement.positions for placement in sampler.sample([window] * rows, generator)])
