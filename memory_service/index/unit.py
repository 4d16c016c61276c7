"""An index of some documents, as the store sees it. R query rows, D head_dim; no Faiss here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from memory_service.index.clustering import Floats, Ints
from memory_service.index.factories import check_params
from memory_service.storage.vfs import Buffer

Bits = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class IndexedDocument:
    """A document as it was when it was indexed."""

    pk: int
    generation: int
    tokens: int


class HeadIndex(Protocol):
    """The index of one layer and kv head."""

    @property
    def nbytes(self) -> int:
        """RAM it takes."""

    def search(self, queries: Floats, candidates: int, params: Mapping[str, float], allowed: Bits | None) -> Ints:
        """Ids [R, candidates], -1 where there is none."""

    def pieces(self) -> Sequence[Buffer]:
        """Its bytes, for a file."""


@dataclass(frozen=True, slots=True, eq=False)
class IndexUnit:
    """An immutable index of some documents; a token's id is its place in the concatenation of their tokens."""

    name: str
    documents: tuple[IndexedDocument, ...]
    factory: str  # What was built: fewer lists than asked for where keys are few.
    kv_heads: int
    heads: tuple[HeadIndex, ...]  # [L * H]

    @property
    def tokens(self) -> int:
        return sum(one.tokens for one in self.documents)

    @property
    def starts(self) -> Ints:
        """Id of each document's first token, [documents]."""
        return np.cumsum([0, *(one.tokens for one in self.documents)], dtype=np.int64)[:-1]

    @property
    def nbytes(self) -> int:
        return sum(head.nbytes for head in self.heads)

    def search(
        self,
        layer_index: int,
        head: int,
        queries: Floats,
        candidates: int,
        params: Mapping[str, float] | None = None,
        allowed: Bits | None = None,
    ) -> Ints:
        """Ids [R, candidates] of tokens that probably score highest by inner product, in no order; -1 for none.

        `queries` are [R, D] float32; `allowed` has a bit for each token, the lowest bit of a byte first. Of `params`,
        nprobe (lists visited) and efSearch count where the index has such. Runs without the GIL for the most part.
        """
        params = params or {}
        check_params(params)
        assert queries.ndim == 2
        assert queries.dtype == np.float32
        assert allowed is None or allowed.size == (self.tokens + 7) // 8
        index = self.heads[layer_index * self.kv_heads + head]
        found = index.search(_scaled(queries), min(candidates, self.tokens), params, allowed)
        if found.shape[1] == candidates:
            return found
        return np.pad(found, ((0, 0), (0, candidates - found.shape[1])), constant_values=-1)


def _scaled(queries: Floats) -> Floats:
    """Queries with 1 as their largest component: the order of scores stays, and no score overflows or vanishes."""
    largest = np.abs(queries).max(axis=1, keepdims=True)
    # To a query of zeros all keys are equal; any other finds as good ones, and gives codes something to tell apart.
    return np.ascontiguousarray(np.where(largest > 0, queries, 1) / np.where(largest > 0, largest, 1), np.float32)
