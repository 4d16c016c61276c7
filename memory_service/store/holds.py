"""Writers of a memory kept waiting for a moment, so that several processes can note what they have at the same one."""

from __future__ import annotations

import threading
import time

from memory_service.types.callers import Cancel

_LOOK_S = 0.02  # How soon a cancelled hold ends.


class Hold:
    """Holds until it is released, cancelled, or its time is over. Thread-safe.

    It has one end: who is told that it holds no more can rely on that nobody releases it later, and who released it on
    that no writer went before.
    """

    def __init__(self, seconds: float, cancel: Cancel):
        self.until = time.time() + seconds  # Seconds since the epoch.
        self._end = time.monotonic() + seconds
        self._cancel = cancel
        self._state = threading.Lock()
        self._ended = threading.Event()
        self._released = False

    @property
    def holds(self) -> bool:
        """Whether writers have to wait."""
        with self._state:
            if self._cancel.cancelled or time.monotonic() >= self._end:
                self._ended.set()
            return not self._ended.is_set()

    @property
    def released(self) -> bool:
        """Whether it ended by `release`."""
        return self._released

    def release(self) -> bool:
        """Let the writers go. False if that was too late: some may have gone before."""
        if self.holds:
            with self._state:
                self._released = self._released or not self._ended.is_set()
                self._ended.set()
        return self._released

    def wait(self, timeout_s: float = float("inf")) -> bool:
        """Wait for the end, at most so long: whether it has come."""
        end = time.monotonic() + timeout_s
        while self.holds:
            left = min(_LOOK_S, end - time.monotonic())
            if left <= 0:
                return False
            self._ended.wait(left)
        return True
