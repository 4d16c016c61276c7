"""A document on its way in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from memory_service.types.documents import DocumentInfo


@dataclass(frozen=True, slots=True)
class Upload:
    """A document on its way in: which bytes the service still misses."""

    id: str
    part_tokens: int  # Tokens of every part but the last.
    parts: int
    chunk_bytes: int  # Chunks start at multiples of this within a part and have this length, but for a part's last.
    missing: tuple[tuple[int, int, int], ...]  # (part, first chunk, chunks) still to send.
    expires_at: float
    committed: DocumentInfo | None = None  # Set when the request id was committed before.


class Chunk(NamedTuple):
    """A piece of a document part's payload."""

    part: int
    offset: int  # Bytes from the start of the part's payload.
    crc32: int
    data: bytes | memoryview
