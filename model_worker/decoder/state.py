"""A batch between two calls: every row's window, what it has in memory, and how that is read."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import TracebackType
from typing import NoReturn, Self

import torch
from torch import Tensor

from memory_service import Attended, FotError, Memory, Partial, Scope
from memory_service.errors import FailedPrecondition, InvalidArgument
from memory_service.types.sessions import SessionAppend
from model_worker.decoder.steps import spread
from model_worker.decoder.window import Window
from model_worker.errors import InputTooLong
from model_worker.recall.line import Line
from model_worker.recall.reader import Promise, Reader, uncovered, whole_scope
from model_worker.recall.rows import Rows
from model_worker.settings import Cut, FotConfig, Overflow, Read, Recall


class State:
    """What Hugging Face calls past_key_values. Close it, or use `with`: its sessions hold the service's RAM.

    For one thread at a time. After an error it refuses to go on: what the rows saw is no longer certain.
    """

    is_compileable = False  # Asked by transformers' generate.

    def __init__(self, fot: FotConfig, window: Window, reader: Reader | None, recall: Recall, lease_s: float):
        """Made by `FotModel.start`."""
        self.fot = fot
        self.window = window
        self.lines: list[Line] = []
        self._recall = recall
        self._reader = reader
        self._rows = Rows(lambda: _memory(reader).session(lease_s))
        self._pads: list[int] = []
        self._apart = False
        self._broken = False
        self._closed = False

    # --- what it holds ---

    @property
    def batch(self) -> int:
        """Rows; 0 before the first tokens."""
        return self.window.rows

    @property
    def rows(self) -> Rows:
        """The rows it began with, without those that joined."""
        return self._rows

    @property
    def reader(self) -> Reader | None:
        """What the rows it began with read and write; None without a memory."""
        return self._reader

    @property
    def recall(self) -> Recall:
        """How memory is read; setting it sets it for every row."""
        return self._recall

    @recall.setter
    def recall(self, recall: Recall) -> None:
        self._recall = recall
        for line in self.lines:
            line.reads_with(recall)

    @property
    def texts(self) -> list[Tensor]:
        """Per row: every token id fed so far, [T] int64 on the CPU."""
        return [line.text for line in self.lines]

    @property
    def local_length(self) -> int:
        """Slots of the window in use by the fullest row, padding included."""
        return max((self.window.held(row) for row in range(self.batch)), default=0)

    def memory_tokens(self, row: int = 0) -> int:
        """Tokens of this row that went to memory."""
        return self.lines[row].row.tokens

    def local(self, layer: int, row: int = 0) -> tuple[Tensor, Tensor]:
        """A row's un-rotated keys and values in the window, [K, tokens, D] each."""
        return self.window.keys_values(layer, row)

    def memory(self, layer: int, row: int = 0) -> tuple[Tensor, Tensor]:
        """A row's keys and values in memory, [K, tokens, D] each, fetched; for tests and research."""
        self._flush()
        found = [s.session.fetch(layer, 0, s.tokens) for s in self.lines[row].row.stretches]
        return torch.cat([one.keys for one in found], dim=1), torch.cat([one.values for one in found], dim=1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens the longest row has seen, in window and memory."""
        return max((len(line.ids) for line in self.lines), default=0)

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
            self.lines = [Line(self._rows, row, self._reader, self._recall) for row in range(rows)]
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
        texts = [self.lines[index].ids[:] for index in chosen]
        self.lines = [Line(self._rows, row, self._reader, self._recall, ids) for row, ids in enumerate(texts)]

    def close(self) -> None:
        """Free the sessions. Harmless twice."""
        if not self._closed:
            self._closed = True
            for rows in {id(line.rows): line.rows for line in self.lines}.values():
                rows.close()
            self._rows.close()
            self.lines = []
            self.window.resize(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    # --- rows of many requests ---

    def admit(self, other: State) -> None:
        """Take another state's rows in, each with its own memory and recall; `other` is empty then, and closed.

        From now on an error of one row is kept in its line instead of raised, and the other rows go on.
        """
        self._apart = True
        self.window.admit(other.window)
        self.lines += other.lines
        other.lines = []
        other._rows = Rows(_nowhere)
        other._closed = True

    def leave(self, row: int) -> Line:
        """Let a row go; the last one takes its place. Its sessions are the caller's to close: `line.rows.close()`."""
        self.window.leave(row)
        line, last = self.lines[row], self.lines.pop()
        if last is not line:
            self.lines[row] = last
        return line

    def alone(self, row: int) -> State:
        """What a row holds as a state of its own, to go on with after it left here."""
        line = self.lines[row]
        one = State(self.fot, self.window.copy(row), line.reader, line.recall, 0.0)
        one._rows, one.lines = line.rows, [line]
        return one

    def rewind(self, tokens: int) -> bool:
        """Forget all but the first `tokens` of a single row; false if some of the others are in memory already."""
        (line,) = self.lines
        newest = len(line.ids) - tokens
        if newest > self.window.tokens(0):
            return False
        self.window.forget_newest(newest)
        del line.ids[tokens:]
        return True

    # --- tokens come and go ---

    def make_room(self, tokens: int, pads: Sequence[int], reach: int | None) -> None:
        """Before `tokens` more slots, of which row b's first pads[b] are padding: send to memory what must leave.

        `reach`: the most tokens the positions allow where nothing may leave (Self-Extend without a memory).
        Raises InputTooLong if they allow fewer.
        """
        fot, window = self.fot, self.window
        if reach is not None:
            for row, line in enumerate(self.lines):
                longest = window.tokens(row) + tokens - pads[row]
                if longest > reach and (extend := fot.self_extend) is not None:
                    self._failed(
                        line,
                        InputTooLong(
                            f"Self-Extend with group {extend.group} and window {extend.window} reaches {reach:,} "
                            f"tokens; the input has {longest:,}. Use a larger group, a smaller window, or memory layers"
                        ),
                    )
        else:
            leaving = [
                self._leaving(row, tokens - (0 if fot.cut is Cut.BATCH else pads[row])) for row in range(self.batch)
            ]
            self._send(leaving)
        self.reserve(tokens, pads)

    def reserve(self, tokens: int, pads: Sequence[int]) -> None:
        """Slots for the next `tokens`, where what must leave has left."""
        self.window.reserve(tokens, pads, pads_count=self.fot.cut is Cut.BATCH)
        self._pads = list(pads)

    def _failed(self, line: Line, error: Exception) -> None:
        """What went wrong is kept where rows stand for themselves, else raised."""
        if not self._apart:
            raise error
        line.fail(error)

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
        appends: dict[Reader, list[tuple[Line, SessionAppend]]] = {}
        for row, (line, slot) in enumerate(zip(self.lines, leaving, strict=True)):
            if slot is None:
                continue
            count = slot - self.window.first[row]
            if count > 0 and self.fot.mem_layers and line.reader is not None and line.error is None:
                try:
                    appends.setdefault(line.reader, []).append((line, self._append(row, slot, count)))
                except FotError as error:  # A session that does not open.
                    self._failed(line, error)
            self.window.drop(row, slot)
        for reader, numbered in appends.items():
            lines, pieces = zip(*numbered, strict=True)
            if self._apart:
                reader.append_apart(pieces, lambda number, error, lines=lines: lines[number].fail(error))  # type: ignore[misc]
            else:
                reader.append(pieces)

    def _append(self, row: int, slot: int, count: int) -> SessionAppend:
        held = [self.window.keys_values(layer, row, slot) for layer in self.fot.mem_layers]
        keys, values = (torch.stack(list(tensors)) for tensors in zip(*held, strict=True))  # [L, K, count, D]
        line = self.lines[row]
        tail = line.rows.tail(line.row)
        # What leaves is the oldest of the window, and the window is the end of the text.
        start = len(line.ids) - self.window.tokens(row)
        ids = line.ids[start : start + count]
        append = tail.session.piece(self.fot.mem_layers, keys, values, ids, first_token=tail.tokens)
        line.rows.grow(line.row, tail, count)
        return append

    def _flush(self) -> None:
        if self._reader is not None:
            self._reader.flush()

    # --- the memory, as a step of the window sees it ---

    def ask(self, layer: int, queries: Tensor, scale: float) -> Promise[tuple[Attended | None, ...]] | None:
        """Attention of queries [B, H, n, D] over documents and each row's own sessions.

        One call for all rows of a memory that are asked for alike; the calls to several memories run side by side.
        """
        calls: dict[tuple[Reader, Hashable], tuple[list[int], list[tuple[Scope, Tensor]]]] = {}
        for number, (line, pad) in enumerate(zip(self.lines, self._pads, strict=True)):
            if line.reader is None or line.error is not None:
                continue
            scope = whole_scope(line.documents, line.row.seen())
            real = queries[number, :, pad:] if pad else queries[number]
            if scope is not None and real.shape[1]:
                asked, questions = calls.setdefault((line.reader, line.manner), ([], []))
                asked.append(number)
                questions.append((scope, real))
        if not calls:
            return None
        promises: list[tuple[list[int], Promise[tuple[Attended | FotError, ...]] | Promise[tuple[Attended, ...]]]] = []
        for (reader, _), (asked, questions) in calls.items():
            attend = reader.attend_apart if self._apart else reader.attend
            promises.append((asked, attend(layer, questions, self.lines[asked[0]].recall, scale)))

        def result() -> tuple[Attended | None, ...]:
            answers: list[Attended | None] = [None] * self.batch
            for asked, promise in promises:
                for number, answer in zip(asked, promise.result(), strict=True):
                    answers[number] = self._answered(self.lines[number], answer)
            return tuple(answers)

        return Promise(result)

    def _answered(self, line: Line, answer: Attended | FotError) -> Attended | None:
        """An answer that is good enough; else its error is the row's."""
        error = answer if isinstance(answer, FotError) else uncovered(answer, line.recall)
        if error is not None:
            self._failed(line, error)
        return None if isinstance(answer, FotError) else answer

    def told(self, layer: int, near: Partial, answers: Sequence[Attended | None]) -> Partial:
        """The answers at their place in the batch; `Recall.on_read` hears of each."""
        count = near.output.shape[2]
        spans = [slice(pad, count) for pad in self._pads]
        found = spread(answers, spans, near)
        if any(line.recall.on_read is not None for line in self.lines):
            shares = torch.sigmoid(found.lse - near.lse.to(found.lse))  # [B, H, n]
            for line, answer, share, span in zip(self.lines, answers, shares, spans, strict=True):
                if answer is None or (listen := line.recall.on_read) is None:
                    continue
                try:
                    listen(Read(layer, line.number, len(line.ids), answer, share[:, span]))
                except Exception as error:  # Whatever a listener does, it is its row's affair.
                    self._failed(line, error)
        return found


def _nowhere() -> NoReturn:
    raise FailedPrecondition("this state's rows went into another")


def _required(reader: Reader | None) -> Reader:
    if reader is None:
        raise FailedPrecondition("this model was opened without a memory")
    return reader


def _memory(reader: Reader | None) -> Memory:
    return _required(reader).memory
