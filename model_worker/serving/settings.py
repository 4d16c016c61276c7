"""How much a worker takes on at once."""

from __future__ import annotations

from dataclasses import dataclass

from memory_service.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """Limits of a batcher."""

    max_rows: int = 32  # Requests read and answered at once; others wait.
    max_queued: int = 256  # Waiting requests; one more is refused.
    window_bytes: int = 2 << 30  # For the windows of all rows and kept conversations; one row is always let in.
    step_tokens: int = 256  # Of prompts, fed between two tokens of the answers under way.
    idle_tokens: int = 8192  # The same while no answer is under way; a cancellation waits as long.
    conversations: int = 64  # Kept after their answers …
    conversation_s: float = 600.0  # … for so long after the last one.
    max_stops: int = 16  # Texts that may end an answer.

    def __post_init__(self) -> None:
        counts = (self.max_rows, self.max_queued, self.window_bytes, self.step_tokens, self.idle_tokens)
        if min(counts) < 1 or self.conversations < 0 or self.conversation_s <= 0 or self.max_stops < 0:
            raise InvalidArgument(f"a batcher needs room for at least one row, request and token, got {self}")
