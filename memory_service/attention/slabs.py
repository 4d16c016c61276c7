"""Keys and values in RAM: the tokens of many documents, or of one session, side by side.

How tokens came in leaves no trace in what a query costs: 512 small appends and one large document fill the same slab.
Rows are only ever added behind the ones a reader knows, so readers take no lock.

L layers, H heads, D head_dim.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from memory_service.attention.scan import Chunk
from memory_service.types.specs import MemorySpec

Run = tuple[int, int]  # Half-open range of rows.

_FIRST_ROWS = 1024
_SLAB_BYTES = 256 << 20


def slab_rows(spec: MemorySpec, limit_bytes: int = _SLAB_BYTES) -> int:
    """How many tokens a slab holds at most, so that it stays within `limit_bytes`, but for wide tokens."""
    return max(_FIRST_ROWS, min(limit_bytes, _SLAB_BYTES) // spec.bytes_per_token // _FIRST_ROWS * _FIRST_ROWS)


class Slab:
    """Up to `capacity` tokens of one memory. One writer at a time; any number of readers."""

    def __init__(self, spec: MemorySpec, capacity: int, device: torch.device):
        self.spec = spec
        self.capacity = capacity
        self.used = [0] * len(spec.layers)  # Rows filled, per layer: a session's layers fill one after the other.
        self.dead = 0  # Rows of dropped documents.
        self.runs: list[Run] = []  # Rows of live documents, ascending, neighbours joined.
        self._device = device
        self._rows = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._norms = torch.zeros(len(spec.layers), spec.kv_heads)
        self._ids = torch.empty(0, dtype=torch.int64)
        self._starts: list[int] = []  # First rows of documents, ascending; …
        self._sources: list[str] = []  # … their ids; …
        self._offsets: list[int] = []  # … and which token of the document stands in that row.
        self._grow(min(_FIRST_ROWS, capacity))

    @property
    def room(self) -> int:
        """Rows that can still be added to every layer."""
        return self.capacity - max(self.used)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values written."""
        return sum(self.used) * (self.spec.bytes_per_token // len(self.spec.layers))

    def write(self, layers: range | list[int], first: int, keys: Tensor, values: Tensor, ids: Tensor | None) -> None:
        """Put tokens [len(layers), H, T, D] at rows `first`… of these layers (by index). Invisible until counted in."""
        tokens = keys.shape[2]
        self._grow(first + tokens)
        rows = slice(first, first + tokens)
        norms = self._norms.clone()
        for place, layer in enumerate(layers):
            self._keys[layer][:, rows].copy_(keys[place])
            self._values[layer][:, rows].copy_(values[place])
            norms[layer] = torch.maximum(norms[layer], largest_norms(keys[place]))
            self.used[layer] = first + tokens
        self._norms = norms
        if ids is not None:  # Rows begin as zeros; what another layer's append wrote stays.
            self._ids[rows] = ids

    def admit(self, source: str, offset: int, run: Run) -> None:
        """Make written rows live: they hold tokens `offset`… of this document."""
        self._starts.append(run[0])
        self._sources.append(source)
        self._offsets.append(offset)
        if self.runs and self.runs[-1][1] == run[0]:
            self.runs[-1] = (self.runs[-1][0], run[1])
        else:
            self.runs.append(run)

    def drop(self, run: Run) -> None:
        """Take rows out of the live ones; they stay in RAM until the slab is written anew."""
        place = bisect_right(self.runs, run[0], key=lambda known: known[0]) - 1
        start, stop = self.runs[place]
        self.runs[place : place + 1] = [(a, b) for a, b in ((start, run[0]), (run[1], stop)) if a < b]
        self.dead += run[1] - run[0]

    def chunk(self, layer: int, runs: tuple[Run, ...], base: int) -> Chunk:
        """These rows of a layer, for the engine."""
        norm = self._norms[layer]
        return Chunk(self._keys[layer], self._values[layer], runs, norm.to(self._device), base)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Which document and token stands in each row: (index into the names, token offset, names)."""
        place = np.searchsorted(np.asarray(self._starts), rows, side="right") - 1
        return place, rows - np.asarray(self._starts)[place] + np.asarray(self._offsets)[place], self._sources

    def read(self, layer: int, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [H, T, D] and token ids [T] of consecutive rows, on the CPU."""
        rows = slice(*run)
        return self._keys[layer][:, rows].cpu(), self._values[layer][:, rows].cpu(), self._ids[rows].clone()

    def _grow(self, rows: int) -> None:
        if rows <= self._rows:
            return
        # Doubling: a token is copied about once more than it is written, and a small session stays small.
        target = min(self.capacity, max(rows, 2 * self._rows))
        shape = (self.spec.kv_heads, target, self.spec.head_dim)
        for tensors in (self._keys, self._values):
            grown = []
            for layer in range(len(self.spec.layers)):
                tensor = torch.empty(shape, dtype=self.spec.dtype.torch, device=self._device)
                if tensors:
                    tensor[:, : self._rows] = tensors[layer]
                grown.append(tensor)
            tensors[:] = grown
        ids = torch.zeros(target, dtype=torch.int64)
        ids[: self._rows] = self._ids
        self._ids = ids
        self._rows = target


def largest_norms(keys: Tensor) -> Tensor:
    """[H]: a float32 upper bound for the norm of each head's keys [H, T, D]."""
    if not keys.shape[1]:
        return torch.zeros(keys.shape[0])
    norms: Tensor = torch.linalg.vector_norm(keys, dim=2, dtype=torch.float32).amax(1)
    return norms.cpu() * (1 + 1e-5)  # The norm itself is rounded.


def read_spans(spans: Sequence[tuple[Slab, Run]], layer: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `first`… of what these spans hold in order: keys and values [H, T, D] and token ids [T], on the CPU."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    offset = 0
    for slab, run in spans:
        low, high = max(first - offset, 0), min(first + count - offset, run[1] - run[0])
        if low < high:
            found.append(slab.read(layer, (run[0] + low, run[0] + high)))
        offset += run[1] - run[0]
    keys, values, ids = zip(*found, strict=True)
    return torch.cat(keys, dim=1), torch.cat(values, dim=1), torch.cat(ids)


def join(runs: list[Run]) -> tuple[Run, ...]:
    """Sort ranges and join neighbours."""
    joined: list[Run] = []
    for start, stop in sorted(runs):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return tuple(joined)


def clip(runs: tuple[Run, ...], stop: int) -> tuple[Run, ...]:
    """The part of ascending ranges below `stop`."""
    kept = runs[: bisect_left(runs, (stop, stop))]
    return tuple((a, min(b, stop)) for a, b in kept)
