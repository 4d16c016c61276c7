"""Documents cut into a batch's windows as LongLLaMA's authors do it: a row goes on with its document until that ends.

So windows that follow each other in a document come in successive batches, or side by side in one: with `packing` k, k
consecutive rows are k consecutive windows, and memory layers that read across rows read their own document too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memory_service.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Document:
    """One text as tokens, with what predicting each of them is worth."""

    tokens: Sequence[int]
    weights: Sequence[float]  # One a token; 0 is not scored.
    source: str = ""  # Which part of a mixture it is of.

    @classmethod
    def of(cls, tokens: Sequence[int], begin: int | None, end: int | None, source: str = "") -> Document:
        """A text between the tokens that begin and end one, of which the first is not to be predicted."""
        before, after = [] if begin is None else [begin], [] if end is None else [end]
        return cls([*before, *tokens, *after], [0.0] * len(before) + [1.0] * (len(tokens) + len(after)), source)


@dataclass(frozen=True, slots=True)
class Windows:
    """A batch of windows [rows, length] and what it took."""

    ids: Tensor  # int64
    targets: Tensor  # int64, the token after each.
    weights: Tensor  # float32, of the targets.
    documents: int  # Begun so far.
    tokens: int  # Given out so far.
    sources: dict[str, int]  # Tokens of this batch by source, padding counted with its document.


def packing_of(pipeline: str, rows: int) -> int:
    """Consecutive rows that go on with one document, by the pipeline's name in the authors' code.

    "doc_aware" and "doc_aware_k1" keep one document a row, "doc_aware_k4" one for four rows, and "linear" fills a batch
    with documents one after the other, as if it were one row. Raises InvalidArgument for other names.
    """
    if pipeline == "linear":
        return rows
    found = re.fullmatch(r"doc_aware(?:_k([1-9]\d*))?", pipeline)
    if found is None:
        raise InvalidArgument(f"there is no pipeline {pipeline!r}; there are linear, doc_aware and doc_aware_k2, …")
    return int(found[1] or 1)


def packed(
    documents: Iterable[Document],
    rows: int,
    length: int,
    *,
    packing: int = 1,
    min_example_length: int = 0,
    pad: bool = False,
    pad_token: int = 0,
) -> Iterator[Windows]:
    """Batches of windows for as long as there are documents: what is left when they run out is not given out.

    Documents of fewer than `min_example_length` tokens are skipped. `pad` fills each document up to whole rows of
    packing · length tokens and scores neither padding nor a document's first token; else one is followed by the next.
    Raises InvalidArgument at once for sizes that do not fit, and for a document whose weights do not fit its tokens.
    """
    if rows < 1 or length < 1 or packing < 1 or rows % packing:
        raise InvalidArgument(
            f"rows, length and packing must be ≥ 1 and packing divide rows, got {rows}, {length} and {packing}"
        )
    taken = (one for one in documents if len(one.tokens) >= min_example_length)
    return _packed(taken, rows, length, packing, pad_token if pad else None)


def _packed(
    documents: Iterator[Document], rows: int, length: int, packing: int, pad_token: int | None
) -> Iterator[Windows]:
    width = packing * length
    buffers = [_Buffer(width, pad_token) for _ in range(rows // packing)]
    begun = given = 0
    while True:
        for buffer in buffers:
            while not buffer.full:
                document = next(documents, None)
                if document is None:
                    return
                buffer.add(document)
                begun += 1
        tokens, weights, sources = zip(*(buffer.take() for buffer in buffers), strict=True)
        ids = torch.from_numpy(np.stack(tokens))  # [rows / packing, width + 1]
        given += rows * length
        yield Windows(
            ids=ids[:, :-1].reshape(rows, length),
            targets=ids[:, 1:].reshape(rows, length),
            weights=torch.from_numpy(np.stack(weights))[:, 1:].reshape(rows, length),
            documents=begun,
            tokens=given,
            sources=dict(sum(sources, Counter[str]())),
        )


class _Buffer:
    """What a row has yet to give out."""

    def __init__(self, width: int, pad_token: int | None):
        self._width, self._pad_token = width, pad_token
        self._tokens: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._weights: NDArray[np.float32] = np.empty(0, dtype=np.float32)
        self._spans: list[tuple[str, int]] = []  # Sources and how many tokens of them follow each other.

    @property
    def full(self) -> bool:
        """Whether it has a row's tokens and the one after them, the last one's target."""
        return len(self._tokens) > self._width

    def add(self, document: Document) -> None:
        tokens = np.asarray(document.tokens, dtype=np.int64)
        weights = np.array(document.weights, dtype=np.float32)
        if tokens.ndim != 1 or tokens.shape != weights.shape:
            raise InvalidArgument(
                f"a document needs a weight for each token, got {list(tokens.shape)} and {list(weights.shape)}"
            )
        if self._pad_token is not None:
            weights[:1] = 0
            missing = -len(tokens) % self._width
            tokens = np.pad(tokens, (0, missing), constant_values=self._pad_token)
            weights = np.pad(weights, (0, missing))
        self._tokens = np.concatenate([self._tokens, tokens])
        self._weights = np.concatenate([self._weights, weights])
        self._spans.append((document.source, len(tokens)))

    def take(self) -> tuple[NDArray[np.int64], NDArray[np.float32], Counter[str]]:
        """A row's tokens and the one after them [width + 1], which stays; their weights; the row's tokens by source."""
        width = self._width
        row = self._tokens[: width + 1], self._weights[: width + 1], self._counted(width)
        self._tokens, self._weights = self._tokens[width:], self._weights[width:]
        return row

    def _counted(self, tokens: int) -> Counter[str]:
        counted: Counter[str] = Counter()
        while tokens:
            source, left = self._spans.pop(0)
            taken = min(left, tokens)
            counted[source] += taken
            tokens -= taken
            if taken < left:
                self._spans.insert(0, (source, left - taken))
        return counted
