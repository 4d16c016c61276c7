"""How a question reaches a model: its prompt through session memory, or as documents that are asked about.

An `Asker` reads a prompt, answers greedily with as many tokens as the answer has, and says what that took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from memory_service import Engine
from memory_service.client import Client
from memory_service.errors import InvalidArgument
from model_worker.decoder.fitting import spec_of
from model_worker.decoder.model import FotModel
from model_worker.evaluation.memories import Watched, built_index, fresh_memory, index_policy
from model_worker.evaluation.trials import Asked, Question
from model_worker.ingestion.encoding import Encoder
from model_worker.ingestion.uploads import Outgoing, Uploads
from model_worker.settings import FotConfig, Read, Recall

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PART = 65_536  # Tokens of a document that holds a part of the prompt.
OnTokens = Callable[[int], None]


class Store(StrEnum):
    """Where a prompt goes."""

    SESSION = "session"  # Into the session of its own text, as `generate` does it.
    DOCUMENTS = "documents"  # Durable documents; only the end of the prompt is read on top of them.


class Asker(Protocol):
    """Answers questions."""

    def ask(self, question: Question, on_tokens: OnTokens) -> Asked:
        """Read the prompt and answer; `on_tokens` hears how many more tokens stand in memory."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How the memory is filled and asked."""

    store: Store = Store.SESSION
    top_k: int = 32  # 0: every key in scope.
    engine: str = Engine.EXACT
    search: Mapping[str, float] = field(default_factory=dict)
    index: str = "auto"  # What is built for Engine.INDEX, as Faiss's index_factory says it.

    def __post_init__(self) -> None:
        Recall(top_k=self.top_k, engine=self.engine, search=self.search)
        if self.indexed and self.store is not Store.DOCUMENTS:
            raise InvalidArgument("an index covers documents, not a session: ask the engine index with documents")
        if self.indexed and not self.top_k:
            raise InvalidArgument("an index finds the top k: give a top_k of at least 1")
        if self.indexed and self.index == "none":
            raise InvalidArgument("the engine index needs an index: give index a factory other than none")

    @property
    def indexed(self) -> bool:
        return Engine(self.engine) is Engine.INDEX


class MemoryAsker:
    """A decoder with a memory at a place. Every question gets a memory of its own, so none helps another."""

    def __init__(self, base: PreTrainedModel, fot: FotConfig, client: Client, asking: Asking, study: str = "passkey"):
        """Tries everything out with a memory that holds nothing, before a long prompt would.

        Raises InvalidArgument for a model without memory layers, an index or a search that cannot be, and what the
        place answers.
        """
        if not fot.mem_layers:
            raise InvalidArgument("this model has no memory layers, so it could not remember the prompt")
        self._base, self._fot, self._client, self._asking, self._study = base, fot, client, asking, study
        self._spec = spec_of(base, fot, index=index_policy(asking.index))
        with fresh_memory(client, self._spec, study, Watched) as memory, FotModel(base, fot, memory):
            nothing = torch.zeros(self._spec.kv_heads, 1, self._spec.head_dim)
            layer, engine, search = fot.mem_layers[0], asking.engine, asking.search
            memory.attend(layer, nothing, top_k=asking.top_k, engine=engine, search=search)

    @torch.no_grad()
    def ask(self, question: Question, on_tokens: OnTokens) -> Asked:
        """Read the prompt and answer it."""
        with ExitStack() as stack:
            memory = stack.enter_context(
                fresh_memory(self._client, self._spec, self._study, partial(Watched, on_tokens=on_tokens))
            )
            model = stack.enter_context(FotModel(self._base, self._fot, memory))
            return self._ask(model, memory, question, on_tokens)

    def _ask(self, model: FotModel, memory: Watched, question: Question, on_tokens: OnTokens) -> Asked:
        documents = self._documents(question)
        prompt = question.ids
        if self._asking.store is Store.DOCUMENTS:
            prompt = prompt[-self._last :]
        started = time.perf_counter()
        _put(model, memory, documents, on_tokens)
        put_s = time.perf_counter() - started
        index_s = built_index(memory) if self._asking.indexed else 0.0
        line = _Line(question.line, {one.id: one.start for one in documents if one.start is not None})
        recall = Recall(
            top_k=self._asking.top_k, engine=self._asking.engine, search=self._asking.search,
            tokens=self._asking.top_k > 0, on_read=line,
        )  # fmt: skip
        with model.start(recall) as state:
            reading = time.perf_counter()
            memory.filled_at = reading
            logits = model(prompt[None].to(model.device), past_key_values=state, logits_to_keep=1).logits
            filled_s = memory.filled_at - reading
            ids = [int(logits[0, -1].argmax())]
            while len(ids) < len(question.answer):
                fed = torch.tensor([[ids[-1]]], device=model.device)
                ids.append(int(model(fed, past_key_values=state, logits_to_keep=1).logits[0, -1].argmax()))
            answer_s = time.perf_counter() - reading - filled_s
            stats = memory.stats()
        return Asked(
            ids=tuple(ids),
            tokens=sum(len(one.ids) - one.again for one in documents) + max(0, len(prompt) - self._last),
            prefill_s=put_s + filled_s,
            index_s=index_s,
            answer_s=answer_s,
            nbytes=stats.bytes + stats.session_bytes + stats.index_bytes,
            mass=line.mass,
        )

    @property
    def _last(self) -> int:
        """Tokens at the end of a prompt that stay in the window."""
        return self._fot.last_context_length

    def _documents(self, question: Question) -> list[_Document]:
        """The prompt's beginning, where it is asked for as documents, and others beside it."""
        found = []
        if self._asking.store is Store.DOCUMENTS:
            ids = question.ids[: -self._last]
            for start in range(0, len(ids), PART):
                # A line across a border is whole in the later one: windows only look back within a document.
                again = min(start, self._fot.overlap)
                found.append(_Document(f"prompt-{start}", ids[start - again : start + PART], start - again, again))
        return found + [_Document(f"other-{number}", ids, None) for number, ids in enumerate(question.others)]


