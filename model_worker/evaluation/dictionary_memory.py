"""A model with a dictionary in its memory: filled as documents, indexed, asked in windows of questions.

The dictionary takes the way of any corpus: encoded window by window, put as documents, read through the memory layers.
W windows, R records of a window, H query heads, K top_k.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import Tensor

from memory_service import (
    Attended,
    AttendGroup,
    AttendOptions,
    FailedPrecondition,
    Memory,
    OperationState,
)
from memory_service.client import Client
from memory_service.client.arguments import DENSE
from memory_service.client.scopes import ScopeLike
from memory_service.errors import InvalidArgument
from model_worker.decoder.fitting import config_of, spec_of
from model_worker.decoder.model import FotModel
from model_worker.evaluation.dictionary_scores import NOWHERE, Found
from model_worker.evaluation.dictionary_world import Questions, World
from model_worker.evaluation.memories import fresh_memory, index_policy
from model_worker.hf import checkpoint
from model_worker.ingestion.encoding import Encoder
from model_worker.ingestion.uploads import Outgoing, Uploads
from model_worker.settings import FotConfig, Read, Recall
from model_worker.tasks import dictionary as task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW_RECORDS = 25  # The paper's 256 tokens hold so many whole.
DOCUMENT_TOKENS = 250_000
BLOCK_TOKENS = 4000  # Windows that are encoded together: what a core's cache holds of them is reused between layers.
BATCH_WINDOWS = 4  # Of questions that are read together.
PATIENCE_S = 6 * 3600.0  # Exact search of 16M keys takes minutes a call where others take milliseconds.
_SETTLE_S, _POLL_S = 5.0, 0.1

OnTokens = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Player:
    """A model that can take part."""

    base: PreTrainedModel
    fot: FotConfig
    name: str

    @classmethod
    def open(cls, directory: Path) -> Player:
        """The checkpoint there. Raises UnsupportedModel, InvalidArgument for one that cannot take part."""
        base, fields = checkpoint.load(directory)
        return cls.of(base, config_of(base, fields), directory.resolve().name)

    @classmethod
    def of(cls, base: PreTrainedModel, fot: FotConfig, name: str) -> Player:
        """This model, its window cut to whole records. Raises InvalidArgument."""
        vocabulary = int(base.config.get_text_config(decoder=True).vocab_size)
        if not fot.mem_layers:
            raise InvalidArgument(f"{name} says of no layer that it has a memory: it could not look anything up")
        if vocabulary < task.VOCABULARY:
            raise InvalidArgument(f"{name} knows {vocabulary} tokens, a dictionary is written with {task.VOCABULARY}")
        if fot.window < task.RECORD:
            raise InvalidArgument(f"{name} has a window of {fot.window} tokens, and a record takes {task.RECORD}")
        window = min(fot.window // task.RECORD, WINDOW_RECORDS) * task.RECORD
        changed = replace(fot, window=window, last_context_length=window, overlap=0, block_tokens=BLOCK_TOKENS)
        return cls(base, changed, name)

    @property
    def in_window(self) -> int:
        """Records of a window."""
        return self.fot.window // task.RECORD

    def told(self) -> dict[str, Any]:
        """What a report says of the model."""
        first = self.base.config.get_text_config(decoder=True)
        spec = spec_of(self.base, self.fot)
        return {
            "model": self.name,
            "parameters": sum(one.numel() for one in self.base.parameters()),
            "mem_layers": list(self.fot.mem_layers),
            "query_heads": int(first.num_attention_heads),
            "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim,
            "window": self.fot.window,
            "mem_dtype": str(self.fot.mem_dtype),
            "bytes_per_token": spec.bytes_per_token,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What a model made of windows of questions."""

    predicted: Tensor  # [W, R, 4] the likeliest token of each value, after the tokens before it
    found: Found | None  # None where the memory names no keys (dense attention).
    seconds: float  # In calls to the memory.
    engine: str  # As the memory names it.


class TimedMemory(Memory):
    """A memory that knows how long its answers took."""

    asked_s = 0.0

    def attend_groups(
        self,
        layer: int,
        groups: Iterable[AttendGroup | tuple[ScopeLike, Tensor]],
        options: AttendOptions = DENSE,
        *,
        timeout_s: float | None = None,
    ) -> tuple[Attended, ...]:
        """As `Memory`."""
        started = time.perf_counter()
        try:
            return super().attend_groups(layer, groups, options, timeout_s=timeout_s)
        finally:
            self.asked_s += time.perf_counter() - started


