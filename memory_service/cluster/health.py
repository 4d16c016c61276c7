"""Which replicas answered lately, so that calls go first where they will be answered."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LOOK_S = 1.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 5.0


@dataclass(slots=True)
class _Down:
    failures: int
    again: float  # When one call may try it again.


class Health:
    """What one client knows of its cluster's processes. Thread-safe."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._lock = threading.Lock()
        self._down: dict[str, _Down] = {}
        self._owed: dict[str, int] = {}
        self._looked = -math.inf
        # Clients begin at different replicas; one client at the same, which may remember its last question.
        self._turn = random.randrange(1 << 16)

    def order(self, addresses: Sequence[str]) -> list[str]:
        """The replicas of a shard, in the order in which to ask them: all of them, those that failed lately last."""
        turned = [addresses[(self._turn + place) % len(addresses)] for place in range(len(addresses))]
        with self._lock:
            now = self._now()
            well, ill = [], []
            for address in turned:
                down = self._down.get(address)
                if down is None:
                    well.append(address)
                elif down.again <= now:
                    # Half open: this call tries, others do not until it is known.
                    down.again = now + _pause_s(down.failures)
                    well.append(address)
                else:
                    ill.append(address)
            # Who missed a write of ours answers only if nobody else does.
            return sorted(well, key=lambda one: one in self._owed) + ill

    def well(self, address: str) -> bool:
        """Whether the last call to it was answered."""
        with self._lock:
            return address not in self._down

    def up(self, address: str) -> None:
        """It answered."""
        with self._lock:
            self._down.pop(address, None)

    def failed(self, address: str) -> None:
        """It did not answer."""
        with self._lock:
            known = self._down.get(address)
            failures = known.failures + 1 if known else 1
            self._down[address] = _Down(failures, self._now() + _pause_s(failures))

    def may_look(self) -> bool:
        """Whether it is time to look for another shard map, for a shard that is still missing."""
        with self._lock:
            now = self._now()
            if now - self._looked < LOOK_S:
                return False
            self._looked = now
            return True

    def owe(self, address: str, generation: int) -> None:
        """It missed a change that others have, and must be told."""
        with self._lock:
            self._owed[address] = max(generation, self._owed.get(address, 0))

    def owed(self, address: str) -> int:
        """The last change it missed and was not told of yet; 0 if there is none."""
        with self._lock:
            return self._owed.get(address, 0)

    def paid(self, address: str, generation: int) -> None:
        """It was told of this one."""
        with self._lock:
            if self._owed.get(address) == generation:
                del self._owed[address]


def _pause_s(failures: int) -> float:
    return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 1)))
