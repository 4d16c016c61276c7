"""The catalogue's rows, as the store sees them. `pk` is a primary key, never used twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memory_service.storage.parts import SegmentRef
from memory_service.types.conditions import Scalar
from memory_service.types.specs import MemorySpec


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """A memory; `key` names its directory."""

    key: str
    tenant: str
    name: str
    spec: MemorySpec
    created_at: float
    next_generation: int = 1


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """A committed document; `parts` are (segment pk, part index) in token order."""

    pk: int
    id: str
    generation: int
    tokens: int
    metadata: Mapping[str, Scalar]
    committed_at: float
    request_id: str
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """A segment file the catalogue knows."""

    pk: int
    ref: SegmentRef


@dataclass(frozen=True, slots=True)
class RequestRow:
    """What a request id was answered; written in the transaction that did the work."""

    tenant: str
    request_id: str
    kind: str
    memory_key: str
    fingerprint: str  # Of the request's content: the same id with another content is a caller's mistake.
    answer: str  # JSON.
    created_at: float = 0.0  # Seconds since the epoch; 0 means now.


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit wrote, with primary keys; documents in the order of their first part."""

    documents: tuple[DocumentRow, ...]
    segments: tuple[SegmentRow, ...]
