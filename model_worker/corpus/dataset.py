"""Datasets that Hugging Face's `datasets` saved on disk: a row is a document, a split is a part of its id."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memory_service.errors import InvalidArgument
from model_worker.corpus.files import Found
from model_worker.corpus.rows import Columns
from model_worker.corpus.source import NoteTaker, Source

if TYPE_CHECKING:
    from datasets import Dataset


def read_dataset(found: Found, columns: Columns, note: NoteTaker) -> Iterator[Source]:
    """Documents row by row, split by split; rows are mapped from disk.

    Raises InvalidArgument if the directory cannot be loaded or a split has no column of text or token ids.
    """
    # Two seconds to import, for those who have such directories.
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(found.path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(f"{found.path} cannot be loaded as a dataset: {error}") from None
    splits = loaded if isinstance(loaded, DatasetDict) else {"": loaded}
    rows = max(1, sum(len(split) for split in splits.values()))
    for name, split in splits.items():
        yield from _rows(
            split, found, f"{found.name}/{name}" if name else found.name, columns, found.size // rows, note
        )


def _rows(split: Dataset, found: Found, name: str, columns: Columns, size: int, note: NoteTaker) -> Iterator[Source]:
    from datasets import ClassLabel, Value

    single = [key for key, kind in split.features.items() if isinstance(kind, Value | ClassLabel)]
    try:
        wanted = columns.wanted(split.column_names, single)
    except InvalidArgument as error:
        raise InvalidArgument(f"{found.path}, split {name!r}, has {error.message}") from None
    # Whatever tensors the dataset was saved to give, here it gives plain values.
    for number, row in enumerate(split.with_format(None).select_columns(wanted)):
        source = columns.source(row, number, found, name, size, note)
        if source is not None:
            yield source
