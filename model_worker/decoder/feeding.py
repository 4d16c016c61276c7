"""A call's tokens through the model: what is too long for the window goes to memory, the rest on top of the window."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model_worker.decoder.inputs import padded
from model_worker.decoder.loading import SessionStore, cut, load
from model_worker.decoder.state import State
from model_worker.decoder.steps import Piece, WindowStep
from model_worker.hf.decoder import Decoder
from model_worker.positions.policy import Policy
from model_worker.positions.self_extend import reach
from model_worker.settings import Cut, FotConfig


class Slice(NamedTuple):
    """Some tokens of a prompt that were fed."""

    tokens: int
    left: int  # Of the prompt.
    logits: Tensor | None = None  # [V] after them; None of those that only went to memory.


class Feeder:
    """Runs tokens on top of a state. Keeps nothing between calls."""

    def __init__(self, decoder: Decoder, fot: FotConfig, policies: Sequence[Policy]):
        self._decoder = decoder
        self._fot = fot
        self._policies = policies

    def step(self, state: State, ids: Sequence[int]) -> Tensor:
        """One more token of every row: logits [B, V]."""
        state.make_room(1, [0] * len(ids), self._reach)
        step = WindowStep(state.window, self._fot.mem_layers, state)
        logits = self._decoder.logits(torch.tensor(ids, device=self._decoder.device)[:, None], step, 1)
        state.window.advance(1)
        for line, token in zip(state.lines, ids, strict=True):
            line.ids.append(token)
        return logits[:, -1]

    def fits(self, tokens: int) -> bool:
        """Whether so many tokens can be read together with other rows: none goes straight to memory."""
        return self._fot.cut is Cut.ROW and tokens <= self._fot.last_context_length

    def texts(self, state: State, ids: Sequence[Sequence[int]]) -> Tensor:
        """A text of every row that `fits`, at once: logits [B, V] after them."""
        texts = [torch.tensor(one) for one in ids]
        padded_ids, pads = padded(texts, 0)
        return self._feed(state, padded_ids, pads, texts, 1)[:, -1]

    def slices(self, state: State, ids: Sequence[int], allowed: Callable[[], int]) -> Iterator[Slice]:
        """`run` of one row in slices, each of about as many tokens as `allowed` says when it begins.

        What goes straight to memory goes in whole windows, at least one a slice.
        """
        text = torch.tensor(ids)
        stop, size = self._prefix(len(ids), [0])[0], self._fot.window
        if state.window.held(0):
            for start in range(0, stop, size):
                yield from self._fed(state, text, start, min(start + size, stop), allowed)
        elif stop:
            yield from self._loaded(state, text, stop, allowed)
        yield from self._fed(state, text, stop, len(text), allowed)

    def _loaded(self, state: State, text: Tensor, stop: int, allowed: Callable[[], int]) -> Iterator[Slice]:
        fot = self._fot
        store = SessionStore(state.reader, state.rows, [text], state.recall) if state.reader is not None else None
        pieces = deque(cut(0, stop, fot.window, 0 if fot.cut is Cut.BATCH else fot.overlap))
        while pieces:
            some = [pieces.popleft()]
            tokens, most = some[0].tokens, allowed()
            while pieces and tokens + pieces[0].tokens <= most:
                tokens += pieces[0].tokens
                some.append(pieces.popleft())
            load(self._decoder, fot, self._policies, some, [text], store)
            if not pieces and store is not None:
                store.finish([stop])
            yield Slice(tokens, len(text) - some[-1].stop)
        state.lines[0].said(text[:stop].tolist())

    def _fed(self, state: State, text: Tensor, start: int, stop: int, allowed: Callable[[], int]) -> Iterator[Slice]:
        """A part of a text that fits the window, on top of it; all that must leave for it leaves first."""
        state.make_room(stop - start, [0], self._reach)
        while start < stop:
            some = text[start : min(start + max(1, allowed()), stop)]
            start += len(some)
            state.reserve(len(some), [0])
            logits = self._through(state, some[None], [some], 1)
            yield Slice(len(some), len(text) - start, logits[0, -1])

    def run(self, state: State, ids: Tensor, pads: list[int], keep: int, use_cache: bool) -> Tensor:
        """Logits [B, keep or T, V] of ids [B, T], of which row b's first pads[b] are padding."""
        total = ids.shape[1]
        texts = [row[pad:].cpu() for row, pad in zip(ids, pads, strict=True)]
        prefix = self._prefix(total, pads)
        wanted = keep == 0 or keep > total - max(prefix, default=0)
        found: Tensor | None = None  # [B, T, V] when logits of loaded windows are wanted too

        def on_logits(piece: Piece, logits: Tensor) -> None:
            nonlocal found
            found = logits.new_zeros(len(ids), total, logits.shape[-1]) if found is None else found
            found[piece.row, pads[piece.row] + piece.fresh : pads[piece.row] + piece.stop] = logits[piece.kept]

        if any(prefix):
            if any(state.window.held(row) for row in range(state.batch)):
                self._walk(state, texts, prefix, on_logits if wanted else None)
            else:
                self._load(state, texts, prefix, pads, on_logits if wanted else None)
        rest = [text[stop:] for text, stop in zip(texts, prefix, strict=True)]
        last = min(total, self._fot.last_context_length)
        width = total if not any(prefix) else last if self._fot.cut is Cut.BATCH else 1
        rest_ids, rest_pads = padded(rest, width)
        logits = self._feed(state, rest_ids, rest_pads, rest, keep if not wanted else 0)
        if not use_cache:
            state.send_all()
        if found is not None:
            for row, (pad, text) in enumerate(zip(rest_pads, rest, strict=True)):
                if len(text):
                    found[row, total - len(text) :] = logits[row, pad:]
            logits = found
        return logits[:, -keep:] if keep else logits

    def _prefix(self, total: int, pads: Sequence[int]) -> list[int]:
        """How many of each row's tokens go to memory before the last window."""
        last = self._fot.last_context_length
        if self._reach is not None:
            return [0] * len(pads)
        if self._fot.cut is Cut.BATCH:
            return [max(total - last - pad, 0) for pad in pads]
        return [max(total - pad - last, 0) for pad in pads]

    @property
    def _reach(self) -> int | None:
        """The most tokens a row may have where none can leave its window."""
        if self._fot.self_extend is None or self._fot.mem_layers:
            return None
        return reach(self._fot.self_extend, self._decoder.trained_length)

    def _load(self, state: State, texts: list[Tensor], prefix: list[int], pads: list[int], on_logits: Any) -> None:
        fot = self._fot
        shifts = pads if fot.cut is Cut.BATCH else [0] * len(pads)
        overlap = 0 if fot.cut is Cut.BATCH else fot.overlap
        pieces = [
            piece
            for row, stop in enumerate(prefix)
            for piece in cut(row, stop, fot.window, overlap, shifts[row])
        ]  # fmt: skip
        store = SessionStore(state.reader, state.rows, texts, state.recall) if state.reader is not None else None
        load(self._decoder, fot, self._policies, pieces, texts, store, on_logits)
        if store is not None:
            store.finish(prefix)
        for row, stop in enumerate(prefix):
            state.lines[row].said(texts[row][:stop].tolist())

    def _walk(self, state: State, texts: list[Tensor], prefix: list[int], on_logits: Any) -> None:
        """Windows one after another, on top of what the rows' windows hold already."""
        size = self._fot.window
        for start in range(0, max(prefix), size):
            parts = [text[start : min(start + size, stop)] for text, stop in zip(texts, prefix, strict=True)]
            ids, pads = padded(parts, 0)
            logits = self._feed(state, ids, pads, parts, 0 if on_logits is not None else 1)
            for row, part in enumerate(parts):
                if on_logits is not None and len(part):
                    on_logits(Piece(row, start, start + len(part), start), logits[row, pads[row] :])

    def _feed(self, state: State, ids: Tensor, pads: list[int], texts: list[Tensor], keep: int) -> Tensor:
        """Run [B, n] tokens on top of the rows' windows; logits [B, keep or n, V]."""
        state.make_room(ids.shape[1], pads, self._reach)
        return self._through(state, ids, texts, keep)

    def _through(self, state: State, ids: Tensor, texts: list[Tensor], keep: int) -> Tensor:
        """The same, where there is room for them."""
        step = WindowStep(state.window, self._fot.mem_layers, state)
        logits = self._decoder.logits(ids.to(self._decoder.device), step, keep)
        state.window.advance(ids.shape[1])
        for line, text in zip(state.lines, texts, strict=True):
            line.said(text.tolist())
        return logits