class Library:
    """A model and the memory it reads from. Made by `library`."""

    def __init__(self, model: FotModel, memory: TimedMemory):
        self.model = model
        self.memory = memory
        self.records = 0
        self.encoded_s = 0.0
        self._starts: dict[str, int] = {}  # By document, the token of the dictionary it begins with.

    @property
    def tokens(self) -> int:
        return self.records * task.RECORD

    def fill(self, world: World, records: int, document_tokens: int, on_tokens: OnTokens = lambda _: None) -> None:
        """Add definitions until there are `records` of them: whole windows, in documents of `document_tokens`."""
        size = max(1, document_tokens // self.model.fot.window) * world.in_window
        firsts = range(self.records, records, size)
        counts = [min(size, records - first) for first in firsts]
        texts = (world.definitions(first, count) for first, count in zip(firsts, counts, strict=True))
        started = time.perf_counter()
        # One writer, so that documents lie in their order and an index is the same every time.
        with Uploads(self.memory, lambda document: on_tokens(len(document.token_ids)), writers=1) as uploads:
            for first, encoded in zip(firsts, Encoder(self.model, overlap=0).encode(texts), strict=True):
                name = f"definitions-{first:09d}"
                self._starts[name] = first * task.RECORD
                uploads.put(Outgoing(name, encoded.keys, encoded.values, encoded.token_ids, {}, False))
        self.encoded_s += time.perf_counter() - started
        self.records = records
        self._settle()

    def index(self, factory: str, on_share: Callable[[float], None] = lambda _: None) -> float:
        """Index everything with this factory, in place of another; seconds. Raises FailedPrecondition, …"""
        started = time.perf_counter()
        done = self.memory.start("index", factory=factory)
        while done.state is OperationState.RUNNING:
            time.sleep(_POLL_S)
            done = self.memory.operation(done.id)
            on_share(done.done / max(done.total, 1))
        if done.state is not OperationState.DONE:
            raise FailedPrecondition(f"the index {factory} was not built: {done.message}")
        return time.perf_counter() - started

    @torch.no_grad()
    def ask(self, questions: Questions, recall: Recall, on_window: OnTokens = lambda _: None) -> Answers:
        """Every answer's likeliest tokens, each after the right ones before it."""
        predicted: list[Tensor] = []
        heard: list[Read] = []
        begun = self.memory.asked_s
        chosen = replace(recall, timeout_s=PATIENCE_S, tokens=recall.top_k > 0)
        for first in range(0, len(questions.ids), BATCH_WINDOWS):
            batch = questions.ids[first : first + BATCH_WINDOWS]
            told: list[Read] = []
            with self.model.start(replace(chosen, on_read=told.append)) as state:
                logits = self.model(batch.to(self.model.device), past_key_values=state).logits
            best = logits.argmax(-1).cpu()  # [w, T]: the token after each.
            predicted.append(best[:, questions.asking].view(len(batch), -1, task.LENGTH))
            heard += sorted((_narrowed(read, questions.asking) for read in told), key=lambda read: read.row)
            on_window(len(batch))
        found = self._found(heard) if recall.top_k else None
        engine = heard[0].attended.engine if heard else "none"
        return Answers(torch.cat(predicted), found, self.memory.asked_s - begun, engine)

    def greedy(self, questions: Questions, recall: Recall, answers: Answers) -> Tensor:
        """Every answer's tokens after those the model itself gave before: [W, R, 4]. Greedy decoding, all at once.

        Answers are put in and asked again until nothing changes, which is where decoding token by token ends too;
        windows whose answers are right already are left out.
        """
        said = answers.predicted.clone()
        open_ = (said != questions.wanted()).flatten(1).any(1).nonzero().flatten()
        quiet = recall.quiet()
        given = questions.ids.clone()
        for _ in range(len(questions.asking)):
            if not len(open_):
                break
            places = questions.asking + 1
            given[open_[:, None], places] = said[open_].flatten(1)
            again = replace(questions, ids=given[open_], records=questions.records[open_.numpy()])
            fresh = self.ask(again, quiet).predicted
            changed = (fresh != said[open_]).flatten(1).any(1)
            said[open_] = fresh
            open_ = open_[changed]
        return said

    def _found(self, heard: Sequence[Read]) -> Found | None:
        layer = min((read.layer for read in heard), default=0)
        tops = [read.attended.tokens for read in heard if read.layer == layer]
        if not tops or any(one is None for one in tops):
            return None
        places, scores = [], []
        for top in tops:
            assert top is not None
            starts = np.array([*(self._starts[name] for name in top.sources), 0], np.int64)
            source, offset = top.source.long().numpy(), top.offset.numpy()
            places.append(np.where(source >= 0, starts[source] + offset, NOWHERE))
            scores.append(top.score)
        return Found(np.stack(places), torch.stack(scores))

    def _settle(self) -> None:
        """Wait until everything is in RAM, as it is when nobody writes, or until no more goes in."""
        stats, since = self.memory.stats(), time.monotonic()
        while stats.resident_tokens < stats.tokens and time.monotonic() < since + _SETTLE_S:
            time.sleep(_POLL_S)
            before, stats = stats, self.memory.stats()
            if stats.resident_tokens > before.resident_tokens:
                since = time.monotonic()


@contextmanager
def library(player: Player, client: Client) -> Iterator[Library]:
    """An empty memory with a name nobody else has, and the model reading from it; deleted at exit."""
    spec = spec_of(player.base, player.fot, player.name, index_policy("auto"))
    with (
        fresh_memory(client, spec, "dictionary", partial(TimedMemory, owner=False)) as memory,
        FotModel(player.base, player.fot, memory) as model,
    ):
        yield Library(model, memory)


def _narrowed(read: Read, queries: Tensor) -> Read:
    """What was read by some of the queries."""
    top = read.attended.tokens
    if top is None or top.source.shape[1] != read.share.shape[1]:
        return replace(read, attended=replace(read.attended, tokens=None))
    chosen = replace(
        top, source=top.source[:, queries], offset=top.offset[:, queries], score=top.score[:, queries],
        weight=top.weight[:, queries],
    )  # fmt: skip
    return replace(read, attended=replace(read.attended, tokens=chosen))


def free_bytes() -> int:
    """RAM that can be taken without pushing anything out."""
    return int(psutil.virtual_memory().available)


def peak_bytes() -> int:
    """The most RAM this process has held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
