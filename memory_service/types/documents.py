"""Documents: to store, stored, and deleted.

L memory layers, H key/value heads, T tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from memory_service.errors import InvalidArgument
from memory_service.types.brief import brief
from memory_service.types.conditions import Scalar

if TYPE_CHECKING:
    from torch import Tensor

MAX_DOCUMENT_TOKENS = 1 << 31
MAX_METADATA_KEYS = 64
MAX_METADATA_BYTES = 16_384


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A document to store: all its tokens' keys and values. Keys are not rotated."""

    id: str
    keys: Tensor  # [L, H, T, D] in the memory's dtype
    values: Tensor  # [L, H, T, D]
    token_ids: Tensor | None = None  # [T] int64/int32, ≥ 0; None stores zeros
    metadata: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    __repr__ = brief


@dataclass(frozen=True, slots=True)
class DocumentInfo:
    """A committed document."""

    id: str
    tokens: int
    metadata: Mapping[str, Scalar]
    generation: int  # Grows with every commit of the memory; a replaced document gets a new one.
    committed_at: float


@dataclass(frozen=True, slots=True)
class Deleted:
    """A deletion: of every state of a document up to this generation."""

    id: str
    generation: int


class Conflict(StrEnum):
    """What a commit does if the document id is taken."""

    FAIL = "fail"
    REPLACE = "replace"


def check_document_id(document: str) -> None:
    """Raise InvalidArgument unless `document` is 1-512 bytes of UTF-8 without control characters."""
    if not 1 <= len(document.encode("utf-8", "surrogatepass")) <= 512:
        raise InvalidArgument("a document id must be 1 to 512 bytes of UTF-8")
    if not document.isprintable():
        raise InvalidArgument("a document id must not contain control characters")


def counted(documents: int) -> str:
    """1 document, 2 documents."""
    return f"{documents:,} document" if documents == 1 else f"{documents:,} documents"
