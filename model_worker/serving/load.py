"""How busy a worker is, for metrics and for whoever decides how many workers there are."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

_SPAN_S = 10.0  # Over which rates are told.


@dataclass(frozen=True, slots=True)
class Load:
    """A moment of a batcher."""

    queued: int  # Requests that wait for a row.
    reading: int  # Whose prompts are being read.
    writing: int  # Whose answers are under way.
    max_rows: int
    conversations: int  # Kept for their next prompt.
    window_bytes: int  # Set aside for windows.
    tokens_per_s: float  # Of answers, over the last seconds.
    prompt_tokens_per_s: float
    steps: int  # Since the start, as all that follows.
    prompt_tokens: int  # Read; without those taken over from conversations.
    cached_tokens: int
    completion_tokens: int
    finished: int
    cancelled: int
    failed: int

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return self.reading + self.writing


class Rate:
    """How many a second, over the last seconds."""

    def __init__(self) -> None:
        self.total = 0
        self._since: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def add(self, count: int) -> None:
        """Count some more."""
        self.total += count
        now = time.monotonic()
        if now - self._since[-1][0] > _SPAN_S / 20:
            self._since.append((now, self.total))
            while now - self._since[0][0] > _SPAN_S:
                self._since.popleft()

    def per_s(self) -> float:
        """The mean of the last seconds; 0 if nothing came in them."""
        now = time.monotonic()
        recent = [(at, total) for at, total in tuple(self._since) if now - at <= _SPAN_S]
        if not recent or now - recent[0][0] < 1e-3:
            return 0.0
        return (self.total - recent[0][1]) / (now - recent[0][0])
