"""A batch between two calls: every row's window, what it has in memory, and how that is read."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from memory_service import Attended, Memory, Partial, Scope
from memory_service.errors import FailedPrecondition, InvalidArgument
from memory_service.types import SessionAppend
from model_worker.errors import InputTooLong
from model_worker.recall.reader import Promise, Reader, whole_scope
from model_worker.recall.rows import Rows
from model_worker.settings import Cut, FotConfig, Overflow, Read, Recall
from model_worker.steps import spread
from model_worker.window import Window


class State:
    """What Hugging Face calls past_key_values. Close it, or use `with`: its sessions hold the service's RAM.

    For one thread at a time. After an error it refuses to go on: what the rows saw is no longer certain.
    """

    is_compileable = False  # Asked by transformers' generate.

    def __init__(self, fot: FotConfig, window: Window, reader: Reader | None, recall: Recall, lease_s: float):
        """Made by `FotModel.start`."""
        self.fot = fot
        self.recall = recall
        self.window = window
        self._reader = reader
        self._rows = Rows(lambda: _memory(reader).session(lease_s))
        self.texts: list[Tensor] = []  # Per row: every token id fed so far, [T] int64 on the CPU.
        self._pads: list[int] = []
        self._broken = False
        self._closed = False

    # --- what it holds ---

    @property
    def batch(self) -> int:
        """Rows; 0 before the first tokens."""
        return self.window.rows

    @property
    def rows(self) -> Rows:
        return self._rows

    @property
    def local_length(self) -> int:
        """Slots of the window in use by the fullest row, padding included."""
        return max((self.window.held(row) for row in range(self.batch)), default=0)

    def memory_tokens(self, row: int = 0) -> int:
        """Tokens of this row that went to memory."""
        return self._rows.rows[row].tokens

    def local(self, layer: int, row: int = 0) -> tuple[Tensor, Tensor]:
        """A row's un-rotated keys and values in the window, [K, tokens, D] each."""
        return self.window.keys_values(layer, row)

    def memory(self, layer: int, row: int = 0) -> tuple[Tensor, Tensor]:
        """A row's keys and values in memory, [K, tokens, D] each, fetched; for tests and research."""
        self._flush()
        found = [s.session.fetch(layer, 0, s.tokens) for s in self._rows.rows[row].stretches]
        return torch.cat([one.keys for one in found], dim=1), torch.cat([one.values for one in found], dim=1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens the longest row has seen, in window and memory."""
        return max((len(text) for text in self.texts), default=0)

    # --- its life ---

    def begin(self, rows: int) -> None:
        """Set the number of rows by the first tokens; later calls must have as many. Raises FailedPrecondition."""
        if self._closed:
            raise FailedPrecondition("this state was closed: start another with model.start()")
        if self._broken:
            raise FailedPrecondition(
                "an earlier call with this state failed half way, so what its rows saw is unknown: start another"
            )
        if not self.batch:
            self.window.resize(rows)
            self._rows.resize(rows)
            self.texts = [torch.empty(0, dtype=torch.int64) for _ in range(rows)]
        elif rows != self.batch:
            raise InvalidArgument(f"this state has {self.batch} rows, the input {rows}; start another state for it")

    def fail(self) -> None:
        """Refuse to go on from here."""
        self._broken = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become copies of the chosen ones; asked by transformers' beam search."""
        chosen = beam_idx.tolist()
        self.window.reorder(chosen)
        self._rows.reorder(chosen)
        self.texts = [self.texts[index] for index in chosen]

    def close(self) -> None:
        """Free the sessions. Harmless twice."""
        if not self._closed:
            self._closed = True
            self._rows.close()
            self.window.resize(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    # --- tokens come and go ---

    def make_room(self, tokens: int, pads: Sequence[int], reach: int | None) -> None:
        """Before `tokens` more slots, of which row b's first pads[b] are padding: send to memory what must leave.

        `reach`: the most tokens the positions allow where nothing may leave (Self-Extend without a memory).
        """
        fot, window = self.fot, self.window
        if reach is not None:
            longest = max(window.tokens(row) + tokens - pads[row] for row in range(self.batch))
            if longest > reach and (extend := fot.self_extend) is not None:
                raise InputTooLong(
                    f"Self-Extend with group {extend.group} and window {extend.window} reaches {reach:,} tokens; the "
                    f"input has {longest:,}. Use a larger group, a smaller window, or memory layers"
                )
        else:
            leaving = [
                self._leaving(row, tokens - (0 if fot.cut is Cut.BATCH else pads[row])) for row in range(self.batch)
            ]
            self._send(leaving)
        window.reserve(tokens, pads, pads_count=fot.cut is Cut.BATCH)
        self._pads = list(pads)

    def _leaving(self, row: int, tokens: int) -> int | None:
        """The slot before which this row's tokens leave so that `tokens` more fit; None: none need to."""
        fot, held = self.fot, self.window.held(row)
        if not held or held + tokens <= fot.window:
            return None
        if fot.overflow is Overflow.FLUSH:
            return self.window.slots
        # Room for more than the next token, or the window would slide, and be rotated anew, with every one.
        room = max(tokens, min(fot.window // 8, fot.window - 1))
        return self.window.slots - max(0, min(fot.last_context_length, fot.window - room))

    def send_all(self) -> None:
        """Send every row's whole window to memory."""
        self._send([self.window.slots] * self.batch)
        self._flush()
        self.window.resize(self.batch)

    def _send(self, leaving: Sequence[int | None]) -> None:
        appends: list[SessionAppend] = []
        for row, slot in enumerate(leaving):
            if slot is None:
                continue
            count = slot - self.window.first[row]
            if count > 0 and self.fot.mem_layers and self._reader is not None:
                appends.append(self._append(row, slot, count))
            self.window.drop(row, slot)
        if appends:
            _required(self._reader).append(appends)

    def _append(self, row: int, slot: int, count: int) -> SessionAppend:
        held = [self.window.keys_values(layer, row, slot) for layer in self.fot.mem_layers]
        keys, values = (torch.stack(list(tensors)) for tensors in zip(*held, strict=True))  # [L, K, count, D]
        own = self._rows.rows[row]
        tail, text = self._rows.tail(own), self.texts[row]
        # What leaves is the oldest of the window, and the window is the end of the text.
        start = len(text) - self.window.tokens(row)
        ids = text[start : start + count]
        append = tail.session.piece(self.fot.mem_layers, keys, values, ids, first_token=tail.tokens)
        self._rows.grow(own, tail, count)
        return append

    def _flush(self) -> None:
        if self._reader is not None:
            self._reader.flush()

    # --- the memory, as a step of the window sees it ---

    def ask(self, layer: int, queries: Tensor, scale: float) -> Promise[tuple[Attended | None, ...]] | None:
        """Attention of queries [B, H, n, D] over documents and each row's own sessions; one call for all rows."""
        if self._reader is None:
            return None
        documents = self.recall.scope()
        questions: list[tuple[Scope, Tensor]] = []
        asked: list[int] = []
        for number, row in enumerate(self._rows.rows):
            scope = whole_scope(documents, row.scopes(row.tokens))
            real = queries[number, :, self._pads[number] :]
            if scope is not None and real.shape[1]:
                questions.append((scope, real))
                asked.append(number)
        if not asked:
            return None
        promise = self._reader.attend(layer, questions, self.recall, scale)

        def result() -> tuple[Attended | None, ...]:
            answers: list[Attended | None] = [None] * self.batch
            for number, answer in zip(asked, promise.result(), strict=True):
                answers[number] = answer
            return tuple(answers)

        return Promise(result)

    def told(self, layer: int, near: Partial, answers: Sequence[Attended | None]) -> Partial:
        """The answers at their place in the batch; `Recall.on_read` hears of each."""
        count = near.output.shape[2]
        spans = [slice(pad, count) for pad in self._pads]
        if (listen := self.recall.on_read) is not None:
            for row, (answer, span) in enumerate(zip(answers, spans, strict=True)):
                if answer is not None:
                    share = torch.sigmoid(answer.lse - near.lse[row, :, span].to(answer.lse))
                    first = len(self.texts[row])
                    listen(Read(layer, row, first, answer, share))
        return spread(answers, spans, near)


def _required(reader: Reader | None) -> Reader:
    if reader is None:
        raise FailedPrecondition("this model was opened without a memory")
    return reader


def _memory(reader: Reader | None) -> Memory:
    return _required(reader).memory
