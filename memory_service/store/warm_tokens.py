"""The tokens of documents in RAM: rows of slabs, written behind each other, dead once their document is gone."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from memory_service.attention.slabs import Run, Slab
from memory_service.types.specs import MemorySpec

Spans = list[tuple[Slab, Run]]


class WarmTokens:
    """One memory's slabs. One thread writes at a time; others read what is live."""

    def __init__(self, spec: MemorySpec, slab_rows: int, device: torch.device, state: threading.Lock):
        """`state` is held where the list of slabs changes."""
        self.slabs: list[Slab] = []
        self._spec = spec
        self._slab_rows = slab_rows
        self._device = device
        self._state = state

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs)

    def begin_slab(self) -> None:
        """Write what comes next into a new slab. Hold the state's lock."""
        self.slabs.append(Slab(self._spec, self._slab_rows, self._device))

    def write(self, keys: Tensor, values: Tensor, ids: Tensor | None) -> Spans:
        """Copy tokens [L, H, T, D] into slabs, not yet live."""
        spans: Spans = []
        done, tokens = 0, keys.shape[2]
        layers = range(len(self._spec.layers))
        while done < tokens:
            if not self.slabs or not self.slabs[-1].room:
                with self._state:
                    self.begin_slab()
            slab = self.slabs[-1]
            size = min(tokens - done, slab.room)
            first = max(slab.used)
            piece = slice(done, done + size)
            slab.write(layers, first, keys[:, :, piece], values[:, :, piece], None if ids is None else ids[piece])
            append_span(spans, slab, (first, first + size))
            done += size
        return spans

    def move(self, slab: Slab, run: Run) -> Spans:
        """Copy rows to the end, not yet live."""
        read = [slab.read(layer, run) for layer in range(len(self._spec.layers))]
        return self.write(torch.stack([r[0] for r in read]), torch.stack([r[1] for r in read]), read[0][2])


def append_span(spans: Spans, slab: Slab, run: Run) -> None:
    """Add rows to spans, joined with the last where they follow it."""
    if spans and spans[-1][0] is slab and spans[-1][1][1] == run[0]:
        spans[-1] = (slab, (spans[-1][1][0], run[1]))
    else:
        spans.append((slab, run))


def bury(spans: Spans) -> None:
    """Count rows as dead that were written and never became live."""
    for slab, run in spans:
        slab.dead += run[1] - run[0]
