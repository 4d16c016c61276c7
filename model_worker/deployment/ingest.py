"""A corpus into a memory by many workers: each gets or reads documents, encodes them and puts them where they belong.

The driver lists the corpus and hands out batches. A worker asks the memory which documents of its batch it holds, as
`fot ingest` does, encodes the others and sends their keys and values by gRPC to the service, or the shard, that owns
them. Keys and values never cross Ray's object store; texts do, unless the workers read the files themselves.

A batch whose worker died goes to another, which finds what was stored: every document is stored once. Whether it was
new, changed or current is what the first of them found, so that the report counts it once too.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from torch import Tensor

from memory_service import DocumentInfo, Memory
from memory_service.errors import InvalidArgument
from model_worker.corpus import Choice, Note, Notes, Reading, Source
from model_worker.corpus.files import Found, find
from model_worker.corpus.reader import ROWS, read, twice
from model_worker.decoder.fitting import check_spec
from model_worker.deployment.pool import Crew, Pool
from model_worker.deployment.runtime import Cluster
from model_worker.deployment.worker import Tell
from model_worker.ingestion.encoding import Encoded
from model_worker.ingestion.ingest import Parts, store
from model_worker.ingestion.intake import Fate, IngestReport, Intake, Ledger, settings_of

# Of a batch: some blocks of windows, so that windows of one length meet; and few enough that none is long done again.
BATCH_BYTES = 64 << 10
BATCH_DOCUMENTS = 64


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is to be read."""

    paths: tuple[Path, ...]
    choice: Choice
    reading: Reading
    limit: int | None = None  # Documents.
    workers_read: bool = False  # Files of text are read by the workers: they must see the same files.

    def __post_init__(self) -> None:
        if self.workers_read and self.limit is not None:
            raise InvalidArgument("a limit counts documents, and what workers read is only counted there: drop one")


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents, and files to be read, that one worker encodes."""

    number: int
    sources: tuple[Source, ...]
    files: tuple[Found, ...]

    def __str__(self) -> str:
        names = [one.id for one in self.sources] + [str(one.path) for one in self.files]
        return f"the {len(names)} documents from {names[0]!r} to {names[-1]!r}"


OpenParts = Callable[[Callable[[int], None]], Parts]  # In a worker's process; given who hears of encoded tokens.


@dataclass(frozen=True, slots=True)
class _Decided:
    """What a worker found of its batch, told before it encodes."""

    documents: tuple[tuple[str, Fate, int, int], ...]  # Id, fate, bytes of the corpus, tokens to be encoded.
    notes: tuple[Note, ...]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A document is durable."""

    id: str


@dataclass(frozen=True, slots=True)
class _Encoded:
    """So many more tokens have keys and values."""

    tokens: int


def batches_of(corpus: Corpus, note: Callable[[Note], None]) -> Iterator[Batch]:
    """The corpus in batches, drawn as they are needed. Raises as `read`."""
    return in_batches(_items(corpus, note))


def in_batches(items: Iterable[Source | Found]) -> Iterator[Batch]:
    """Documents, and files of text to be read by workers, in batches."""
    sources: list[Source] = []
    files: list[Found] = []
    number = size = 0
    for one in items:
        if isinstance(one, Source):
            sources.append(one)
            size += max(one.size, len(one.text or ""), 4 * len(one.token_ids or ()))
        else:
            files.append(one)
            size += one.size
        if size >= BATCH_BYTES or len(sources) + len(files) == BATCH_DOCUMENTS:
            yield Batch(number, tuple(sources), tuple(files))
            sources, files, number, size = [], [], number + 1, 0
    if sources or files:
        yield Batch(number, tuple(sources), tuple(files))


