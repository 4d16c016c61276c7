"""What a training step is made of: windows, what to predict in them, and who reads whom.

B rows of a batch, S tokens of a window. A document is some consecutive rows, read on from one to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memory_service.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows, what to predict in them, and which other windows each of them reads through its memory layers."""

    ids: Tensor  # [B, S] int64, one window a row.
    targets: Tensor  # [B, S] int64, the token after each; the last of a window predicts the first of the next.
    weights: Tensor  # [B, S] float32, what predicting the target is worth; 0 is not scored.
    answers: Tensor  # [B, S] bool, targets that are known from memory alone; their accuracy drives a curriculum.
    reads: tuple[tuple[int, ...], ...]  # For each row, the other rows its memory layers read.
    rows_per_document: int = 1  # The rows of one document stand together.

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return self.ids.numel()


@dataclass(frozen=True, slots=True)
class Shape:
    """How large and how hard a batch is. A source takes no notice of what means nothing to it."""

    documents: int = 8
    windows: int = 2  # Of each document; the last is asked, those before it are memory.
    group: int = 1  # Documents that read each other's memory: one positive and the rest negatives.
    window: int = 256  # Tokens.
    keys: int = 1  # Labelled keys a document states at most.
    questions: int = 2  # Questions a document asks at most.
    hard: float = 0.0  # Share of groups whose keys nearly collide (dictionary).
    weight: float = 1.0  # How often this shape is drawn among those of its level.
    uuid: float | None = None  # Share of documents that are UUID look-ups; None: what the source was told.

    def __post_init__(self) -> None:
        for name in ("documents", "windows", "group", "window", "keys", "questions"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} of a shape must be 1 or more, got {getattr(self, name)}")
        if self.documents % self.group:
            raise InvalidArgument(
                f"{self.documents} documents do not make groups of {self.group}: choose a number that divides them"
            )
        for name in ("hard", "uuid"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise InvalidArgument(f"{name} of a shape is a share from 0 to 1, got {share}")
        if self.weight <= 0:
            raise InvalidArgument(f"weight of a shape must be more than 0, got {self.weight}")

    @property
    def tokens(self) -> int:
        """Tokens in a batch of this shape."""
        return self.documents * self.windows * self.window


@runtime_checkable
class Source(Protocol):
    """Where batches come from. A batch follows from seed, step and shape alone: to resume, nothing else is needed."""

    def batch(self, step: int, shape: Shape) -> Batch:
        """The batch of a step."""


def batch_of(
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    answers: NDArray[np.bool_],
    shape: Shape,
    reads: tuple[tuple[int, ...], ...],
) -> Batch:
    """A batch from whole documents [documents, T + 1], where weight and answer stand at the token they are about.

    T is windows · window; token t + 1 is the target of token t, so the last one is only a target.
    """
    rows = (shape.documents * shape.windows, shape.window)

    def split(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).view(rows)

    return Batch(
        ids=split(ids[:, :-1]),
        targets=split(ids[:, 1:]),
        weights=split(weights[:, 1:]),
        answers=split(answers[:, 1:]),
        reads=reads,
        rows_per_document=shape.windows,
    )
