"""Writers of a memory kept waiting for a moment, so that several processes can note what they have at the same one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from memory_service.types.callers import Cancel

Noted = TypeVar("Noted")

_LOOK_S = 0.02  # How soon a cancelled hold ends.


class Hold:
    """Holds a lock for whoever comes back to release it, at most so long. Thread-safe."""

    def __init__(self, lock: AbstractContextManager[Any], seconds: float, cancel: Cancel):
        """A hold that is cancelled ends as one that nobody released in time."""
        self._lock = lock
        self._seconds = seconds
        self._cancel = cancel
        self._state = threading.Lock()  # Guards `_released`, until `_ended` is set.
        self._released = False
        self._ended = threading.Event()
        self.until = 0.0  # Seconds since the epoch.

    @property
    def holds(self) -> bool:
        return not self._ended.is_set()

    def begin(self, note: Callable[[], Noted]) -> Noted:
        """Take the lock, call `note` under it, and keep it. Raises what `note` raises, and holds nothing then."""
        noted: Future[Noted] = Future()
        # A lock belongs to a thread, and the calling one has to answer.
        threading.Thread(target=self._keep, args=(note, noted), name="fot-hold", daemon=True).start()
        return noted.result()

    def release(self) -> bool:
        """Let the writers go. False if that was too late: some went before."""
        with self._state:
            if self.holds:
                self._released = True
                self._ended.set()
            return self._released

    def wait(self) -> bool:
        """Wait for the end: whether it was released."""
        self._ended.wait()
        return self._released

    def _keep(self, note: Callable[[], Noted], noted: Future[Noted]) -> None:
        with self._lock:
            try:
                found = note()
            except BaseException as error:
                self._give_up()
                noted.set_exception(error)
                return
            end = time.monotonic() + self._seconds
            self.until = time.time() + self._seconds
            noted.set_result(found)
            while not self._ended.wait(min(_LOOK_S, max(0.0, end - time.monotonic()))):
                if self._cancel.cancelled or time.monotonic() >= end:
                    self._give_up()

    def _give_up(self) -> None:
        with self._state:
            self._ended.set()
