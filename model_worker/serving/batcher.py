"""Many requests through one model at once: rows join and leave between steps, and prompts are read in between.

All answers under way take each step together: one pass of the model, and in each memory layer one call to each memory
for all the rows that read it. A long prompt is read in slices, so that nobody waits for it for long.

transformers' own ContinuousBatchingManager is not used: its paged cache keeps keys rotated and for good, where a window
keeps them as projected, begins its positions anew and pushes what is oldest into memory; it packs all rows into one
sequence, with no place for a row's own memory, scope, seed and stop texts; and an error of a step ends every request.
Its scheduler's ideas are here: a token budget a step for prompts, first come first served, refusal when full.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from torch import Tensor

from memory_service import InvalidArgument, SessionExpired, Unavailable
from memory_service.errors import ResourceExhausted
from model_worker.decoder.fitting import check_spec
from model_worker.decoder.model import FotModel
from model_worker.decoder.state import State
from model_worker.recall.line import Line
from model_worker.serving.conversations import Conversations
from model_worker.serving.goodbyes import Goodbyes
from model_worker.serving.job import Job
from model_worker.serving.load import Load, Rate
from model_worker.serving.readers import Readers
from model_worker.serving.requests import Event, Finish, Request, Ticket
from model_worker.serving.room import Room
from model_worker.serving.rows import Rows
from model_worker.serving.settings import BatchSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)


class Batcher:
    """Answers requests together, in a thread of its own. Close it, or use `with`; the model is its own until then."""

    def __init__(self, model: FotModel, tokenizer: PreTrainedTokenizerBase, settings: BatchSettings | None = None):
        self._model = model
        self._tokenizer = tokenizer
        self.settings = settings or BatchSettings()
        self._vocabulary = int(model.decoder.config.vocab_size)
        self._room = Room(model)
        self._readers = Readers(model)
        self._goodbyes = Goodbyes(self._readers)
        self._changed = threading.Condition()  # Guards the next three.
        self._queue: deque[Job] = deque()
        self._closing = False
        self._draining = False
        # What follows is the thread's own.
        self._reading: deque[Job] = deque()
        self._writing = Rows(model)
        self._kept = Conversations(self.settings.conversations, self.settings.conversation_s, self._goodbyes.let_go)
        self._allowed = self._window_bytes = 0
        self._steps = self._cached = 0
        self._read, self._written = Rate(), Rate()
        self._thread = threading.Thread(target=self._run, name="fot-batcher", daemon=True)
        self._thread.start()

    # --- what callers ask, from any thread ---

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        """See `Generates`. Also raises WrongModel for another model's memory, Unavailable once it closes.

        Rows share a call to their memory if they bring the same `Memory` object.
        """
        self._check(request)
        job = Job(request, on_event, self._model, self._tokenizer, self._wake)
        with self._changed:
            if self._closing:
                raise Unavailable("this worker is closing; send the request to another")
            if len(self._queue) >= self.settings.max_queued:
                raise ResourceExhausted(
                    f"{len(self._queue)} requests wait for this worker already, which is its limit: try again later, "
                    "ask another replica, or raise max_queued",
                    reason="QUEUE_FULL",
                    retry_after_s=1.0,
                )
            self._queue.append(job)
            self._changed.notify()
        return job

    def load(self) -> Load:
        """How busy it is at this moment."""
        return Load(
            queued=len(self._queue),
            reading=len(self._reading),
            writing=len(self._writing),
            max_rows=self.settings.max_rows,
            conversations=len(self._kept),
            window_bytes=self._window_bytes,
            tokens_per_s=self._written.per_s(),
            prompt_tokens_per_s=self._read.per_s(),
            steps=self._steps,
            prompt_tokens=self._read.total,
            cached_tokens=self._cached,
            completion_tokens=self._written.total,
            finished=self._goodbyes.finished,
            cancelled=self._goodbyes.cancelled,
            failed=self._goodbyes.failed,
        )

    def close(self, drain: bool = False) -> None:
        """Take no more requests, and end: those there are are cancelled, or answered first (`drain`). Harmless twice.

        The model and the memories stay open.
        """
        with self._changed:
            self._closing = True
            self._draining = drain
            self._changed.notify()
        self._thread.join()
        self._goodbyes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _check(self, request: Request) -> None:
        if not request.ids:
            raise InvalidArgument("the prompt has no tokens; there is nothing to go on from")
        if not 0 <= min(request.ids) <= max(request.ids) < self._vocabulary:
            raise InvalidArgument(f"token ids must be 0 to {self._vocabulary - 1}: use the model's own tokenizer")
        if request.max_new_tokens < 1:
            raise InvalidArgument(f"max_new_tokens must be ≥ 1, got {request.max_new_tokens}")
        if not all(request.stop) or len(request.stop) > self.settings.max_stops:
            raise InvalidArgument(
                f"stop takes up to {self.settings.max_stops} texts, none of them empty, got {list(request.stop)[:20]}"
            )
        if request.memory is not None and request.memory is not self._model.memory:
            check_spec(request.memory.spec, self._model.spec)

    # --- the thread ---

    def _run(self) -> None:
        try:
            while self._wait():
                self._drop_cancelled()
                self._admit()
                self._window_bytes = self._used()
                self._read_prompts()
                self._write_tokens()
        except BaseException as error:  # A defect of ours: nobody must wait for an answer that never comes.
            _LOG.exception("the batcher stopped")
            self._stop(error if isinstance(error, Exception) else Unavailable("this worker was stopped"))
        else:
            self._stop(None)

    def _wait(self) -> bool:
        """Wait for something to do; false when it is time to stop."""
        with self._changed:
            while True:
                busy = bool(self._queue or self._reading or self._writing)
                if self._closing and not (busy and self._draining):
                    return False
                if busy:
                    return True
                self._changed.wait(self._kept.expire())

    def _stop(self, error: Exception | None) -> None:
        with self._changed:
            self._closing = True
            waiting, self._queue = list(self._queue), deque()
        why = Finish.CANCELLED if error is None else error
        for row in reversed(range(len(self._writing))):
            self._leave(row, why)
        for job in [*waiting, *self._reading]:
            self._end(job, why)
        self._reading.clear()
        self._kept.clear()

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [job for job in self._queue if job.cancelled]
            for job in gone:
                self._queue.remove(job)
        for job in [job for job in self._reading if job.cancelled]:
            self._reading.remove(job)
            gone.append(job)
        for job in gone:
            self._end(job, Finish.CANCELLED)
        for row in reversed(range(len(self._writing))):
            if self._writing.jobs[row].cancelled:
                self._leave(row, Finish.CANCELLED)

    def _admit(self) -> None:
        """Rows for those who wait longest, as long as there is room."""
        self._kept.expire()
        while self._queue:
            rows = len(self._reading) + len(self._writing)
            if rows >= self.settings.max_rows:
                return
            while rows and self._used() + self._room.of(self._queue[0]) > self.settings.window_bytes:
                if not self._kept.drop_oldest():
                    return
            with self._changed:
                job = self._queue.popleft()
            self._begin(job)

    def _begin(self, job: Job) -> None:
        """Open what the prompt is read into: what its conversation held, or nothing."""
        try:
            recall = job.begin()
            found = self._kept.take(job)
            if found is not None:
                job.state, job.cached_tokens = found
                job.state.recall = recall
            else:
                job.state = self._model.start(recall, self._readers.take(job.memory))
            self._cached += job.cached_tokens
            job.untouched = True
            job.slices = self._model.slices(job.state, job.request.ids[job.cached_tokens :], lambda: self._allowed)
            self._reading.append(job)
        except Exception as error:
            self._end(job, error)

    def _read_prompts(self) -> None:
        """Slices of prompts, in turn, until the budget of a step is spent."""
        left = self.settings.step_tokens if self._writing else self.settings.idle_tokens
        left -= self._read_together(left)
        while self._reading and left > 0:
            job = self._reading.popleft()
            self._allowed, job.untouched = left, False
            try:
                piece = next(job.slices)
            except Exception as error:
                if not self._again(job, error):
                    self._end(job, error)
                continue
            left -= piece.tokens
            self._read.add(piece.tokens)
            if piece.left:
                self._reading.append(job)
            else:
                assert piece.logits is not None
                self._join(job, piece.logits)

    def _read_together(self, most: int) -> int:
        """Short prompts that nothing was read of yet, in one pass; how many tokens that was, padding included."""
        jobs: list[Job] = []
        longest = 0
        for job in self._reading:
            tokens = len(job.request.ids) - job.cached_tokens
            if job.untouched and self._model.fits(tokens) and max(longest, tokens) * (len(jobs) + 1) <= most:
                longest = max(longest, tokens)
                jobs.append(job)
        if len(jobs) < 2:
            return 0
        for job in jobs:
            self._reading.remove(job)
        states, texts = zip(*((job.state, job.request.ids[job.cached_tokens :]) for job in jobs), strict=True)
        try:
            state, logits = self._model.read(states, texts)
        except Exception as error:
            for job in jobs:
                self._end(job, error)
            return most
        self._read.add(sum(map(len, texts)))
        for job in jobs:
            job.state = None
        first = len(self._writing)
        self._writing.admit(state, jobs, [0] * len(jobs))
        self._choose(first, logits.float().cpu())
        return longest * len(jobs)

    def _again(self, job: Job, error: Exception, row: int | None = None) -> bool:
        """Read the whole prompt anew if it went on from a conversation whose session is gone."""
        if not job.cached_tokens or not isinstance(error, SessionExpired) or job.ids:
            return False
        if row is None:
            assert job.state is not None
            self._goodbyes.let_go(job.state.close, job.memory)
        else:
            self._goodbyes.let_go(self._writing.leave(row).rows.close, job.memory)
        job.state, self._cached = None, self._cached - job.cached_tokens
        job.cached_tokens = 0
        self._begin(job)
        return True

    def _join(self, job: Job, logits: Tensor) -> None:
        """The prompt is read: choose the first token, and write on with the others."""
        assert job.state is not None
        try:
            token = job.choose(logits.float().cpu())
            reason = job.take(token)
        except Exception as error:
            self._end(job, error)
            return
        self._written.add(1)
        if reason is not None:
            self._end(job, reason)
            return
        self._writing.admit(job.state, [job], [token])
        job.state = None

    def _write_tokens(self) -> None:
        """One more token of every answer."""
        if not self._writing:
            return
        try:
            logits = self._writing.step()
        except Exception as error:
            _LOG.exception("a step of %d rows failed", len(self._writing))
            for job, line in self._writing.abandon():
                self._goodbyes.say(job, line.rows.close, error)
            return
        self._steps += 1
        self._choose(0, logits)

    def _choose(self, first: int, logits: Tensor) -> None:
        """The next token of the rows from `first` on, by their logits [B, V]."""
        best = logits.argmax(-1).tolist()
        self._written.add(len(best))
        for row in reversed(range(first, len(self._writing))):
            job, line = self._writing.jobs[row], self._writing.lines[row]
            try:
                if line.error is not None:
                    raise line.error
                token = best[row - first] if job.greedy else job.choose(logits[row - first])
                reason = job.take(token)
            except Exception as error:
                if not self._again(job, error, row):
                    self._leave(row, error)
                continue
            self._writing.set_newest(row, token)
            if reason is not None:
                self._leave(row, reason)

    # --- how requests end ---

    def _leave(self, row: int, why: Finish | Exception) -> None:
        """A row of the batch is done."""
        job = self._writing.jobs[row]
        state = self._writing.alone(row) if self._keeps(job, why) else None
        self._conclude(job, why, state, self._writing.leave(row))

    def _end(self, job: Job, why: Finish | Exception) -> None:
        """A request that is not in the batch is done."""
        state, job.state = job.state, None
        if state is None:
            self._goodbyes.say(job, lambda: None, why, begun=False)
        elif self._keeps(job, why):
            self._conclude(job, why, state, None)
        else:
            self._goodbyes.say(job, state.close, why)

    def _keeps(self, job: Job, why: Finish | Exception) -> bool:
        return job.request.conversation is not None and why in (Finish.STOP, Finish.LENGTH)

    def _conclude(self, job: Job, why: Finish | Exception, state: State | None, line: Line | None) -> None:
        if state is not None and self._kept.keep(job, state, self._room.of(job)):
            self._goodbyes.say(job, None, why)
        elif line is not None:
            self._goodbyes.say(job, line.rows.close, why)
        elif state is not None:
            self._goodbyes.say(job, state.close, why)

    def _used(self) -> int:
        return self._kept.bytes + self._room.of_all([*self._reading, *self._writing.jobs])
