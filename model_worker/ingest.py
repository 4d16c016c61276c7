"""A corpus into a memory: documents are tokenised, encoded and stored, each once; a second run goes on where one ended.

What a stored document was made of stands in its metadata: `fot.sha256` of its content, `fot.tokenizer` and the settings
of the encoder. A document whose stored metadata are what would be stored now is current, and is not encoded again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from memory_service import AlreadyExists, Compare, Condition, DocumentInfo, Memory, MemorySpec, NotFound
from memory_service.types import Scalar
from model_worker.corpus import LeftOut, Note, Notes, Source, token_ids, tokenizer_digest
from model_worker.corpus.source import RESERVED_PREFIX
from model_worker.encoding import Encoded, Encoder
from model_worker.fitting import check_spec
from model_worker.uploads import Outgoing, Uploads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT = f"{RESERVED_PREFIX}sha256"
TOKENIZER = f"{RESERVED_PREFIX}tokenizer"


class Encodes(Protocol):
    """What ingest asks of an `Encoder`."""

    @property
    def spec(self) -> MemorySpec: ...

    def encode(self, documents: Iterable[Sequence[int] | Tensor]) -> Iterator[Encoded]: ...


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


def ingest(
    sources: Iterable[Source],
    encoder: Encodes,
    tokenizer: PreTrainedTokenizerBase | None,
    memory: Memory,
    *,
    settings: Mapping[str, Scalar] | None = None,
    special_tokens: bool = True,
    replace: bool = False,
    belongs: Callable[[DocumentInfo], bool] | None = None,
    notes: Notes | None = None,
    on_progress: Callable[[IngestReport], None] = lambda _: None,
) -> IngestReport:
    """Store every document of `sources` that the memory does not hold as it would be stored now.

    `settings` are kept with every document, and changing them encodes all again. A stored document is replaced if an
    ingest from the same root stored it, any other only with `replace`. `belongs` asks for pruning: stored documents it
    accepts that are not among `sources` are removed, at the end, unless part of the corpus could not be read.
    `notes` are those that reading takes; documents without tokens are added to them.
    `on_progress` is called in this thread, after every document, and with the outcome also when an error ends it: what
    was stored until then stays, and the same call goes on from there.
    Raises AlreadyExists for a document that is not ours to replace, WrongModel, and what `sources`, the encoder and
    `Memory.put` raise.
    """
    check_spec(memory.spec, encoder.spec)
    facts: dict[str, Scalar] = {TOKENIZER: tokenizer_digest(tokenizer) + ("" if special_tokens else ", text alone")}
    facts |= {f"{RESERVED_PREFIX}{name}": value for name, value in (settings or {}).items()}
    run = _Run(memory, facts, replace, notes or Notes(), on_progress)
    try:
        with Uploads(memory, run.stored) as uploads:
            documents = run.wanted(sources, lambda one: token_ids(one, tokenizer, special_tokens), uploads.check)
            for encoded in encoder.encode(documents):
                uploads.put(run.outgoing(encoded))
                run.tell()
        if belongs is not None:
            run.prune(belongs)
    finally:
        run.tell()
    return run.report()


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A document that is being encoded."""

    id: str
    metadata: Mapping[str, Scalar]
    replace: bool
    size: int


class _Run:
    """One ingest: what waits for its keys and values, what was seen, what is stored."""

    def __init__(
        self,
        memory: Memory,
        facts: Mapping[str, Scalar],
        replace: bool,
        notes: Notes,
        on_progress: Callable[[IngestReport], None],
    ):
        self._memory = memory
        self._facts = facts
        self._replace = replace
        self._notes = notes
        self._on_progress = on_progress
        self._begun = time.perf_counter()
        self._waiting: deque[_Waiting] = deque()
        self._seen: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._counting = threading.Lock()

    def report(self) -> IngestReport:
        """What was done until now."""
        with self._counting:
            counts = Counter(self._counts)
        counts["bytes_read"] += self._notes.bytes_read
        return IngestReport(**counts, seconds=time.perf_counter() - self._begun, left_out=self._notes.left_out)

    def tell(self) -> None:
        """Say how far it is."""
        self._on_progress(self.report())

    def wanted(
        self, sources: Iterable[Source], tokenise: Callable[[Source], Tensor], check: Callable[[], None]
    ) -> Iterator[Tensor]:
        """Token ids of the documents that are not current; `outgoing` finds the rest of them again, in this order."""
        for source in sources:
            check()
            metadata = {**source.metadata, CONTENT: source.digest, **self._facts}
            stored = self._stored(source.id)
            if stored is not None and stored.metadata == metadata:
                self._seen.add(source.id)
                self._count("unchanged", 1)
                self._count("bytes_read", source.size)
                self.tell()
                continue
            if stored is not None and not self._replace:
                _check_ours(stored, metadata)
            ids = tokenise(source)
            if not ids.numel():
                why = "is empty" if stored is None else "is empty now; what is stored is older"
                self._notes(Note(source.id, why, size=source.size))
                continue
            self._seen.add(source.id)
            self._waiting.append(_Waiting(source.id, metadata, stored is not None, source.size))
            yield ids

    def outgoing(self, encoded: Encoded) -> Outgoing:
        """The document that was encoded: of those that wait, the first."""
        one = self._waiting.popleft()
        self._count("bytes_read", one.size)
        return Outgoing(one.id, encoded.keys, encoded.values, encoded.token_ids, one.metadata, one.replace)

    def stored(self, document: Outgoing) -> None:
        """Count a document that is durable; called by the threads of the uploads."""
        self._count("replaced" if document.replace else "added", 1)
        self._count("tokens", len(document.token_ids))

    def prune(self, belongs: Callable[[DocumentInfo], bool]) -> None:
        """Remove what an ingest stored, belongs to this corpus and is no longer in it."""
        if self._notes.unread:
            self._notes(Note("the memory", "was not pruned: part of the corpus could not be read"))
            return
        stored = self._memory.documents(Condition(CONTENT, Compare.EXISTS))
        for gone in [one.id for one in stored if one.id not in self._seen and belongs(one)]:
            self._memory.delete(gone)
            self._count("removed", 1)
            self.tell()

    def _stored(self, document: str) -> DocumentInfo | None:
        try:
            return self._memory.get(document)
        except NotFound:
            return None

    def _count(self, what: str, number: int) -> None:
        with self._counting:
            self._counts[what] += number


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
