"""Working memory of a pass: tensors that are taken by name and used again, because fresh pages cost as much as sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


class Room:
    """For one pass at a time; what a name held before is gone when it is taken again."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._made: dict[Hashable, object] = {}

    def take(self, name: str, *shape: int, like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape, of the dtype and device of `like`."""
        view = self._views.get((name, shape))
        if view is None or view.dtype != like.dtype or view.device != like.device:
            held, count = self._held.get(name), math.prod(shape)
            if held is None or held.numel() < count or held.dtype != like.dtype or held.device != like.device:
                self._views = {key: view for key, view in self._views.items() if key[0] != name}
                self._held[name] = held = torch.empty(count, dtype=like.dtype, device=like.device)
            self._views[name, shape] = view = held[:count].view(shape)
        return view

    def made(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made here once under this key."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])
