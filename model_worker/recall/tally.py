"""The tally: how much attention each document and passage got, added up while a model reads its memory.

Every query of a layer gives out a mass of 1, the mean over its heads: part of it to tokens in memory, the rest to the
window. H query heads, n queries, K top_k, E entries.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from memory_service import Attended, Attribution, Coverage, Measured
from model_worker.recall.passages import PASSAGE_TOKENS, check_passage_tokens
from model_worker.settings import Read

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

WINDOW = "window"  # What is in the window: tokens that have not gone to memory yet.
UNTOLD = "untold"  # In memory, but the answer does not say where.
_WINDOW, _UNTOLD = 0, 1  # Their numbers; documents and sessions follow.
_UNKNOWN = -1  # The passage of mass of which only the source is known.
_ROUNDING = 1e-5  # Of float32 weights: less is not missing.
_NOBODY = -1  # The source of padding.
_TOGETHER = 8  # Answers counted together, or queries of one that is counted at once.
_PENDING = 1 << 16  # Entries that wait before they are added up.


def is_session(source: str) -> bool:
    """Whether a source is a session, the row's own past, rather than a document."""
    return source.startswith("session:")


class Masses(NamedTuple):
    """Entries of mass, at most one a (token, source, passage); their sum is the number of queries."""

    names: tuple[str, ...]  # Of the sources: WINDOW, UNTOLD, then document ids and "session:<id>".
    token: Integers  # [E] of the row's whole text; 0 throughout if the tally does not keep tokens apart
    source: Integers  # [E] index into `names`
    passage: Integers  # [E] counted from the source's start; -1 where only the source is known
    mass: Floats  # [E]
    queries: int  # (layer, row, query) that asked.

    def by_source(self) -> dict[str, float]:
        """The mean mass of every source that got some; together 1, or nothing if nobody asked."""
        sums = np.bincount(self.source, self.mass, len(self.names)) / max(self.queries, 1)
        return {name: float(mass) for name, mass in zip(self.names, sums, strict=True) if mass > 0}

    def by_passage(self, source: str) -> dict[int, float]:
        """The mean mass of a source's passages, by number; empty where only the source is known."""
        if source not in self.names:
            return {}
        here = (self.source == self.names.index(source)) & (self.passage != _UNKNOWN)
        numbers, place = np.unique(self.passage[here], return_inverse=True)
        sums = np.bincount(place, self.mass[here], len(numbers)) / max(self.queries, 1)
        return {int(number): float(mass) for number, mass in zip(numbers, sums, strict=True)}


