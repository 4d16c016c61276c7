"""The window: the newest keys and values of every layer, un-rotated, with rotated copies so that a step rotates once.

All rows end at the same slot; a row that is shorter, or whose oldest tokens went to memory, begins later.
B rows, K key/value heads, S slots, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.positions.policy import Policy
from model_worker.positions.rope import Angles, rotate
from model_worker.positions.self_extend import far_keys

_LEAST = 64  # Slots of a new window.


@dataclass(slots=True, eq=False)
class _Layer:
    """One layer's room, [B, K, capacity, D] each."""

    key: Tensor  # As projected.
    value: Tensor
    near: Tensor  # Rotated to their place; the same tensor as `key` where nothing rotates.
    far: Tensor | None  # Rotated to their group's place (Self-Extend).
    stale: bool = False  # Some row began anew: its rotated copies must be made again.

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by what `function` makes of it."""
        rotates = self.near is not self.key
        self.key, self.value = function(self.key), function(self.value)
        self.near = function(self.near) if rotates else self.key
        self.far = None if self.far is None else function(self.far)


@dataclass(frozen=True, slots=True, eq=False)
class Visible:
    """What the newest queries may see of one layer; slot s of row b stands at position s - first[b]."""

    near: Tensor  # [B, K, S, D] rotated keys
    far: Tensor | None  # [B, K, S, D] keys rotated to their groups
    value: Tensor  # [B, K, S, D]
    first: Tensor | None  # [B] the first visible slot; None if every row sees every slot


class Window:
    """The local cache of a batch: `reserve`, then `push` every layer of a step, then `advance`."""

    def __init__(self, policies: Sequence[Policy], device: torch.device):
        self.policies = policies
        self.device = device
        self.slots = 0  # In use.
        self.first: list[int] = []  # Per row: the slot of its first token.
        self.begin: list[
            int
        ] = []  # Per row: where counting towards a full window begins; before `first` if pads count.
        self._capacity = 0
        self._layers: dict[int, _Layer] = {}
        self._pads: list[int] = []
        self._angles: dict[tuple[int, str, int], Angles] = {}

    @property
    def rows(self) -> int:
        return len(self.first)

    def resize(self, rows: int) -> None:
        """Start empty with this many rows."""
        self.first, self.begin, self._pads = [0] * rows, [0] * rows, [0] * rows
        self.slots = self._capacity = 0
        self._layers.clear()

    def held(self, row: int) -> int:
        """Tokens that count towards this row's window."""
        return self.slots - self.begin[row]

    def tokens(self, row: int) -> int:
        """Real tokens of this row in the window."""
        return self.slots - self.first[row]

    def keys_values(self, layer: int, row: int, until: int | None = None) -> tuple[Tensor, Tensor]:
        """A row's un-rotated keys and values before slot `until`: [K, tokens, D] each, views."""
        held, span = self._layers[layer], slice(self.first[row], self.slots if until is None else until)
        return held.key[row, :, span], held.value[row, :, span]

    # --- tokens leave ---

    def drop(self, row: int, slot: int) -> None:
        """Forget a row's tokens before `slot`; what stays counts from there."""
        self.begin[row] = slot
        if slot > self.first[row]:
            self.first[row] = slot
            for layer in self._layers.values():
                layer.stale = True

    def reorder(self, chosen: Sequence[int]) -> None:
        """Rows become copies of the chosen ones."""
        index = torch.tensor(list(chosen), device=self.device)
        for layer in self._layers.values():
            layer.change(lambda tensor: tensor.index_select(0, index))
        self.first, self.begin = [self.first[i] for i in chosen], [self.begin[i] for i in chosen]
        self._pads = [0] * len(chosen)

    # --- tokens arrive ---

    def reserve(self, tokens: int, pads: Sequence[int] | None = None, pads_count: bool = False) -> None:
        """Make room for `tokens` more slots, of which row b's first pads[b] are padding.

        What such a row holds moves up against its first real token. `pads_count`: padding fills the window too.
        """
        if self.slots + tokens > self._capacity:
            self._make_room(tokens)
        self._pads = list(pads) if pads is not None else [0] * self.rows
        for row, shift in enumerate(self._pads):
            if not shift:
                continue
            first, empty = self.first[row], self.tokens(row) == 0
            if not empty:
                for layer in self._layers.values():
                    layer.change(lambda tensor, r=row, f=first, s=shift: self._shift(tensor, r, f, s))  # type: ignore[misc]
            self.first[row] += shift
            if not (pads_count and empty):
                self.begin[row] += shift

    def _shift(self, tensor: Tensor, row: int, first: int, shift: int) -> Tensor:
        tensor[row, :, first + shift : self.slots + shift] = tensor[row, :, first : self.slots].clone()
        return tensor

    def _make_room(self, tokens: int) -> None:
        start = min([*self.first, self.slots])
        live = self.slots - start
        capacity = self._capacity if 2 * (live + tokens) <= self._capacity else max(_LEAST, 2 * live + tokens)

        def moved(tensor: Tensor) -> Tensor:
            room = tensor.new_empty(*tensor.shape[:2], capacity, tensor.shape[3])
            room[:, :, :live] = tensor[:, :, start : self.slots]
            return room

        for layer in self._layers.values():
            layer.change(moved)
        self._capacity, self.slots = capacity, live
        self.first = [first - start for first in self.first]
        self.begin = [begin - start for begin in self.begin]

    def push(self, layer: int, key: Tensor, value: Tensor) -> Visible:
        """Write this step's keys and values [B, K, n, D] of one layer; what its queries may see."""
        policy, end = self.policies[layer], self.slots + key.shape[2]
        held = self._layers.get(layer)
        if held is None:
            held = self._layers[layer] = self._new(policy, key, value)
        for row, pad in enumerate(self._pads) if any(self._pads) else ():
            held.key[row, :, self.slots + pad : end] = key[row, :, pad:]
            held.value[row, :, self.slots + pad : end] = value[row, :, pad:]
        if not any(self._pads):
            held.key[:, :, self.slots : end] = key
            held.value[:, :, self.slots : end] = value
        start = min(self.first)
        self._rotate(held, policy, start if held.stale else self.slots, end)
        held.stale = False
        equal = max(self.first) == start
        return Visible(
            near=held.near[:, :, start:end],
            far=None if held.far is None else held.far[:, :, start:end],
            value=held.value[:, :, start:end],
            first=None if equal else torch.tensor([first - start for first in self.first], device=self.device),
        )

    def _new(self, policy: Policy, key: Tensor, value: Tensor) -> _Layer:
        rows, heads, _, dims = key.shape
        room = (rows, heads, self._capacity, dims)
        made = key.new_zeros(room)
        return _Layer(
            key=made,
            value=value.new_zeros(rows, heads, self._capacity, value.shape[3]),
            near=key.new_zeros(room) if policy.rotates else made,
            far=key.new_zeros(room) if policy.self_extend is not None else None,
        )

    def _rotate(self, held: _Layer, policy: Policy, start: int, end: int) -> None:
        """Bring the rotated copies of slots start..end up to date."""
        if not policy.rotates:
            return
        fresh = held.key[:, :, start:end]
        held.near[:, :, start:end] = rotate(fresh, self._angles_of(policy, "near", start, end, fresh))
        if held.far is not None:
            held.far[:, :, start:end] = rotate(fresh, self._angles_of(policy, "far", start, end, fresh))

    def _angles_of(self, policy: Policy, kind: str, start: int, end: int, like: Tensor) -> Angles:
        # Layers of one kind share the angles of a step.
        name = (id(policy.rope), kind, start)
        if name not in self._angles:
            positions = self.positions(start, end)
            if kind == "far":
                assert policy.self_extend is not None
                positions = far_keys(positions, policy.self_extend)
            self._angles[name] = policy.angles(positions, like)
        return self._angles[name]

    def positions(self, start: int, end: int) -> Tensor:
        """Where slots start..end stand in their rows: [end - start] if all rows agree, else [B, end - start]."""
        slots = torch.arange(start, end, device=self.device)
        if len(set(self.first)) == 1:
            return (slots - self.first[0]).clamp(min=0)
        return (slots - torch.tensor(self.first, device=self.device)[:, None]).clamp(min=0)

    def query_angles(self, policy: Policy, tokens: int, like: Tensor) -> Angles:
        """The angles of the step's queries in their window; before `advance`."""
        return self._angles_of(policy, "near", self.slots, self.slots + tokens, like)

    def advance(self, tokens: int) -> None:
        """The step is over: its tokens are part of the window."""
        self.slots += tokens
        self._pads = [0] * self.rows
        self._angles.clear()
