"""Long-running work on a memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class OperationKind(StrEnum):
    INDEX = "index"
    COMPACT = "compact"
    VERIFY = "verify"
    SNAPSHOT = "snapshot"
    RESTORE = "restore"


class OperationState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Operation:
    """Long-running work on a memory."""

    id: str
    memory: str
    kind: OperationKind
    state: OperationState
    done: int  # Units of work finished (tokens or bytes) of `total`.
    total: int
    message: str  # A sentence on the outcome or the error.
    created_at: float
    updated_at: float
    snapshot: str = ""  # Of SNAPSHOT and RESTORE: the snapshot's id.
    held_until: float = 0.0  # In the answer of CreateSnapshot: when writers go on at the latest. 0: they are not held.
