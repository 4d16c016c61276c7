"""The byte budget for hot keys and values, shared among memories."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Resident(Protocol):
    """Something that holds bytes of the budget and can give them back."""

    @property
    def last_used(self) -> float:
        """When it last answered a call, on the monotonic clock."""

    @property
    def resident_bytes(self) -> int: ...

    def send_away(self) -> bool:
        """Give some bytes back; False if it cannot now."""


class Residency:
    """Shares the byte budget for hot keys and values among memories; the longest unused give way."""

    _IDLE_S = 10.0  # A memory used more recently than this keeps what it has: no thrashing between two busy ones.

    def __init__(self, budget: int):
        self.budget = budget
        self.used = 0
        self._lock = threading.Lock()
        self._memories: list[Resident] = []

    def join(self, memory: Resident) -> None:
        with self._lock:
            self._memories.append(memory)

    def leave(self, memory: Resident) -> None:
        with self._lock:
            self._memories.remove(memory)

    def take(self, nbytes: int, asker: Resident) -> bool:
        """Reserve bytes, sending idle memories' slabs away if that makes room; False if it does not."""
        while True:
            with self._lock:
                if self.used + nbytes <= self.budget:
                    self.used += nbytes
                    return True
                idle = time.monotonic() - self._IDLE_S
                others = [m for m in self._memories if m is not asker and m.resident_bytes and m.last_used < idle]
            if not others or not min(others, key=lambda memory: memory.last_used).send_away():
                return False

    def give(self, nbytes: int) -> None:
        with self._lock:
            self.used -= nbytes
