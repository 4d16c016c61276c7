"""Long texts into memory: cut into windows, many windows at once wherever the result is the same.

A window's keys and values depend on the window and, above the first memory layer, on what its text had in memory
before it. So the windows of a block go up the layers together: each layer appends all of theirs, then every window
reads what stands before it. Nothing above the last memory layer's keys and values is computed unless logits are wanted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from memory_service import Attended, Partial, Scope, SessionScope
from memory_service.types.sessions import SessionAppend
from model_worker.attention.room import Room
from model_worker.decoder.repeats import Repeats
from model_worker.decoder.steps import LoadStep, Piece, Store, spread
from model_worker.hf.crew import Crew
from model_worker.hf.decoder import Decoder
from model_worker.hf.lean import Lean, lean_of
from model_worker.positions.policy import Policy
from model_worker.recall.reader import Promise, Reader, whole_scope
from model_worker.recall.rows import Row, Rows, Stretch
from model_worker.settings import FotConfig, Recall

OnLogits = Callable[[Piece, Tensor], None]

_PASS_TOKENS = 2048  # Of a lean pass at most: what lies between two of its products should stay in a cache.
_REMEMBERED = 65_536  # Tokens in windows that may come again: some tens of MB of a small model's keys and values.


def cut(row: int, stop: int, window: int, overlap: int, pads: int = 0) -> list[Piece]:
    """The windows of a text's first `stop` tokens: `window` tokens each, the first `overlap` of them seen before.

    `pads` moves the borders as if so many tokens of padding stood before the text.
    """
    pieces, fresh = [], 0
    while fresh < stop:
        start = max(0, fresh - overlap)
        end = min(stop, start + window - (pads + start) % window if pads and not overlap else start + window)
        pieces.append(Piece(row, start, end, fresh))
        fresh = end
    return pieces


def load(
    decoder: Decoder,
    fot: FotConfig,
    policies: Sequence[Policy],
    pieces: Sequence[Piece],
    texts: Sequence[Tensor],
    store: Store | None,
    on_logits: OnLogits | None = None,
    on_block: Callable[[int], None] | None = None,
) -> None:
    """Run the windows of `texts` (token ids [T]) through the layers; their keys and values go to `store`.

    `store` is None for a model without memory layers. `on_logits` gets the logits [n, V] of every window, which costs
    the whole stack; `on_block` the tokens of each finished block. Windows of one text must come in order.
    """
    if not fot.mem_layers and on_logits is None:
        return
    if on_logits is None and store is not None and pieces:
        tokens, longest = sum(piece.tokens for piece in pieces), max(piece.tokens for piece in pieces)
        lean = lean_of(decoder, fot, tokens, longest)
        if lean is not None:
            _load_lean(lean, fot, pieces, texts, store, on_block)
            return
    stop_after = None if on_logits is not None else fot.mem_layers[-1]
    for block in blocks(pieces, fot.block_tokens):
        ids = _ids(block, texts)
        step = LoadStep(block, policies, fot.mem_layers, store, stop_after)
        if on_logits is None:
            decoder.fill(ids.to(decoder.device), step)
        else:
            logits = decoder.logits(ids.to(decoder.device), step, 0)
            for number, piece in enumerate(block):
                on_logits(piece, logits[number, : piece.tokens])
        if on_block is not None:
            on_block(sum(piece.stop - piece.fresh for piece in block))


def _load_lean(
    lean: Lean,
    fot: FotConfig,
    pieces: Sequence[Piece],
    texts: Sequence[Tensor],
    store: Store,
    on_block: Callable[[int], None] | None,
) -> None:
    """The same by the lean pass: blocks side by side on all cores, stored by the caller's thread and in order.

    Windows whose tokens stood in an earlier window are not computed again.
    """
    longest = max(piece.tokens for piece in pieces)
    repeats = Repeats((_seen(piece, texts) for piece in pieces), _REMEMBERED // longest)
    todo = list(blocks([pieces[number] for number in repeats.firsts], min(fot.block_tokens, _PASS_TOKENS)))
    found = deque[Future[tuple[Tensor, Tensor]]]()
    whole = _Whole(repeats, pieces, fot.block_tokens)

    def settle() -> None:
        for block, keys, values in whole.after(*found.popleft().result()):
            store.append(fot.mem_layers[-1], block, keys, values)
            if on_block is not None:
                on_block(sum(piece.stop - piece.fresh for piece in block))

    with Crew(len(todo)) as crew:
        for block in todo:
            found.append(crew.submit(partial(_filled, lean, block, texts)))
            if len(found) == 2 * crew.threads:
                settle()
        while found:
            settle()


class _Whole:
    """All windows in order, as those that are computed come."""

    def __init__(self, repeats: Repeats, pieces: Sequence[Piece], tokens: int):
        """Blocks of repeated windows have at most `tokens`."""
        self._repeats = repeats
        self._pieces = pieces
        self._tokens = tokens
        self._firsts = deque(repeats.firsts)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # Windows [K, n, D] that later ones take over.
        self._next = 0

    def after(self, keys: Tensor, values: Tensor) -> Iterator[tuple[Sequence[Piece], Tensor, Tensor]]:
        """Blocks of windows, with keys and values [B, K, n, D], that are complete with these of the next computed."""
        computed = {self._firsts.popleft(): number for number in range(len(keys))}
        begin, self._next = self._next, self._firsts[0] if self._firsts else len(self._pieces)
        if self._next - begin == len(computed):
            yield self._pieces[begin : self._next], keys, values
        else:
            now = self._kept | {one: (keys[row], values[row]) for one, row in computed.items()}
            at = begin
            for block in blocks(self._pieces[begin : self._next], self._tokens):
                rows = [now[origin] for origin in self._repeats.origins[at : at + len(block)]]
                at += len(block)
                yield block, _stacked([key for key, _ in rows]), _stacked([value for _, value in rows])
        self._kept = {one: pair for one, pair in self._kept.items() if self._repeats.last(one) >= self._next}
        for one, row in computed.items():
            if self._repeats.last(one) >= self._next:
                # A block's tensors would stay as long as one of its windows does.
                self._kept[one] = (keys[row].clone(), values[row].clone())


def _seen(piece: Piece, texts: Sequence[Tensor]) -> tuple[int, bytes]:
    """What a window's keys and values are made of, and from which token on they are kept."""
    return piece.kept.start, texts[piece.row][piece.start : piece.stop].numpy().tobytes()


