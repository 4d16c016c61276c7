"""A dictionary that grows: its definitions as windows of token ids, and windows of questions about them.

A definition's place is its number: definition r stands at tokens 10·r to 10·r + 9 of the whole dictionary. W windows,
R records of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memory_service.errors import InvalidArgument
from model_worker.tasks import dictionary as task


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """Windows of questions with their answers, as the paper asks: all answers but the one asked are given."""

    ids: Tensor  # [W, 10 R] int64
    records: NDArray[np.int64]  # [W, R] which definition is asked.

    @property
    def count(self) -> int:
        return self.records.size

    @property
    def asking(self) -> Tensor:
        """Places in a window whose next token is a value's, in order: [4 R]."""
        first = torch.arange(self.records.shape[1])[:, None] * task.RECORD + task.VALUE_AT - 1
        return (first + torch.arange(task.LENGTH)).flatten()

    def wanted(self) -> Tensor:
        """The values' tokens: [W, R, 4]."""
        return self.answers_of(self.ids)

    def answers_of(self, ids: Tensor) -> Tensor:
        """What stands in such windows where these have values: [W, R, 4]."""
        return ids[:, self.asking + 1].view(len(ids), -1, task.LENGTH)

    def defined(self) -> NDArray[np.int64]:
        """Where in the dictionary the definitions state what is asked, one token an answer: [W, 4 R]."""
        stated = self.records[:, :, None] * task.RECORD + task.VALUE_AT + np.arange(task.LENGTH)
        return stated.reshape(len(self.records), -1)


class World:
    """All definitions there will be: keys are different from each other, values random."""

    def __init__(self, records: int, in_window: int, seed: int):
        """`in_window`: whole records of a window. Raises InvalidArgument if there are not as many keys."""
        rng = np.random.default_rng((seed, 0))
        self.in_window = in_window
        self._seed = seed
        # Compact: as int64 a dictionary of 16M tokens would take as much as its keys' index.
        self._keys = task.distinct(records, rng).astype(np.int32)
        self._values = task.values(records, rng).astype(np.int8)

    @property
    def records(self) -> int:
        return len(self._keys)

    def definitions(self, first: int, count: int) -> Tensor:
        """Token ids of consecutive definitions: [10 count]."""
        chosen = slice(first, first + count)
        listing = task.records(task.KEY, task.keys_of(self._keys[chosen]), self._values[chosen])
        return torch.from_numpy(listing.reshape(-1))

    def questions(self, among: int, count: int) -> Questions:
        """At least `count` questions, whole windows of them, about the first `among` definitions.

        Nobody is asked for the same twice in a window, nor at all while there are enough definitions.
        """
        if among < self.in_window:
            raise InvalidArgument(f"{among} definitions do not fill a window of {self.in_window} questions; take more")
        rng = np.random.default_rng((self._seed, 1, among))
        windows = -(-count // self.in_window)
        if among >= windows * self.in_window:
            chosen = rng.choice(among, (windows, self.in_window), replace=False)
        else:
            chosen = np.stack([rng.choice(among, self.in_window, replace=False) for _ in range(windows)])
        flat = chosen.reshape(-1)
        asked = task.records(task.QUESTION, task.keys_of(self._keys[flat]), self._values[flat])
        return Questions(torch.from_numpy(asked.reshape(windows, -1)), chosen.astype(np.int64))