class Tally:
    """Adds up the attention of every `Read` it is called with; give it to `Recall(on_read=tally)`.

    Passages need `Recall(top_k=…, tokens=True)`. `Recall(attribution=True)` alone tells the documents, from the
    memory's mean over heads and queries: exact for one head and query, else each is taken to spread its share alike.
    Queries before `first_token` of their row's text are left out. `by_token` keeps the tokens apart, at the cost of
    some bytes for each and all it read. May be looked at from other threads while one generates.
    """

    def __init__(self, passage_tokens: int = PASSAGE_TOKENS, *, first_token: int = 0, by_token: bool = False):
        check_passage_tokens(passage_tokens)
        self.passage_tokens = passage_tokens
        self.first_token = first_token
        self.by_token = by_token
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {WINDOW: _WINDOW, UNTOLD: _UNTOLD}
        self._accounts: dict[tuple[int, int], _Account] = {}  # By layer and row.
        self._waiting: dict[tuple[int, int], list[_Heard]] = {}  # The same, not counted yet.
        self._engines: dict[str, None] = {}
        self._coverage: Coverage | None = None
        self._recall = self._captured = 0.0  # Times queries.
        self._measured = 0  # Queries.

    def __call__(self, read: Read) -> None:
        """Count one answer of the memory."""
        skipped = max(0, self.first_token - read.first_token)
        share = read.share[:, skipped:]  # [H, n]
        if not share.numel():
            return
        with self._lock:
            self._note(read.attended, share.shape[1])
            waiting = self._waiting.setdefault((read.layer, read.row), [])
            waiting.append(_Heard(read.attended, share.detach(), read.first_token + skipped, skipped))
            # One token at a time would cost more to count than to read: numpy's calls are worth some of them.
            if len(waiting) == _TOGETHER or share.shape[1] > _TOGETHER:
                self._count(read.layer, read.row)

    def _count(self, layer: int, row: int) -> None:
        """Add up what was heard of a layer and row."""
        heard = self._waiting.pop((layer, row), None)
        if heard is None:
            return
        share = np.concatenate([one.share.double().cpu().numpy() for one in heard], axis=1)  # [H, n of all]
        heads, queries = share.shape
        share = share / heads
        told = self._told(heard, share)
        if self.by_token:
            remembered, known, each = share.sum(0), np.bincount(told.token, told.mass, queries), 1
        else:
            remembered, known, each = share.sum(keepdims=True)[0], told.mass.sum(keepdims=True), queries
        untold = remembered - known
        untold[untold < each * _ROUNDING] = 0
        entries = _joined([told, _apart(_WINDOW, each - remembered), _apart(_UNTOLD, untold)])
        if self.by_token:
            tokens = np.concatenate([one.first_token + np.arange(one.share.shape[1]) for one in heard])
            entries = entries._replace(token=tokens[entries.token])
        self._accounts.setdefault((layer, row), _Account()).add(entries, queries)

    def _count_all(self) -> None:
        for layer, row in list(self._waiting):
            self._count(layer, row)

    # --- What was counted -------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """Memory layers that asked."""
        with self._lock:
            self._count_all()
            return tuple(sorted({layer for layer, _ in self._accounts}))

    @property
    def engines(self) -> tuple[str, ...]:
        """Which engines answered, as the memory names them."""
        with self._lock:
            return tuple(self._engines)

    @property
    def coverage(self) -> Coverage | None:
        """How much of the scope was searched at worst; of equals, the largest scope. None if nobody asked."""
        return self._coverage

    @property
    def measured(self) -> Measured | None:
        """Recall and captured mass, mean over queries, if `Recall(measure=True)` asked for them."""
        with self._lock:
            count = self._measured
            return Measured(self._recall / count, self._captured / count) if count else None

    def masses(self, layer: int | None = None, row: int | None = None) -> Masses:
        """What a layer and a row gave out; all of them if not named."""
        with self._lock:
            self._count_all()
            chosen = [
                account
                for (its_layer, its_row), account in self._accounts.items()
                if layer in (None, its_layer) and row in (None, its_row)
            ]
            entries = _summed(_joined([account.settled() for account in chosen]))
            return Masses(tuple(self._numbers), *entries, queries=sum(account.queries for account in chosen))

    # --- One answer -------------------------------------------------------------------------------------------------

    def _told(self, heard: Sequence[_Heard], share: Floats) -> _Entries:
        """Where in memory the answers say the mass went; tokens count from the first of the first answer."""
        parts: list[_Entries] = []
        tops: dict[int, list[tuple[_Heard, int]]] = {}
        first = 0
        for one in heard:
            queries = one.share.shape[1]
            if (top := one.attended.tokens) is not None:
                tops.setdefault(top.source.shape[2], []).append((one, first))
            elif one.attended.attribution is not None:
                remembered = share[:, first : first + queries].sum(0)
                parts.append(self._of_attribution(one.attended.attribution, remembered, first))
            first += queries
        parts += [self._of_tokens(group, share) for group in tops.values()]
        return _joined(parts) if parts else _NOTHING

    def _of_tokens(self, heard: Sequence[tuple[_Heard, int]], share: Floats) -> _Entries:
        sources, offsets, weights, places = [], [], [], []
        for one, first in heard:
            top = one.attended.tokens
            assert top is not None
            # An answer put together from pieces may name the tokens of its first queries only: the others stay untold.
            numbers = np.array([*map(self._number, top.sources), _NOBODY], np.int64)  # -1 reads the last.
            sources.append(numbers[top.source[:, one.skipped :].cpu().numpy()])  # [H, n, K]
            offsets.append(top.offset[:, one.skipped :].cpu().numpy())
            weights.append(top.weight[:, one.skipped :].cpu().numpy())
            places.append(first + np.arange(sources[-1].shape[1]))
        source, place = np.concatenate(sources, axis=1), np.concatenate(places)
        seen = source != _NOBODY
        if not seen.any():
            return _NOTHING
        mass = (np.concatenate(weights, axis=1) * share[:, place, None])[seen]
        token = np.broadcast_to(place[:, None], source.shape)[seen] if self.by_token else 0
        passage = np.concatenate(offsets, axis=1)[seen] // self.passage_tokens
        # One number for each (token, source, passage): sorting it is much faster than sorting all three.
        known, passages = len(self._numbers), int(passage.max()) + 1
        found, inverse = np.unique((token * known + source[seen]) * passages + passage, return_inverse=True)
        token_and_source, passage = np.divmod(found, passages)
        token, named = np.divmod(token_and_source, known)
        return _Entries(token, named, passage, np.bincount(inverse, mass, len(found)).astype(np.float64))

    def _of_attribution(self, attribution: Sequence[Attribution], remembered: Floats, first: int) -> _Entries:
        numbers = np.array([self._number(one.source) for one in attribution], np.int64)
        masses = np.array([one.mass for one in attribution], np.float64)
        each = remembered if self.by_token else remembered.sum(keepdims=True)
        tokens = np.repeat(np.arange(len(each)) + (first if self.by_token else 0), len(numbers))
        spread = np.outer(each, masses).ravel()
        return _Entries(tokens, np.tile(numbers, len(each)), np.full(len(tokens), _UNKNOWN), spread)

    def _number(self, source: str) -> int:
        return self._numbers.setdefault(source, len(self._numbers))

    def _note(self, attended: Attended, queries: int) -> None:
        self._engines[attended.engine] = None
        have, now = self._coverage, attended.coverage
        if have is None or (now.fraction, -now.in_scope) < (have.fraction, -have.in_scope):
            self._coverage = now
        if (measured := attended.measured) is not None:
            self._recall += measured.recall * queries
            self._captured += measured.captured_mass * queries
            self._measured += queries


