"""Who calls, what they may, and whether they still wait."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from enum import StrEnum

from memory_service.errors import Cancelled, DeadlineExceeded


class Role(StrEnum):
    READ = "read"  # Look, attend, search, fetch; hold sessions.
    WRITE = "write"  # And store and delete documents.
    ADMIN = "admin"  # And create and delete memories; start operations.

    @property
    def rank(self) -> int:
        return ("read", "write", "admin").index(self.value)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls: from the credential only, never from the request."""

    tenant: str
    role: Role


class Cancel:
    """Asks long work to stop: by deadline, by the caller's leaving, or both. Checked between blocks."""

    def __init__(self, timeout_s: float | None = None):
        self.deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded if the work is no longer wanted."""
        if self._event.is_set():
            raise Cancelled("the caller cancelled")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineExceeded("the deadline passed before the work was done; give more time or a smaller scope")
