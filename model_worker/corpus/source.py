"""What a corpus is made of: documents with an id, a text or token ids, and metadata within the memory's limits."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from hashlib import sha256
from typing import NamedTuple
from urllib.parse import quote_from_bytes
from uuid import UUID

from memory_service.types.conditions import Scalar
from memory_service.types.documents import MAX_METADATA_BYTES, MAX_METADATA_KEYS

# Room for what is written down about the encoding, see ingest.py.
RESERVED_PREFIX = "fot."
RESERVED_KEYS = 8
RESERVED_BYTES = 1024
LONGEST_FIELD = 1024  # Characters; longer text is content rather than metadata.
_INT64 = 1 << 63


@dataclass(frozen=True, slots=True)
class Source:
    """A document as it was found: a text, or token ids of the tokenizer it will be asked with."""

    id: str
    text: str | None = field(default=None, repr=False)
    token_ids: tuple[int, ...] | None = field(default=None, repr=False)
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    size: int = 0  # Bytes of the corpus that were read for it; they add up to `corpus_bytes`, nearly.

    @property
    def digest(self) -> str:
        """SHA-256 of the text in UTF-8, or of the token ids as 64-bit integers."""
        if self.token_ids is not None:
            return sha256(array("q", self.token_ids).tobytes()).hexdigest()
        return sha256((self.text or "").encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Note:
    """Something of a corpus that did not become a document, or not all of it."""

    where: str
    why: str
    unread: bool = False  # It exists but could not be read: nobody should conclude that it is gone.
    size: int = 0  # Bytes of the corpus that are done with by this.


NoteTaker = Callable[[Note], None]


class LeftOut(NamedTuple):
    """How often one reason was noted, and where first."""

    why: str
    times: int
    first: str


class Notes:
    """Counts notes by their reason; however long the corpus, this stays short."""

    def __init__(self) -> None:
        self.unread = False  # Something is there that was not read.
        self.bytes_read = 0
        self._reasons: dict[str, LeftOut] = {}

    def __call__(self, note: Note) -> None:
        """Take a note."""
        before = self._reasons.get(note.why, LeftOut(note.why, 0, note.where))
        self._reasons[note.why] = before._replace(times=before.times + 1)
        self.unread = self.unread or note.unread
        self.bytes_read += note.size

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Reasons, the most frequent first; the order in which they were met does not show."""
        return tuple(sorted(self._reasons.values(), key=lambda one: (-one.times, one.why)))


def fitting(metadata: Mapping[str, object]) -> tuple[dict[str, Scalar], dict[str, str]]:
    """What of `metadata` a memory keeps, and why the rest is left out.

    Text, numbers and flags stay; None means absent; dates, decimals and whole numbers beyond 64 bits become text.
    """
    kept: dict[str, Scalar] = {}
    out: dict[str, str] = {}
    room = MAX_METADATA_BYTES - RESERVED_BYTES
    for key, value in metadata.items():
        if value is None:
            continue
        plain = _scalar(value)
        cost = 0 if plain is None else len(json.dumps({key: plain}, ensure_ascii=False).encode("utf-8", "replace"))
        if plain is None:
            out[key] = f"is a {type(value).__name__}"
        elif isinstance(plain, str) and len(plain) > LONGEST_FIELD:
            out[key] = f"is longer than {LONGEST_FIELD} characters"
        elif not 1 <= len(key) <= 128 or key.startswith(RESERVED_PREFIX):
            out[key] = f"has a name that is longer than 128 characters or begins with {RESERVED_PREFIX}"
        elif len(kept) == MAX_METADATA_KEYS - RESERVED_KEYS or cost > room:
            out[key] = "is more than a document's metadata can hold"
        else:
            kept[key] = plain
            room -= cost
    return kept, out


def readable(name: str) -> str:
    """A path as a document id: bytes and characters that cannot be printed are written %XX."""
    return "".join(
        letter if letter.isprintable() else quote_from_bytes(letter.encode("utf-8", "surrogateescape"), safe="")
        for letter in name
    )


def _scalar(value: object) -> Scalar | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -_INT64 <= value < _INT64 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # A lone surrogate is no Unicode.
    # What Parquet has beyond JSON; anything else has structure.
    return str(value) if isinstance(value, date | time | timedelta | Decimal | UUID) else None
