"""A line: all that one row of a batch has of its own, so that rows of many requests and memories can stand together."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memory_service import Scope
from model_worker.recall.reader import Reader
from model_worker.recall.rows import Row, Rows
from model_worker.settings import Recall


@dataclass(slots=True, eq=False)
class Line:
    """One row's text, its share of a memory, and how that is read."""

    rows: Rows
    number: int  # Of the row in `rows`, and of the batch it began in, which is what listeners know it by.
    reader: Reader | None
    recall: Recall
    ids: array[int] = field(default_factory=lambda: array("q"))  # Every token fed so far.
    error: Exception | None = None  # Why it cannot go on, where the other rows can.
    documents: Scope = field(init=False)  # Of the recall, worked out once.
    manner: Hashable = field(init=False)  # Rows of equal manner are asked for in one call.

    def __post_init__(self) -> None:
        self.reads_with(self.recall)

    def reads_with(self, recall: Recall) -> None:
        """Read as this says from now on."""
        self.recall = recall
        self.documents = recall.scope()
        self.manner = manner_of(recall)

    @property
    def row(self) -> Row:
        """What of it is in memory."""
        return self.rows.rows[self.number]

    @property
    def text(self) -> Tensor:
        """Its tokens [T] int64, a copy."""
        return torch.tensor(self.ids, dtype=torch.int64)

    def said(self, ids: Iterable[int]) -> None:
        """Count these tokens as fed."""
        self.ids.extend(ids)

    def fail(self, error: Exception) -> None:
        """Note the first thing that went wrong."""
        if self.error is None:
            self.error = error


def manner_of(recall: Recall) -> Hashable:
    """All of how a memory is asked but what and whose it is; equal for questions that fit one call."""
    return (
        recall.top_k, recall.engine, recall.logit_gap, tuple(sorted(recall.search.items())), recall.output_dtype,
        recall.timeout_s, recall.tokens, recall.attribution, recall.measure,
    )  # fmt: skip
