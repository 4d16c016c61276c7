"""What becomes of a document that was found: whether a memory holds it as it would be stored now; and a run's counts.

What a stored document was made of stands in its metadata: `fot.sha256` of its content, `fot.tokenizer` and the settings
of the encoder. A document whose stored metadata are what would be stored now is current, and is not encoded again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import TYPE_CHECKING

from torch import Tensor

from memory_service import AlreadyExists, Compare, Condition, DocumentInfo, Memory, NotFound
from memory_service.types.conditions import Scalar
from model_worker.corpus import LeftOut, Note, Notes, Source, token_ids, tokenizer_digest
from model_worker.corpus.source import RESERVED_PREFIX
from model_worker.ingestion.encoding import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT = f"{RESERVED_PREFIX}sha256"
TOKENIZER = f"{RESERVED_PREFIX}tokenizer"


class Fate(StrEnum):
    """What a run does with a document; but for EMPTY, as `IngestReport` counts them."""

    ADDED = "added"
    REPLACED = "replaced"
    UNCHANGED = "unchanged"
    EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A document, and what a run is to do with it."""

    id: str
    fate: Fate
    metadata: Mapping[str, Scalar]
    size: int  # Bytes of the corpus.
    token_ids: Tensor | None = None  # [T] int64 of one to be encoded.
    note: Note | None = None  # Why an empty one is left out.

    @property
    def digest(self) -> str:
        """Of its name and its content, as a part of request ids."""
        return sha256(f"{self.id} {self.metadata[CONTENT]}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class IngestReport:
    """How far an ingest is, or what it did."""

    added: int = 0
    replaced: int = 0  # Their content, their metadata or the encoder's settings had changed.
    unchanged: int = 0
    removed: int = 0
    tokens: int = 0  # Of the documents added and replaced.
    bytes_read: int = 0  # Of the corpus.
    seconds: float = 0.0
    left_out: tuple[LeftOut, ...] = ()

    @property
    def stored(self) -> int:
        """Documents added and replaced."""
        return self.added + self.replaced

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def settings_of(encoder: Encoder) -> dict[str, Scalar]:
    """What of an encoder's settings changes keys and values, beside the model itself."""
    fot = encoder.fot
    positions = [] if fot.mem_positionals else ["none in memory layers"]
    positions += [f"self-extend {fot.self_extend.group} {fot.self_extend.window}"] if fot.self_extend else []
    if len(fot.mem_layers) > 1 and fot.mem_positionals:
        positions.append(f"memory {fot.memory_position} {fot.fixed_position or ''}".strip())
    return {"window": fot.window, "overlap": encoder.overlap, "positions": ", ".join(positions) or "own"}


class Intake:
    """Decides of documents, one at a time, what a run does with them. Keeps nothing between them."""

    def __init__(
        self,
        memory: Memory,
        tokenizer: PreTrainedTokenizerBase | None,
        settings: Mapping[str, Scalar] | None = None,
        special_tokens: bool = True,
        replace: bool = False,
    ):
        """`settings` are kept with every document; `replace` takes ids over from whoever stored them."""
        self._memory, self._tokenizer, self._special_tokens, self._replace = memory, tokenizer, special_tokens, replace
        self._facts: dict[str, Scalar] = {
            TOKENIZER: tokenizer_digest(tokenizer) + ("" if special_tokens else ", text alone")
        }
        self._facts |= {f"{RESERVED_PREFIX}{name}": value for name, value in (settings or {}).items()}

    def decide(self, source: Source) -> Verdict:
        """Ask the memory, and tokenise what it does not hold.

        Raises AlreadyExists for a document that is not ours to replace, and what `token_ids` and the memory raise.
        """
        metadata = {**source.metadata, CONTENT: source.digest, **self._facts}
        stored = self._stored(source.id)
        if stored is not None and stored.metadata == metadata:
            return Verdict(source.id, Fate.UNCHANGED, metadata, source.size)
        if stored is not None and not self._replace:
            _check_ours(stored, metadata)
        ids = token_ids(source, self._tokenizer, self._special_tokens)
        if not ids.numel():
            why = "is empty" if stored is None else "is empty now; what is stored is older"
            note = Note(source.id, why, size=source.size)
            return Verdict(source.id, Fate.EMPTY, metadata, source.size, note=note)
        return Verdict(source.id, Fate.ADDED if stored is None else Fate.REPLACED, metadata, source.size, ids)

    def _stored(self, document: str) -> DocumentInfo | None:
        try:
            return self._memory.get(document)
        except NotFound:
            return None


class Ledger:
    """What a run has seen and counted. Every method may be called from any thread."""

    def __init__(self, notes: Notes, on_progress: Callable[[IngestReport], None] = lambda _: None):
        self._notes, self._on_progress = notes, on_progress
        self._begun = time.perf_counter()
        self._seen: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def saw(self, document: str) -> bool:
        """Take down a document of the corpus; false if it was seen before."""
        with self._lock:
            before = len(self._seen)
            self._seen.add(document)
            return len(self._seen) > before

    def took(self, verdict: Verdict) -> None:
        """Take down what was decided of a document; one to be encoded counts when it is `stored`."""
        if verdict.note is not None:
            self.note(verdict.note)
            return
        self.saw(verdict.id)
        if verdict.token_ids is None:
            self.count(verdict.fate, 1)
            self.count("bytes_read", verdict.size)

    def stored(self, verdict: Verdict) -> None:
        """Count a document that is durable."""
        assert verdict.token_ids is not None
        self.count(verdict.fate, 1)
        self.count("tokens", len(verdict.token_ids))

    def note(self, note: Note) -> None:
        """Take down what was left out."""
        with self._lock:
            self._notes(note)

    def count(self, what: str, number: int) -> None:
        """Add to one of the report's numbers."""
        with self._lock:
            self._counts[what] += number

    def report(self) -> IngestReport:
        """What was done until now."""
        with self._lock:
            counts = Counter(self._counts)
            counts["bytes_read"] += self._notes.bytes_read
            left_out = self._notes.left_out
        return IngestReport(**counts, seconds=time.perf_counter() - self._begun, left_out=left_out)

    def tell(self) -> None:
        """Say how far it is, in this thread."""
        self._on_progress(self.report())

    def prune(self, memory: Memory, belongs: Callable[[DocumentInfo], bool]) -> None:
        """Remove what an ingest stored, belongs to this corpus and is no longer in it."""
        if self._notes.unread:
            self.note(Note("the memory", "was not pruned: part of the corpus could not be read"))
            return
        stored = memory.documents(Condition(CONTENT, Compare.EXISTS))
        for gone in [one.id for one in stored if one.id not in self._seen and belongs(one)]:
            memory.delete(gone)
            self.count("removed", 1)
            self.tell()


def _check_ours(stored: DocumentInfo, metadata: Mapping[str, Scalar]) -> None:
    if CONTENT not in stored.metadata:
        raise AlreadyExists(
            f"the memory has a document {stored.id!r} that was not ingested; replace it, or ingest with a prefix"
        )
    root, ours = stored.metadata.get("root"), metadata.get("root")
    if root != ours:
        raise AlreadyExists(
            f"the memory has a document {stored.id!r} from {root}, not from {ours}; replace it, or ingest with a prefix"
        )
