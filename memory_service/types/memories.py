"""A memory, and figures of it."""

from __future__ import annotations

from dataclasses import dataclass

from memory_service.types.specs import MemorySpec


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """One memory as its owner sees it."""

    name: str
    spec: MemorySpec
    created_at: float  # Seconds since the epoch.
    documents: int = 0
    tokens: int = 0
    bytes: int = 0  # Of committed keys, values and token ids.


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of one memory (or, with an empty name, of all the caller's memories)."""

    memory: str
    documents: int
    tokens: int
    bytes: int
    segments: int
    dead_bytes: int  # Of deleted documents, until compaction.
    resident_bytes: int
    resident_tokens: int
    indexed_tokens: int
    index_bytes: int
    sessions: int
    session_bytes: int
