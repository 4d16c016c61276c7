"""Token ids as callers give them: padded on the left, or a whole conversation of which some was heard before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memory_service.errors import InvalidArgument


def checked(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, list[int]]:
    """Token ids [B, T] and each row's padding. Raises InvalidArgument unless padding is on the left only."""
    if input_ids.ndim != 2 or input_ids.shape[1] < 1 or input_ids.is_floating_point():
        raise InvalidArgument(f"input_ids must be whole numbers [batch, tokens ≥ 1], got {list(input_ids.shape)}")
    batch, total = input_ids.shape
    if attention_mask is None:
        return input_ids, [0] * batch
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < total:
        raise InvalidArgument(
            f"attention_mask must be [{batch}, ≥ {total}] with 0 on padding, got {list(attention_mask.shape)}"
        )
    real = attention_mask[:, -total:] != 0
    pads = (~real).sum(1)
    if not bool((real == (torch.arange(total, device=real.device) >= pads[:, None])).all()):
        raise InvalidArgument("padding must stand on the left of every row: set tokenizer.padding_side = 'left'")
    return input_ids, pads.tolist()


def unseen(input_ids: Tensor, attention_mask: Tensor | None, seen: Sequence[Tensor]) -> Tensor | None:
    """How many tokens of each row [B] are new, if the whole conversation was given; None if only new ones were."""
    if len(seen) != len(input_ids) or not any(len(text) for text in seen):
        return None
    real = [row if attention_mask is None else row[attention_mask[i] != 0] for i, row in enumerate(input_ids.cpu())]
    for row, text in zip(real, seen, strict=True):
        if len(row) <= len(text) or not bool((row[: len(text)] == text).all()):
            return None
    left = [len(row) - len(text) for row, text in zip(real, seen, strict=True)]
    return torch.tensor(left, device=input_ids.device)


def padded(texts: Sequence[Tensor], least: int) -> tuple[Tensor, list[int]]:
    """Texts of unequal lengths as one batch [B, ≥ least] with padding on the left, and how much of it each row has."""
    longest = max([least, *(len(text) for text in texts)])
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, longest - len(text) :] = text
    return ids, [longest - len(text) for text in texts]
