"""Training documents of the dictionary task: windows of definitions, then a window of questions about them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memory_service.errors import InvalidArgument
from model_worker.tasks import dictionary
from model_worker.tasks.dictionary import KEY, QUESTION, RECORD, VALUE_AT
from model_worker.training.reads import grouped
from model_worker.training.shapes import Batch, Shape, batch_of

PHASES = 7  # Tokens of a cut record before a window's first whole one: 0 to 6.


class DefinitionSource:
    """As many whole records as a window holds, with cut ones around them, so that records stand at any place of it.

    Keys differ inside a group, whose documents read each other's definitions. Only values in questions are scored.
    """

    def __init__(self, seed: int):
        self._seed = seed

    def batch(self, step: int, shape: Shape) -> Batch:
        """The batch of a step; `shape.hard` is the share of groups whose keys nearly collide."""
        whole = (shape.window - PHASES + 1) // RECORD  # Records in a window.
        if whole < 1 or shape.windows < 2:
            raise InvalidArgument(
                f"a dictionary shape needs windows of {RECORD + PHASES - 1} tokens or more, and 2 of them or more; "
                f"got {shape.windows} of {shape.window}"
            )
        rng = np.random.default_rng((self._seed, step))
        size = shape.windows * shape.window + 1
        ids = np.empty((shape.documents, size), dtype=np.int64)
        answers = np.zeros((shape.documents, size), dtype=np.bool_)
        stored = (shape.windows - 1) * (whole + 3)  # Records of a document, cut ones included.
        for first in range(0, shape.documents, shape.group):
            count = shape.group * stored
            near = rng.random() < shape.hard
            keys = (
                dictionary.nearly_colliding(count, rng) if near else dictionary.keys_of(dictionary.distinct(count, rng))
            )
            values = dictionary.values(count, rng)
            for document in range(shape.group):
                mine = slice(document * stored, (document + 1) * stored)
                row = first + document
                self._document(ids[row], answers[row], keys[mine], values[mine], shape, whole, rng)
        weights = answers.astype(np.float32)
        return batch_of(ids, weights, answers, shape, grouped(shape.documents, shape.windows, shape.group))

    def _document(
        self,
        ids: NDArray[np.int64],
        answers: NDArray[np.bool_],
        keys: NDArray[np.int64],
        values: NDArray[np.int64],
        shape: Shape,
        whole: int,
        rng: np.random.Generator,
    ) -> None:
        """Fill one document's row [windows · window + 1] in place."""
        window = shape.window
        for place in range(shape.windows - 1):
            mine = slice(place * (whole + 3), (place + 1) * (whole + 3))
            begin = RECORD - int(rng.integers(PHASES))  # Tokens cut off the first record.
            listing = dictionary.records(KEY, keys[mine], values[mine]).reshape(-1)
            ids[place * window : (place + 1) * window] = listing[begin : begin + window]
        # Every window's first record and those behind its whole ones are cut, so nobody can be asked for them.
        stored = np.arange(len(keys)).reshape(-1, whole + 3)
        askable = stored[:, 1 : 1 + whole].reshape(-1)
        cut = stored[:, [0, whole + 1, whole + 2]].reshape(-1)[:3]
        order = np.concatenate([cut[:1], rng.permutation(askable)[:whole], cut[1:]])
        phase = int(rng.integers(PHASES))
        asking = dictionary.records(QUESTION, keys[order], values[order]).reshape(-1)
        last = (shape.windows - 1) * window
        ids[last:] = asking[RECORD - phase : RECORD - phase + window + 1]
        spots = last + phase + VALUE_AT + RECORD * np.arange(whole)[:, None] + np.arange(dictionary.LENGTH)
        answers[spots.reshape(-1)] = True
