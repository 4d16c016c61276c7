"""Working memory of a pass: tensors that are taken by name and used again, because fresh pages cost as much as sums."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Room:
    """Float32 tensors on the CPU, for one thread at a time; what a name held before is gone when it is taken again."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, in the same memory for the same name."""
        count = math.prod(shape)
        held = self._held.get(name)
        if held is None or len(held) < count:
            self._held[name] = held = torch.empty(count, dtype=torch.float32)
        return held[:count].view(shape)