def _filled(lean: Lean, block: Sequence[Piece], texts: Sequence[Tensor], room: Room) -> tuple[Tensor, Tensor]:
    """Keys and values [B, K, n, D] of a block's windows; what memory has of all of them already is left as it comes."""
    ids, known = _ids(block, texts), min(piece.fresh - piece.start for piece in block)
    whole = []
    for part in lean.fill(ids, known, room):
        batch, heads, _, dim = part.shape
        whole.append(torch.empty(batch, heads, ids.shape[1], dim, dtype=part.dtype))
        whole[-1][:, :, known:] = part
    keys, values = whole
    return keys, values


def _ids(block: Sequence[Piece], texts: Sequence[Tensor]) -> Tensor:
    """The tokens of a block's windows, padded on the right: [B, n]."""
    ids = torch.zeros(len(block), max(piece.tokens for piece in block), dtype=torch.int64)
    for number, piece in enumerate(block):
        ids[number, : piece.tokens] = texts[piece.row][piece.start : piece.stop]
    return ids


def blocks(pieces: Sequence[Piece], tokens: int) -> Iterator[list[Piece]]:
    """Consecutive pieces of at most `tokens` tokens together, padding included; at least one."""
    block: list[Piece] = []
    for piece in pieces:
        longest = max([piece.tokens, *(one.tokens for one in block)])
        if block and longest * (len(block) + 1) > tokens:
            yield block
            block = []
        block.append(piece)
    if block:
        yield block


