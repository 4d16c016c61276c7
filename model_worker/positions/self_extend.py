"""Self-Extend: near keys keep their place, far keys share places in groups, so a model reaches beyond its training.

G group, w window, L0 trained length, N length (all in tokens); i query position, j key position.
A pair at distance i - j < w stands at i - j; a farther one at floor(i / G) - floor(j / G) + w - floor(w / G).
(Jin et al. 2024, "LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning", section 3, with floors throughout.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memory_service.errors import InvalidArgument
from model_worker.errors import InputTooLong
from model_worker.settings import LogitScaling, SelfExtend


def relative_positions(length: int, config: SelfExtend) -> Tensor:
    """Where every query sees every key, [N, N]; -1 where it sees nothing. The rule spelt out: N² memory, for tests."""
    positions = torch.arange(length)
    distance = positions[:, None] - positions
    far = far_queries(positions, config)[:, None] - far_keys(positions, config)
    return torch.where(distance < config.window, distance, far).masked_fill(distance < 0, -1)


def far_queries(positions: Tensor, config: SelfExtend) -> Tensor:
    """Where queries stand when they look at far keys."""
    return positions // config.group + (config.window - config.window // config.group)


def far_keys(positions: Tensor, config: SelfExtend) -> Tensor:
    """Where keys stand when a query looks at them from afar."""
    return positions // config.group


def query_scale(positions: Tensor, config: SelfExtend) -> Tensor | None:
    """What queries are multiplied by before rotation, float32 and ≥ 1; None if nothing is scaled."""
    if config.logit_scaling is LogitScaling.NONE:
        return None
    if config.scale_base is None:
        raise InvalidArgument(
            "logit_scaling needs scale_base: the length from which it grows, as a rule the trained one"
        )
    place = positions.clamp(min=0).float() + 1
    if config.logit_scaling is LogitScaling.LOG:
        scale = place.log() / math.log(config.scale_base)
    else:
        scale = (0.1 * (place / config.scale_base).log() + 1) ** 2
    return scale.clamp(min=1.0)


def reach(config: SelfExtend, trained: int) -> int:
    """The longest sequence in which no pair stands farther apart than training had it: G · (L0 - w + floor(w / G))."""
    if config.window >= trained:  # A far pair would stand at w or farther.
        return trained
    return config.group * (trained - config.window + config.window // config.group)


def smallest_group(length: int, window: int, trained: int) -> int:
    """The smallest group with which this window reaches `length`; InputTooLong if none does."""
    if length <= trained:
        return 1
    if window >= trained:
        raise InputTooLong(
            f"no group reaches {length} tokens with a window of {window}: "
            f"choose a window shorter than the {trained} tokens the model was trained on"
        )
    group = max(1, (length - window) // (trained - window))
    while reach(SelfExtend(group, window), trained) < length:
        group += 1
    return group


def advised_group(length: int, window: int, trained: int) -> int | None:
    """The smallest group that also keeps to two thirds of the trained length; None if this window is too wide for any.

    The authors' rule of thumb, w + (N - w) / G < 2/3 · L0: a model knows its largest distances least.
    """
    room = 2 * trained - 3 * window  # Both sides times 3.
    if room <= 0:
        return None
    return max(3 * (length - window) // room + 1, smallest_group(length, window, trained))


def check_reach(config: SelfExtend, trained: int, length: int) -> None:
    """Refuse a length that puts a pair farther apart than the model ever saw: InputTooLong, saying what would do."""
    longest = reach(config, trained)
    if length <= longest:
        return
    if config.window < trained:
        remedy = f"group {smallest_group(length, config.window, trained)} would reach it"
    else:
        half = max(1, trained // 2)
        remedy = f"window {half} with group {smallest_group(length, half, trained)} would reach it"
    raise InputTooLong(
        f"{length} tokens are more than the {longest} that Self-Extend with group {config.group} and window "
        f"{config.window} reaches on a model trained on {trained}: {remedy}"
    )


def advice(config: SelfExtend, trained: int, length: int) -> str | None:
    """What to say about a length that is reached only by distances the model knows badly; None if all is well."""
    # w + (N - w) / G < 2/3 · L0, both sides times 3 G: whole numbers do not round.
    if length <= trained or 3 * (config.window * config.group + length - config.window) < 2 * trained * config.group:
        return None
    group = advised_group(length, config.window, trained)
    remedy = f"group {group}" if group else f"a window below {2 * trained // 3}"
    return (
        f"at {length} tokens, Self-Extend with group {config.group} and window {config.window} uses distances beyond "
        f"two thirds of the {trained} tokens the model was trained on, which it knows badly: {remedy} stays below"
    )
