"""A request on its way through a batch: its place in the text, its choice of tokens, and what it tells."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memory_service import Memory
from model_worker.answering.writing import Stops, Writer
from model_worker.decoder.feeding import Slice
from model_worker.decoder.model import FotModel
from model_worker.decoder.state import State
from model_worker.recall.reader import Reader
from model_worker.recall.sources import Sources, listened, sources_of
from model_worker.recall.tally import Tally
from model_worker.serving.requests import Event, Failed, Finish, Finished, Request, Text
from model_worker.settings import Recall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Job:
    """One request. A `Ticket` to who submitted it; everything but `cancel` is for the batcher's thread."""

    def __init__(
        self,
        request: Request,
        on_event: Callable[[Event], None],
        model: FotModel,
        tokenizer: PreTrainedTokenizerBase,
        wake: Callable[[], None],
    ):
        self.request = request
        self.cancelled = False
        self.state: State | None = None  # Its own until it joins the batch.
        self.reader: Reader | None = None  # Of a memory that is not the model's.
        self.slices: Iterator[Slice] = iter(())  # What is left to read.
        self.untouched = True  # Nothing was read yet.
        self.cached_tokens = 0
        self.ids: list[int] = []  # Of the answer.
        self.memory: Memory | None = request.memory or model.memory
        self._on_event = on_event
        self._wake = wake
        self._tokenizer = tokenizer
        self._writer, self._stops = Writer(tokenizer), Stops(request.stop)
        self._untold = 0
        self._submitted = time.perf_counter()
        self._begun = self._first = math.nan
        # The last token of the prompt asks for the first of the answer.
        self._tally = Tally(request.telling.passage_tokens, first_token=len(request.ids) - 1)
        sampling = request.sampling
        self._scorers, self._ends = model.scorers(len(request.ids), request.max_new_tokens, sampling.settings())
        self._dice: torch.Generator | None = None
        if sampling.temperature:
            self._dice = torch.Generator()
            self._dice.seed() if sampling.seed is None else self._dice.manual_seed(sampling.seed)
        self._text: Tensor | None = None  # [prompt + answer] for who scores by what was said before.

    def cancel(self) -> None:
        """See `Ticket`."""
        self.cancelled = True
        self._wake()

    # --- its life ---

    def begin(self) -> Recall:
        """It has a row now; how it reads its memory."""
        self._begun = time.perf_counter()
        return listened(self.request.recall, self._tally, sources=self.request.telling.documents > 0)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is the one."""
        return self._dice is None and not self._scorers

    def choose(self, logits: Tensor) -> int:
        """The next token, by logits [V] float32 on the CPU."""
        scores = logits[None]
        if self._scorers:
            scores = self._scorers(self._said(), scores.clone())
        if self._dice is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._dice))

    def _said(self) -> Tensor:
        """Prompt and answer so far: [1, T]."""
        prompt = len(self.request.ids)
        if self._text is None:
            self._text = torch.empty(prompt + self.request.max_new_tokens, dtype=torch.int64)
            self._text[:prompt] = torch.tensor(self.request.ids)
        if self.ids:
            self._text[prompt + len(self.ids) - 1] = self.ids[-1]
        return self._text[None, : prompt + len(self.ids)]

    def take(self, token: int) -> Finish | None:
        """Go on by a token, and tell the text it completes; why the answer ends here, if it does."""
        if not self.ids:
            self._first = time.perf_counter()
        self.ids.append(token)
        self._untold += 1
        piece = self._stops.add(self._writer.add((token,)))
        reason = Finish.STOP if token in self._ends else None
        if reason is None and len(self.ids) >= self.request.max_new_tokens:
            reason = Finish.LENGTH
        if reason is not None and not self._stops.found:
            piece += self._stops.add(self._writer.end()) + self._stops.end()
        if piece:
            self._on_event(Text(piece, self._untold))
            self._untold = 0
        return Finish.STOP if self._stops.found else reason

    def finish(self, reason: Finish) -> None:
        """Tell the end, with the sources; what it held is free by now. May ask the memory for passages' words."""
        asked, now = self.request, time.perf_counter()
        try:
            sources = self._sources()
        except Exception as error:
            self._on_event(Failed(error))
            return
        first = self._first - self._submitted
        self._on_event(
            Finished(
                reason=reason,
                prompt_tokens=len(asked.ids),
                cached_tokens=self.cached_tokens,
                completion_tokens=len(self.ids),
                sources=sources,
                queued_s=(now if math.isnan(self._begun) else self._begun) - self._submitted,
                first_token_s=first,
                seconds=now - self._submitted,
            )
        )

    def _sources(self) -> Sources:
        asked = self.request
        return sources_of(self._tally, self.memory, self._tokenizer, [*asked.ids, *self.ids], asked.telling)

    def fail(self, error: Exception) -> None:
        """Tell what went wrong."""
        self._on_event(Failed(error))
