"""One request after another: the obvious way to generate, for tests that are not about batches."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from copy import deepcopy

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_service import Memory
from model_worker.answering import Answering
from model_worker.fitting import spec_of
from model_worker.model import FotModel
from model_worker.serving.requests import Event, Failed, Finish, Finished, Request, Text
from model_worker.settings import FotConfig


class Job:
    """A request that was taken."""

    def __init__(self, request: Request, on_event: Callable[[Event], None]):
        self.request, self.on_event = request, on_event
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """End it."""
        self.cancelled.set()


class Alone:
    """Answers requests in a thread, in order; sessions live where the request's memory is. No stop texts."""

    def __init__(self, base: PreTrainedModel, fot: FotConfig, tokenizer: PreTrainedTokenizerBase):
        self._base, self._fot, self._tokenizer = deepcopy(base), fot, tokenizer  # One model at a time is attached.
        self._own = Memory.open(":memory:", spec=spec_of(base, fot))
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="alone", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Job:
        """Queue a request."""
        job = Job(request, on_event)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Finish what is queued."""
        self._jobs.put(None)
        self._thread.join()
        self._own.close()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.on_event(self._answer(job))
            except Exception as error:
                job.on_event(Failed(error))

    def _answer(self, job: Job) -> Finished:
        request, began = job.request, time.perf_counter()
        model = FotModel(self._base, self._fot, request.memory or self._own)
        with (
            model,
            Answering(
                model,
                self._tokenizer,
                request.ids,
                recall=request.recall,
                max_new_tokens=request.max_new_tokens,
                sampling=request.sampling,
                telling=request.telling,
            ) as pieces,
        ):
            for piece in pieces:
                if job.cancelled.is_set():
                    break
                job.on_event(Text(piece, 1))
            pieces.close()
            answer = pieces.answer
        full = len(answer.token_ids) == request.max_new_tokens
        reason = Finish.CANCELLED if job.cancelled.is_set() else Finish.LENGTH if full else Finish.STOP
        seconds = time.perf_counter() - began
        return Finished(reason, answer.prompt_tokens, 0, len(answer.token_ids), answer.sources, 0.0, seconds, seconds)
