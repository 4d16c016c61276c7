"""One way to read every format: paths in, documents out, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from memory_service.errors import InvalidArgument
from memory_service.types.conditions import Scalar
from memory_service.types.documents import check_document_id
from model_worker.corpus.dataset import read_dataset
from model_worker.corpus.files import Choice, Format, Found, find
from model_worker.corpus.jsonl import read_jsonl
from model_worker.corpus.parquet import read_parquet
from model_worker.corpus.rows import Columns
from model_worker.corpus.source import NoteTaker, Source, fitting
from model_worker.corpus.text import BadBytes, read_text

EVERYTHING = Choice()
COLUMNS = Columns()
ROWS = {Format.JSONL: read_jsonl, Format.PARQUET: read_parquet, Format.DATASET: read_dataset}


@dataclass(frozen=True, slots=True)
class Reading:
    """How files become documents.

    A file's document is called by its path from the root, the deepest directory that holds all paths; a row's by its
    file, "#" and its number from 0, or by the column `columns.id`; `prefix` comes before either. `metadata` is added to
    every document's own and wins. Raises InvalidArgument for metadata that no document can have.
    """

    columns: Columns = COLUMNS
    bad_bytes: BadBytes = BadBytes.REPLACE
    prefix: str = ""
    metadata: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, why in fitting(self.metadata)[1].items():
            raise InvalidArgument(f"metadata field {key!r} {why}")

    def documents(self, found: Found, note: NoteTaker) -> Iterator[Source]:
        """A file's documents. Raises InvalidArgument for content that is not as announced."""
        for source in self._sources(found, note):
            source = replace(source, id=self.prefix + source.id, metadata={**source.metadata, **self.metadata})
            try:
                check_document_id(source.id)
            except InvalidArgument as error:
                raise InvalidArgument(
                    f"{found.path} makes a document id that no memory takes: {error.message}"
                ) from None
            yield source

    def _sources(self, found: Found, note: NoteTaker) -> Iterator[Source]:
        if found.format in ROWS:
            return ROWS[found.format](found, self.columns, note)
        return read_text(found, self.bad_bytes, note)


READING = Reading()


def read(
    paths: Sequence[str | Path],
    *,
    choice: Choice = EVERYTHING,
    columns: Columns = COLUMNS,
    bad_bytes: BadBytes = BadBytes.REPLACE,
    prefix: str = "",
    metadata: Mapping[str, Scalar] | None = None,
    note: NoteTaker = lambda _: None,
) -> Iterator[Source]:
    """Documents of files and directories as `Reading` says, in a fixed order, a batch of rows in RAM at a time.

    What is left out, and why, is told to `note`. Raises NotFound for a path that is not there; InvalidArgument for
    content that is not as announced, and if two documents have the same id.
    """
    reading = Reading(columns, bad_bytes, prefix, metadata or {})
    seen: set[str] = set()
    for found in find([Path(path) for path in paths], choice, note):
        for source in reading.documents(found, note):
            if source.id in seen:
                raise twice(source.id, str(found.path))
            seen.add(source.id)
            yield source


def twice(document: str, where: str) -> InvalidArgument:
    """The error of two documents with one id, the second found there."""
    return InvalidArgument(
        f"two documents are called {document!r}, the second is in {where}; read them one by one with different prefixes"
    )


def corpus_bytes(paths: Sequence[str | Path], choice: Choice = EVERYTHING) -> int:
    """Bytes of all files that `read` would look at; walks the directories but opens nothing."""
    return sum(found.size for found in find([Path(path) for path in paths], choice, lambda _: None))
