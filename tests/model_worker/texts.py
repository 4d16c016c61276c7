"""Random texts, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.model_worker.tiny import VOCABULARY


def text(*shape: int, seed: int = 1) -> Tensor:
    """Random tokens [*shape], none of them special; the same for the same seed."""
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Texts of unequal lengths as a batch, padding on the left: input_ids and attention_mask [B, T]."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), longest), 2), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :], mask[number, longest - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}