@dataclass(frozen=True, slots=True)
class _Target:
    """Where one text goes: the session that takes its tokens, and what its row had in memory before."""

    tail: Stretch
    earlier: tuple[SessionScope, ...]

    def before(self, token: int) -> tuple[SessionScope, ...]:
        """The sessions a window that starts at this token of the text sees."""
        until = self.tail.tokens + token
        return (*self.earlier, SessionScope(self.tail.session.id, until)) if until else self.earlier


class SessionStore:
    """The sessions of a batch's rows as the store of their long prompts."""

    def __init__(self, reader: Reader, rows: Rows, texts: Sequence[Tensor], recall: Recall):
        self._reader = reader
        self._rows = rows
        self._texts = texts
        self._recall = recall.quiet()  # What windows read on their way into memory is nobody's answer.
        self._documents = recall.scope()
        self._targets: dict[int, _Target] = {}

    def append(self, layer: int, pieces: Sequence[Piece], keys: Tensor, values: Tensor) -> None:
        """Send the fresh tokens of every window to its row's session, all rows in one call."""
        appends: list[SessionAppend] = []
        for run in _runs(pieces):
            row, kept = pieces[run.start].row, [(number, pieces[number].kept) for number in run]
            target = self._target(row)
            first, last = pieces[run.start].fresh, pieces[run.stop - 1].stop
            appends.append(
                target.tail.session.piece(
                    layer,
                    _strung(keys, kept),
                    _strung(values, kept),
                    self._texts[row][first:last],
                    first_token=target.tail.tokens + first,
                )
            )
        self._reader.append(appends)

    def attend(self, layer: int, pieces: Sequence[Piece], queries: Tensor, scale: float) -> Promise[Partial] | None:
        """Ask for all windows at once, each before its own start."""
        scopes = [whole_scope(self._documents, self._target(p.row).before(p.start)) for p in pieces]
        asked = [number for number, scope in enumerate(scopes) if scope is not None]
        if not asked:
            return None
        questions: list[tuple[Scope, Tensor]] = []
        for number, scope in enumerate(scopes):
            if scope is not None:
                questions.append((scope, queries[number, :, : pieces[number].tokens]))
        promise = self._reader.attend(layer, questions, self._recall, scale)
        like = Partial(queries, queries[..., 0])

        def result() -> Partial:
            answers: list[Attended | None] = [None] * len(pieces)
            for number, answer in zip(asked, promise.result(), strict=True):
                answers[number] = answer
            return spread(answers, [slice(0, piece.tokens) for piece in pieces], like)

        return Promise(result)

    def finish(self, stops: Sequence[int]) -> None:
        """Count what every row now has in memory, and wait until it has arrived."""
        self._reader.flush()
        for row, target in self._targets.items():
            self._rows.grow(self._rows.rows[row], target.tail, stops[row])

    def _target(self, row: int) -> _Target:
        if row not in self._targets:
            found: Row = self._rows.rows[row]
            tail = self._rows.tail(found)
            earlier = found.stretches[:-1] if tail.tokens else found.stretches
            scopes = tuple(SessionScope(stretch.session.id, stretch.tokens) for stretch in earlier)
            self._targets[row] = _Target(tail, scopes)
        return self._targets[row]


def _runs(pieces: Sequence[Piece]) -> Iterator[range]:
    """Runs of consecutive pieces of one row."""
    start = 0
    for number in range(1, len(pieces) + 1):
        if number == len(pieces) or pieces[number].row != pieces[start].row:
            yield range(start, number)
            start = number


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """Windows [K, n, D], padded to the longest: [B, K, n, D]."""
    longest = max(row.shape[1] for row in rows)
    return torch.stack([nn.functional.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows])


def _strung(tensor: Tensor, kept: Sequence[tuple[int, slice]]) -> Tensor:
    """The kept tokens of batch rows [B, K, n, D], one after another: [K, T, D]."""
    return torch.cat([tensor[number, :, span] for number, span in kept], dim=1)
