"""The window: the newest keys and values of every layer, un-rotated, with rotated copies so that a step rotates once.

All rows end at the same slot; a row that is shorter, or whose oldest tokens went to memory, begins later. Rows come
and go: there is room for more rows than there are, and the last row takes the place of one that leaves.
B rows, R rows there is room for, K key/value heads, S slots, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model_worker.positions.policy import Policy
from model_worker.positions.rope import Angles, rotate
from model_worker.positions.self_extend import far_keys

_LEAST = 64  # Slots of a new window …
_LEAST_ROWS = 8  # … and rows of one that rows join.


@dataclass(slots=True, eq=False)
class _Layer:
    """One layer's room, [R, K, capacity, D] each."""

    key: Tensor  # As projected.
    value: Tensor
    near: Tensor  # Rotated to their place; the same tensor as `key` where nothing rotates.
    far: Tensor | None  # Rotated to their group's place (Self-Extend).
    stale: set[int] = field(default_factory=set)  # Rows that began anew: their rotated copies must be made again.

    def tensors(self) -> Iterator[Tensor]:
        """All of them, each once."""
        yield from (self.key, self.value)
        if self.near is not self.key:
            yield self.near
        if self.far is not None:
            yield self.far

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
        self._angles: dict[tuple[int, str, int, int | None], Angles] = {}
        self._places: dict[tuple[int, int], Tensor] = {}  # Of this step; as are the angles, and the next.
        self._firsts: dict[int, Tensor] = {}

    @property
    def rows(self) -> int:
        return len(self.first)

    def resize(self, rows: int) -> None:
        """Start empty with this many rows."""
        self.first, self.begin, self._pads = [0] * rows, [0] * rows, [0] * rows
        self.slots = self._capacity = 0
        self._layers.clear()
        self._forget()

    def _forget(self) -> None:
        """What was made for a step is not true any more."""
        self._angles.clear()
        self._places.clear()
        self._firsts.clear()

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
                layer.stale.add(row)
            self._forget()

    def reorder(self, chosen: Sequence[int]) -> None:
        """Rows become copies of the chosen ones."""
        index = torch.tensor(list(chosen), device=self.device)
        for layer in self._layers.values():
            layer.change(lambda tensor: tensor.index_select(0, index))
            layer.stale = {place for place, row in enumerate(chosen) if row in layer.stale}
        self.first, self.begin = [self.first[i] for i in chosen], [self.begin[i] for i in chosen]
        self._pads = [0] * len(chosen)
        self._forget()

    # --- rows come and go, between steps ---

    def admit(self, other: Window) -> None:
        """Take the rows of a window of the same layers in; `other` is empty then.

        Costs a copy of what they hold, and of all rows when there is no room for more.
        """
        if not self.rows:
            self.first, self.begin, self._pads = other.first, other.begin, other._pads
            self.slots, self._capacity, self._layers = other.slots, other._capacity, other._layers
            other._layers = {}
        elif other.rows:
            start = min(other.first)
            live, rows = other.slots - start, self.rows
            room = max((len(layer.key) for layer in self._layers.values()), default=0)
            if rows + other.rows > room or live > self.slots:
                self._make_room(1, end=live, rows=max(room, _LEAST_ROWS, 2 * rows, rows + other.rows))
            into = slice(rows, rows + other.rows)
            for number, layer in self._layers.items():
                theirs = other._layers[number]
                for mine, tensor in zip(layer.tensors(), theirs.tensors(), strict=True):
                    # What stood there before is nobody's, but a number that is none would still be seen through a mask.
                    mine[into, :, : self.slots - live] = 0
                    mine[into, :, self.slots - live : self.slots] = tensor[: other.rows, :, start : other.slots]
                layer.stale |= {rows + row for row in theirs.stale}
            shift = self.slots - other.slots
            self.first += [first + shift for first in other.first]
            self.begin += [begin + shift for begin in other.begin]
            self._pads += [0] * other.rows
        other.resize(0)
        self._forget()

    def leave(self, row: int) -> None:
        """Forget a row; the last one takes its place. Costs a copy of what that one holds."""
        last = self.rows - 1
        for layer in self._layers.values():
            if row != last:
                for tensor in layer.tensors():
                    tensor[row, :, : self.slots] = tensor[last, :, : self.slots]
            moved = last in layer.stale
            layer.stale -= {row, last}
            if moved and row != last:
                layer.stale.add(row)
        for per_row in (self.first, self.begin, self._pads):
            per_row[row] = per_row[last]
            per_row.pop()
        if not self.rows:
            self.resize(0)
        self._forget()

    def copy(self, row: int) -> Window:
        """A row alone, as a window of its own."""
        alone, first = Window(self.policies, self.device), self.first[row]
        alone.resize(1)
        alone.slots = alone._capacity = self.slots - first
        alone.begin = [self.begin[row] - first]
        for number, layer in self._layers.items():
            one = replace(layer, stale={0} if row in layer.stale else set())
            one.change(lambda tensor: tensor[row : row + 1, :, first : self.slots].clone())
            alone._layers[number] = one
        return alone

    def forget_newest(self, tokens: int) -> None:
        """Take the newest tokens of every row back."""
        self.slots -= tokens
        self._forget()

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
            self._forget()
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

    def _make_room(self, tokens: int, end: int = 0, rows: int = 0) -> None:
        """Move to tensors with room for more slots and rows, all rows ending at slot `end` or later."""
        start = min([*self.first, self.slots])
        live = self.slots - start
        end = max(end, live)
        capacity = self._capacity if 2 * (end + tokens) <= self._capacity else max(_LEAST, 2 * end + tokens)

        def moved(tensor: Tensor) -> Tensor:
            # Zeros: a slot that is masked is still multiplied, and memory as it comes may hold what is not a number.
            shape = (max(rows, len(tensor)), tensor.shape[1], capacity, tensor.shape[3])
            room = tensor.new_zeros(shape)
            room[: self.rows, :, end - live : end] = tensor[: self.rows, :, start : self.slots]
            return room

        for layer in self._layers.values():
            layer.change(moved)
        shift = end - self.slots
        self._capacity, self.slots = capacity, end
        self.first = [first + shift for first in self.first]
        self.begin = [begin + shift for begin in self.begin]
        self._forget()

    def push(self, layer: int, key: Tensor, value: Tensor) -> Visible:
        """Write this step's keys and values [B, K, n, D] of one layer; what its queries may see."""
        policy, end = self.policies[layer], self.slots + key.shape[2]
        held = self._layers.get(layer)
        if held is None:
            held = self._layers[layer] = self._new(policy, key, value)
        rows, padded = self.rows, any(self._pads)
        for row, pad in enumerate(self._pads) if padded else ():
            held.key[row, :, self.slots + pad : end] = key[row, :, pad:]
            held.value[row, :, self.slots + pad : end] = value[row, :, pad:]
        if not padded:
            held.key[:rows, :, self.slots : end] = key
            held.value[:rows, :, self.slots : end] = value
        self._rotate(held, policy, end)
        start = min(self.first)
        return Visible(
            near=held.near[:rows, :, start:end],
            far=None if held.far is None else held.far[:rows, :, start:end],
            value=held.value[:rows, :, start:end],
            first=None if max(self.first) == start else self._first_of(start),
        )

    def _first_of(self, start: int) -> Tensor:
        if start not in self._firsts:
            self._firsts[start] = torch.tensor([first - start for first in self.first], device=self.device)
        return self._firsts[start]

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

    def _rotate(self, held: _Layer, policy: Policy, end: int) -> None:
        """Bring the rotated copies up to `end` up to date."""
        if not policy.rotates:
            held.stale.clear()
            return
        if len(held.stale) == self.rows:
            self._rotate_slots(held, policy, min(self.first), end)
        else:
            for row in held.stale:
                self._rotate_slots(held, policy, self.first[row], self.slots, row)
            self._rotate_slots(held, policy, self.slots, end)
        held.stale.clear()

    def _rotate_slots(self, held: _Layer, policy: Policy, start: int, end: int, row: int | None = None) -> None:
        """Rotated copies of slots start..end of one row, or of all."""
        rows = slice(0, self.rows) if row is None else slice(row, row + 1)
        fresh = held.key[rows, :, start:end]
        held.near[rows, :, start:end] = rotate(fresh, self._angles_of(policy, "near", start, end, fresh, row))
        if held.far is not None:
            held.far[rows, :, start:end] = rotate(fresh, self._angles_of(policy, "far", start, end, fresh, row))

    def _angles_of(
        self, policy: Policy, kind: str, start: int, end: int, like: Tensor, row: int | None = None
    ) -> Angles:
        # Layers of one kind share the angles of a step.
        name = (id(policy.rope), kind, start, row)
        if name not in self._angles:
            if row is None:
                positions = self.positions(start, end)
            else:
                positions = torch.arange(start - self.first[row], end - self.first[row], device=self.device)
            if kind == "far":
                assert policy.self_extend is not None
                positions = far_keys(positions, policy.self_extend)
            self._angles[name] = policy.angles(positions, like)
        return self._angles[name]

    def positions(self, start: int, end: int) -> Tensor:
        """Where slots start..end stand in their rows: [end - start] if all rows agree, else [B, end - start]."""
        if (start, end) not in self._places:
            slots = torch.arange(start, end, device=self.device)
            first = self.first[0] if len(set(self.first)) == 1 else self._first_of(0)[:, None]
            self._places[start, end] = (slots - first).clamp_(min=0)
        return self._places[start, end]

    def query_angles(self, policy: Policy, tokens: int, like: Tensor) -> Angles:
        """The angles of the step's queries in their window; before `advance`."""
        return self._angles_of(policy, "near", self.slots, self.slots + tokens, like)

    def advance(self, tokens: int) -> None:
        """The step is over: its tokens are part of the window."""
        self.slots += tokens
        self._pads = [0] * self.rows
        self._forget()
