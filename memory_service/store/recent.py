"""Top keys found moments ago, for the second question about them: how much of a top k other shards leave to this one.

Nothing depends on it: what is not here is found again.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from hashlib import blake2b

from torch import Tensor

from memory_service.attention.provenance import Provenance

SIZE_BYTES = 64 << 20
_LARGEST_BYTES = 16 << 20  # Of one entry.
_SECONDS = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The best keys of one group's rows, before any of them is left out."""

    scores: Tensor  # [H, R, K]
    rows: Tensor  # [H, R, K] with the bases of `provenance`
    values: Tensor  # [H, R, K, D]
    provenance: Provenance
    name: str  # Of the engine.

    @property
    def nbytes(self) -> int:
        return self.scores.nbytes + self.rows.nbytes + self.values.nbytes


class Recent:
    """The last findings, a few seconds and a few megabytes of them. Thread-safe."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._lock = threading.Lock()
        self._nbytes = 0
        self._found: OrderedDict[Hashable, tuple[float, Found]] = OrderedDict()

    def keep(self, key: Hashable, found: Found) -> None:
        """Remember a finding; its tensors must not change any more."""
        if found.nbytes > _LARGEST_BYTES:
            return
        with self._lock:
            self._drop(key)
            self._found[key] = (self._now(), found)
            self._nbytes += found.nbytes
            self._forget()

    def take(self, key: Hashable) -> Found | None:
        """A finding, once: nobody asks a third time."""
        with self._lock:
            known = self._found.get(key)
            self._drop(key)
        return None if known is None or known[0] < self._now() - _SECONDS else known[1]

    def expire(self) -> None:
        """Let go of what is too old, and of the slabs it was found in."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        oldest = self._now() - _SECONDS
        while self._found and (self._nbytes > SIZE_BYTES or next(iter(self._found.values()))[0] < oldest):
            self._drop(next(iter(self._found)))

    def _drop(self, key: Hashable) -> None:
        known = self._found.pop(key, None)
        if known is not None:
            self._nbytes -= known[1].nbytes


def digest(queries: Tensor) -> bytes:
    """Equal for equal queries."""
    plain = queries.detach().cpu().float().contiguous()
    return blake2b(plain.numpy().tobytes() + repr(tuple(plain.shape)).encode(), digest_size=16).digest()
