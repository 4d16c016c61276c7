"""JSON lines, plain or gzipped: a line is an object, an object is a document."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator

from memory_service.errors import InvalidArgument
from model_worker.corpus.files import Found
from model_worker.corpus.rows import Columns
from model_worker.corpus.source import NoteTaker, Source


def read_jsonl(found: Found, columns: Columns, note: NoteTaker) -> Iterator[Source]:
    """Documents line by line; empty lines count but are no documents.

    Raises InvalidArgument, naming the line, for a line that is no JSON object.
    """
    packed = found.path.name.lower().endswith(".gz")
    try:
        with gzip.open(found.path) if packed else found.path.open("rb") as lines:
            yield from _documents(lines, found, columns, note, packed)
    except (gzip.BadGzipFile, EOFError) as error:
        raise InvalidArgument(f"{found.path} is damaged: {error}") from None


def _documents(
    lines: Iterable[bytes], found: Found, columns: Columns, note: NoteTaker, packed: bool
) -> Iterator[Source]:
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except ValueError as error:
            raise InvalidArgument(f"line {number + 1} of {found.path} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise InvalidArgument(f"line {number + 1} of {found.path} is no JSON object but a {type(row).__name__}")
        # How much of a packed file a line was is not known.
        source = columns.source(row, number, found, found.name, 0 if packed else len(line), note)
        if source is not None:
            yield source