def ingest(
    batches: Iterable[Batch],
    make: Callable[[], IngestWorker],
    crew: Crew,
    cluster: Cluster,
    *,
    memory: Callable[[], Memory],
    belongs: Callable[[DocumentInfo], bool] | None = None,
    notes: Notes | None = None,
    on_progress: Callable[[IngestReport], None] = lambda _: None,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> IngestReport:
    """Store every document that the memory does not hold as it would be stored now, as
    `ingestion.ingest` does.

    `memory` opens it here, for pruning, once the workers have. `on_tokens` hears of encoded tokens, `on_progress` how
    far it is; both in this thread. Raises as that, and as `Pool.run`.
    """
    with Pool(make, crew, cluster) as pool:
        pool.wait()
        ledger = Ledger(notes or Notes(), on_progress)
        try:
            fill(pool, batches, ledger, on_tokens)
            if belongs is not None:
                ledger.prune(memory(), belongs)
        finally:
            ledger.tell()
    return ledger.report()


def fill(
    pool: Pool[Batch, None],
    batches: Iterable[Batch],
    ledger: Ledger,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> None:
    """Let the pool's workers store all batches; what they tell goes into the books. Raises as `Pool.run`."""
    accounts: dict[int, _Account] = {}

    def heard(batch: Batch, what: object) -> None:
        if isinstance(what, _Encoded):
            on_tokens(what.tokens)
        elif isinstance(what, _Stored):
            accounts[batch.number].stored(what.id)
        elif isinstance(what, _Decided):
            if batch.number not in accounts:
                accounts[batch.number] = _Account(ledger, what)
            accounts[batch.number].found(what)
        ledger.tell()

    for batch, _ in pool.run(batches, heard):
        del accounts[batch.number]


class IngestWorker:
    """Encodes batches: while one is encoded, the other is read, asked for and tokenised, or is still being stored."""

    def __init__(
        self,
        open_parts: OpenParts,
        reading: Reading,
        *,
        special_tokens: bool = True,
        replace: bool = False,
        request: str = "",
    ):
        """`request` names the run, the same for all its workers. Raises WrongModel and what opening raises."""
        self._tell: Tell = lambda _: None  # Of the batch that is being encoded.
        parts = open_parts(lambda tokens: self._tell(_Encoded(tokens)))
        check_spec(parts.memory.spec, parts.encoder.spec)
        self._parts, self._reading = parts, reading
        self._request = request or secrets.token_hex(8)
        self._intake = Intake(parts.memory, parts.tokenizer, settings_of(parts.encoder), special_tokens, replace)
        self._encoding = threading.Lock()

    def work(self, batch: Batch, tell: Tell) -> None:
        """Store a batch."""
        notes: list[Note] = []
        verdicts = [self._intake.decide(source) for source in self._sources(batch, notes.append)]
        notes += [one.note for one in verdicts if one.note is not None]
        there = [one for one in verdicts if one.note is None]
        sizes = [0 if one.token_ids is None else len(one.token_ids) for one in there]
        found = tuple((one.id, one.fate, one.size, tokens) for one, tokens in zip(there, sizes, strict=True))
        tell(_Decided(found, tuple(notes)))
        wanted = [one for one in there if one.token_ids is not None]
        for _ in store(
            wanted, _InTurn(self, tell), self._parts.memory, lambda one: tell(_Stored(one.id)), self._request
        ):
            pass

    def encode(self, documents: Iterable[Sequence[int] | Tensor], tell: Tell) -> Iterator[Encoded]:
        """As the encoder, once the other batch is done with it."""
        with self._encoding:
            self._tell = tell
            yield from self._parts.encoder.encode(documents)

    def _sources(self, batch: Batch, note: Callable[[Note], None]) -> Iterator[Source]:
        yield from batch.sources
        for found in batch.files:
            yield from self._reading.documents(found, note)


class _InTurn:
    """A worker's encoder, for one of its batches."""

    def __init__(self, worker: IngestWorker, tell: Tell):
        self._worker, self._tell = worker, tell
        self.spec = worker._parts.encoder.spec

    def encode(self, documents: Iterable[Sequence[int] | Tensor]) -> Iterator[Encoded]:
        return self._worker.encode(documents, self._tell)


class _Account:
    """A batch in the books: what its first worker found counts, once each document is known to be stored."""

    def __init__(self, ledger: Ledger, first: _Decided):
        self._ledger = ledger
        self._waiting = {name: (fate, size, tokens) for name, fate, size, tokens in first.documents}
        for note in first.notes:
            ledger.note(note)
        for name, *_ in first.documents:
            if not ledger.saw(name):
                raise twice(name, "another file")

    def found(self, decided: _Decided) -> None:
        """A worker has begun: what it found current is stored, if only since an earlier worker's attempt."""
        for name, fate, *_ in decided.documents:
            if fate is Fate.UNCHANGED:
                self.stored(name)

    def stored(self, name: str) -> None:
        """A document is durable; counts once."""
        if name in self._waiting:
            fate, size, tokens = self._waiting.pop(name)
            self._ledger.count(fate, 1)
            self._ledger.count("bytes_read", size)
            self._ledger.count("tokens", tokens)


def _items(corpus: Corpus, note: Callable[[Note], None]) -> Iterator[Source | Found]:
    """Documents, and where workers read, files of text instead; a file of rows may hold any number, so we read it."""
    reading = corpus.reading
    if not corpus.workers_read:
        yield from islice(
            read(
                corpus.paths, choice=corpus.choice, columns=reading.columns, bad_bytes=reading.bad_bytes,
                prefix=reading.prefix, metadata=reading.metadata, note=note,
            ),
            corpus.limit,
        )  # fmt: skip
        return
    for found in find(corpus.paths, corpus.choice, note):
        if found.format in ROWS:
            yield from reading.documents(found, note)
        else:
            yield replace(found, path=Path(os.path.abspath(found.path)))  # noqa: PTH100 - links keep their names