class _Heard(NamedTuple):
    """An answer that waits to be counted."""

    attended: Attended
    share: Tensor  # [H, n] of the queries that count
    first_token: int  # Theirs.
    skipped: int  # Queries of the answer before them.


class _Entries(NamedTuple):
    """The columns of `Masses`."""

    token: Integers
    source: Integers
    passage: Integers
    mass: Floats


_NONE = np.empty(0, np.int64)
_NOTHING = _Entries(_NONE, _NONE, _NONE, np.empty(0, np.float64))


class _Account:
    """The entries of one layer and row; new ones wait until adding them up is worth it."""

    def __init__(self) -> None:
        self.queries = 0
        self._settled = _NOTHING
        self._waiting: list[_Entries] = []
        self._count = 0

    def add(self, entries: _Entries, queries: int) -> None:
        self.queries += queries
        self._waiting.append(entries)
        self._count += len(entries.mass)
        # As long as what is settled: every entry is sorted a few times in all, however many come.
        if self._count > max(_PENDING, len(self._settled.mass)):
            self.settled()

    def settled(self) -> _Entries:
        """All entries, each (token, source, passage) once."""
        if self._waiting:
            self._settled = _summed(_joined([self._settled, *self._waiting]))
            self._waiting, self._count = [], 0
        return self._settled


def _apart(source: int, mass: Floats) -> _Entries:
    """Mass of no passage, one entry a token."""
    return _Entries(np.arange(len(mass)), np.full(len(mass), source), np.full(len(mass), _UNKNOWN), mass)


def _joined(parts: Sequence[_Entries]) -> _Entries:
    if not parts:
        return _NOTHING
    token, source, passage, mass = zip(*parts, strict=True)
    return _Entries(np.concatenate(token), np.concatenate(source), np.concatenate(passage), np.concatenate(mass))


def _summed(entries: _Entries) -> _Entries:
    """Entries of the same place added up, in the order of token, source, passage."""
    if not len(entries.mass):
        return entries
    order = np.lexsort((entries.passage, entries.source, entries.token))
    token, source, passage = entries.token[order], entries.source[order], entries.passage[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (np.diff(token) != 0) | (np.diff(source) != 0) | (np.diff(passage) != 0)
    first = np.flatnonzero(begins)
    return _Entries(token[first], source[first], passage[first], np.add.reduceat(entries.mass[order], first))