@dataclass(frozen=True, slots=True, eq=False)
class _Document:
    id: str
    ids: Tensor  # [T]
    start: int | None  # Token of the prompt it begins with; None: not of the prompt.
    again: int = 0  # First tokens that the document before holds too.


def _put(model: FotModel, memory: Watched, documents: Sequence[_Document], on_tokens: OnTokens) -> None:
    """Encode documents and store them."""
    if not documents:
        return

    def stored(document: Outgoing) -> None:
        on_tokens(len(document.token_ids))

    encoded = Encoder(model, overlap=model.fot.overlap).encode(one.ids for one in documents)
    with Uploads(memory, stored) as uploads:
        for document, found in zip(documents, encoded, strict=True):
            uploads.put(Outgoing(document.id, found.keys, found.values, found.token_ids, {}, False))


class _Line:
    """Hears the memory's answers and adds up what the key's line got of the queries that chose the answer's tokens."""

    def __init__(self, line: range, starts: Mapping[str, int]):
        self._line = line
        self._starts = starts
        self._masses: list[float] = []

    def __call__(self, read: Read) -> None:
        top = read.attended.tokens
        # An answer put together from pieces may name the tokens of its first queries only.
        if top is None or top.source.shape[1] != read.share.shape[1]:
            return
        found = 0.0
        for heads, place, mass in self._places(read):
            found += float((mass * ((place >= self._line.start) & (place < self._line.stop))).sum()) / heads
        self._masses.append(found)

    def _places(self, read: Read) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For every source of the prompt: heads, where in the prompt its top tokens stand, and their mass."""
        top = read.attended.tokens
        assert top is not None
        source, offset = top.source[:, -1].cpu(), top.offset[:, -1].cpu()  # [H, K]
        mass = top.weight[:, -1].cpu() * read.share[:, -1, None].cpu()
        for number, name in enumerate(top.sources):
            start = 0 if name.startswith("session:") else self._starts.get(name)
            if start is not None:
                yield len(source), offset + start, mass * (source == number)

    @property
    def mass(self) -> float | None:
        """The mean over memory layers, heads and answer tokens; None if the memory named no tokens."""
        return sum(self._masses) / len(self._masses) if self._masses else None
