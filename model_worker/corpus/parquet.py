"""Parquet: a row is a document; rows are read some at a time, and only the columns that are needed."""

from __future__ import annotations

from collections.abc import Iterator

from memory_service.errors import InvalidArgument
from model_worker.corpus.files import Found
from model_worker.corpus.rows import Columns
from model_worker.corpus.source import NoteTaker, Source

ROWS = 64  # At a time; a row may hold a book.


def read_parquet(found: Found, columns: Columns, note: NoteTaker) -> Iterator[Source]:
    """Documents row by row. Raises InvalidArgument if the file is no Parquet or has no column of text or token ids."""
    # Half a second to import, for those who have such files.
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(found.path) as table:
            schema, rows = table.schema_arrow, max(1, table.metadata.num_rows)
            single = [field.name for field in schema if not pyarrow.types.is_nested(field.type)]
            wanted = _wanted(found, columns, schema.names, single)
            numbers = iter(range(table.metadata.num_rows))
            for batch in table.iter_batches(ROWS, columns=wanted):
                for row in batch.to_pylist():
                    source = columns.source(row, next(numbers), found, found.name, found.size // rows, note)
                    if source is not None:
                        yield source
    except pyarrow.ArrowException as error:
        raise InvalidArgument(f"{found.path} cannot be read as Parquet: {error}") from None


def _wanted(found: Found, columns: Columns, fields: list[str], single: list[str]) -> list[str]:
    try:
        return columns.wanted(fields, single)
    except InvalidArgument as error:
        raise InvalidArgument(f"{found.path} has {error.message}") from None
