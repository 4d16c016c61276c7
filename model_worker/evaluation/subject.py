"""A model under study, and the memories it reads from: made for a study, deleted after it.

    with Subject.open(path) as subject, subject.library() as library:
        library.put({"notes": ids})
        answers = library.ask([Cloze(prompt, answer)], documents=("notes",))

B batch rows, T tokens, H query heads, n queries, D head_dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from memory_service import (
    ALL_DOCUMENTS,
    Attended,
    AttendOptions,
    Engine,
    InvalidArgument,
    Memory,
    MemorySpec,
    Partial,
    ScopeLike,
    Stats,
)
from model_worker.decoder.fitting import config_of, spec_of
from model_worker.decoder.inputs import padded
from model_worker.decoder.model import FotModel
from model_worker.decoder.steps import LoadStep, Piece
from model_worker.evaluation.haystacks import Cloze
from model_worker.evaluation.memories import Watched, built_index, fresh_memory, index_policy
from model_worker.evaluation.place import Place
from model_worker.hf import checkpoint
from model_worker.hf.decoder import Filled
from model_worker.ingestion.encoding import Encoder
from model_worker.recall.reader import Promise
from model_worker.settings import FotConfig, Read, Recall
from model_worker.tasks.tokens import Tokenizer, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096  # Of questions that are read side by side.
Tell = Callable[[int, int, str], None]  # Steps done, steps in all, what is done now.


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a model made of a question."""

    right: tuple[bool, ...]  # Of the answer's tokens: whether each is the likeliest after the right ones before it.
    reads: tuple[Read, ...]  # How the memory was read while answering, one a memory layer that saw something.

    @property
    def exact(self) -> bool:
        """Whether greedy decoding gives this answer: it does if and only if every token is the likeliest one."""
        return all(self.right)


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """What a question asks of the memory in its first memory layer, where nothing depends on what memory answers."""

    layer: int
    scale: float
    queries: Tensor  # [H, n, D] towards memory, one for each token of the answer


@dataclass(frozen=True, slots=True)
class Settings:
    """What the commands say of any study's subject; None: as the checkpoint says."""

    recall: Recall = field(default_factory=Recall)
    place: Place = field(default_factory=Place)
    mem_layers: tuple[int, ...] | None = None
    window: int | None = None

    def told(self) -> dict[str, Any]:
        """For a report."""
        return {
            "memory": self.place.target,
            "engine": str(self.recall.engine),
            "top_k": self.recall.top_k,
            "search": dict(self.recall.search),
        }


class Subject:
    """A checkpoint, its tokenizer and a place for memories. Use `with`, or `close` it."""

    def __init__(
        self,
        base: PreTrainedModel,
        fot: FotConfig,
        tokenizer: Tokenizer,
        settings: Settings | None = None,
        name: str = "model",
    ):
        """Raises InvalidArgument without memory layers."""
        if not fot.mem_layers:
            raise InvalidArgument(
                f"{name} says of no layer that it has a memory: give --mem-layers, or a checkpoint trained with FoT"
            )
        self.base = base
        self.trained = fot
        # What is asked must stand in the window as a whole; what is long is in documents here.
        self.fot = replace(fot, last_context_length=fot.window)
        self.tokenizer = tokenizer
        self.settings = settings or Settings()
        self.name = name
        self.spec = spec_of(base, self.fot)
        self.client = self.settings.place.open()

    @classmethod
    def open(cls, path: Path, settings: Settings | None = None) -> Self:
        """The checkpoint with its tokenizer in this folder. Raises UnsupportedModel, InvalidArgument, Unavailable."""
        settings = settings or Settings()
        tokenizer = tokens_of(path)
        base, fields = checkpoint.load(path)
        given = {"mem_layers": settings.mem_layers, "window": settings.window}
        fot = config_of(base, {**fields, **{name: value for name, value in given.items() if value is not None}})
        return cls(base, fot, tokenizer, settings, path.resolve().name)

    @property
    def window(self) -> int:
        """Tokens a question and its answer may have together."""
        return self.fot.window

    def told(self) -> dict[str, Any]:
        """What a report says of the model."""
        return {
            "model": self.name,
            "parameters": sum(one.numel() for one in self.base.parameters()),
            "mem_layers": list(self.fot.mem_layers),
            "window": self.fot.window,
            "mem_dtype": str(self.fot.mem_dtype),
            **self.settings.told(),
        }

    @contextmanager
    def library(self, factory: str = "auto") -> Iterator[Library]:
        """An empty memory and the model reading from it; `factory` is its index's.

        Only one at a time. Raises InvalidArgument for a factory the service does not build.
        """
        spec = replace(self.spec, index=index_policy(factory))
        with (
            fresh_memory(self.client, spec, "eval", Watched) as memory,
            FotModel(self.base, self.fot, memory, self.settings.recall) as model,
        ):
            yield Library(model)

    def close(self) -> None:
        """Let go of the place. Harmless twice."""
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Library:
    """A model with documents to read. Made by `Subject.library`."""

    def __init__(self, model: FotModel):
        self.model = model
        self.encode_s = 0.0  # Of all `put` so far.
        self.tokens = 0

    @property
    def memory(self) -> Memory:
        assert self.model.memory is not None
        return self.model.memory

    @property
    def spec(self) -> MemorySpec:
        return self.memory.spec

    def put(self, texts: Mapping[str, Sequence[int] | Tensor]) -> None:
        """Encode texts and store them as documents, each on its own; indexed at once if the study asks an index."""
        started = time.perf_counter()
        encoder = Encoder(self.model, self.model.fot.overlap or None)
        for name, encoded in zip(texts, encoder.encode(texts.values()), strict=True):
            self.memory.put(name, encoded.keys, encoded.values, token_ids=encoded.token_ids)
            self.tokens += len(encoded.token_ids)
        self.encode_s += time.perf_counter() - started
        if self.model.recall.engine == Engine.INDEX:
            self.index()

    def index(self) -> float:
        """Index every document; the seconds it took. Raises FailedPrecondition if it fails."""
        return built_index(self.memory)

    def stats(self) -> Stats:
        return self.memory.stats()

    # --- what the model makes of it ---

    @torch.no_grad()
    def ask(
        self, questions: Sequence[Cloze], documents: ScopeLike = ALL_DOCUMENTS, recall: Recall | None = None
    ) -> list[Answer]:
        """Answers to questions over these documents, many side by side, each token of an answer after the right ones.

        The prompt but its last token is read first; what is told of reading is told of the queries that predict the
        answer. `recall` is how the memory is asked, by default the study's. Raises InvalidArgument for a question that
        does not fit the window.
        """
        chosen = replace(recall or self.model.recall, documents=documents)
        answers: list[Answer] = []
        for batch in _batches(questions, self.model.fot.window):
            heard: list[list[Read]] = [[] for _ in batch]

            def hear(read: Read, heard: list[list[Read]] = heard) -> None:
                heard[read.row].append(read)

            targets, _ = padded([_ids(one.answer) for one in batch], 0)  # [B, n]
            with self.model.start(chosen.quiet()) as state:
                if any(len(one.prompt) > 1 for one in batch):
                    ids, mask = _padded([_ids(one.prompt[:-1]) for one in batch])
                    self.model(ids, mask, past_key_values=state, logits_to_keep=1)
                ids, mask = _padded([_ids([*one.prompt[-1:], *one.answer[:-1]]) for one in batch])
                best = self.model(ids, mask, past_key_values=state, recall=replace(chosen, on_read=hear)).logits.argmax(
                    -1
                )  # [B, n]
            right = (best == targets.to(best.device)).tolist()
            for row, one in enumerate(batch):
                answers.append(Answer(tuple(right[row][-len(one.answer) :]), tuple(heard[row])))
        return answers

    @torch.no_grad()
    def queries(self, questions: Sequence[Cloze]) -> list[Queries]:
        """What each question asks of the first memory layer."""
        found: list[Queries] = []
        for batch in _batches(questions, self.model.fot.window):
            texts = [_ids([*one.prompt, *one.answer[:-1]]) for one in batch]
            longest = max(len(text) for text in texts)
            ids = torch.stack([torch.nn.functional.pad(text, (0, longest - len(text))) for text in texts])
            pieces = [Piece(row, 0, len(text), 0) for row, text in enumerate(texts)]
            listener = _Listener()
            fot = self.model.fot
            step = LoadStep(pieces, self.model.policies, fot.mem_layers, listener, None)
            self.model.decoder.fill(ids.to(self.model.device), step)
            for row, (one, text) in enumerate(zip(batch, texts, strict=True)):
                asked = listener.queries[row, :, len(one.prompt) - 1 : len(text)]
                found.append(Queries(fot.mem_layers[0], listener.scale, asked.clone()))
        return found

    def attend(
        self, asked: Sequence[Queries], options: AttendOptions, documents: ScopeLike = ALL_DOCUMENTS
    ) -> tuple[Attended, ...]:
        """The memory's answer to each of these alone, in one call."""
        first = asked[0]
        groups = [(documents, one.queries) for one in asked]
        return self.memory.attend_groups(first.layer, groups, replace(options, scale=first.scale))

    @torch.no_grad()
    def surprise(self, ids: Tensor, documents: ScopeLike = (), recall: Recall | None = None) -> Tensor:
        """Nats of every token but the first of texts [B, T] that fit the window: [B, T - 1]."""
        if ids.shape[1] > self.model.fot.window:
            raise InvalidArgument(f"texts of {ids.shape[1]} tokens do not fit the window of {self.model.fot.window}")
        with self.model.start(replace(recall or self.model.recall, documents=documents)) as state:
            logits = self.model(ids, past_key_values=state).logits[:, :-1].float()
        wanted = ids[:, 1:].to(logits.device)
        nats: Tensor = logits.logsumexp(-1) - logits.gather(-1, wanted[..., None])[..., 0]
        return nats.cpu()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        documents: ScopeLike = ALL_DOCUMENTS,
        done: Callable[[Sequence[int]], bool] = lambda _: False,
    ) -> list[list[int]]:
        """Greedy continuations of prompts side by side; a row that is `done` is cut there."""
        written: list[list[int]] = []
        for batch in _batches([Cloze(prompt, [0] * max_new_tokens) for prompt in prompts], None):
            rows: list[list[int]] = [[] for _ in batch]
            ended = [False] * len(batch)
            with self.model.start(replace(self.model.recall, documents=documents).quiet()) as state:
                ids, mask = _padded([_ids(one.prompt) for one in batch])
                for _ in range(max_new_tokens):
                    logits = self.model(ids, mask, past_key_values=state, logits_to_keep=1).logits
                    ids, mask = logits[:, -1].argmax(-1, keepdim=True).cpu(), torch.ones(len(batch), 1)
                    for row, token in enumerate(ids[:, 0].tolist()):
                        if not ended[row]:
                            rows[row].append(token)
                            ended[row] = done(rows[row])
                    if all(ended):
                        break
            written += rows
        return written


class _Listener:
    """A store that keeps nothing and hears what the first memory layer asks."""

    def __init__(self) -> None:
        self.queries = torch.empty(0)
        self.scale = 1.0

    def append(self, layer: int, pieces: Sequence[Piece], keys: Tensor, values: Tensor) -> None:
        """Nothing is stored."""

    def attend(self, layer: int, pieces: Sequence[Piece], queries: Tensor, scale: float) -> Promise[Partial] | None:
        self.queries, self.scale = queries, scale
        raise Filled


def _batches(questions: Sequence[Cloze], window: int | None) -> Iterator[Sequence[Cloze]]:
    """Questions side by side, at most BATCH_TOKENS with their padding; all must fit the window, if there is one."""
    lengths = [len(one.prompt) + len(one.answer) - 1 for one in questions]
    for one, length in zip(questions, lengths, strict=True):
        if not one.prompt or not one.answer:
            raise InvalidArgument("a question needs a prompt and an answer of at least one token each")
        if window is not None and length > window:
            raise InvalidArgument(
                f"a question of {len(one.prompt)} tokens with an answer of {len(one.answer)} does not fit the model's "
                f"window of {window}: give --window, or a model with a longer one"
            )
    start = 0
    while start < len(questions):
        stop, longest = start, 0
        while stop < len(questions) and (
            stop == start or max(longest, lengths[stop]) * (stop + 1 - start) <= BATCH_TOKENS
        ):
            longest = max(longest, lengths[stop])
            stop += 1
        yield questions[start:stop]
        start = stop


def _ids(tokens: Sequence[int]) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64)


def _padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, T], padding on the left."""
    ids, pads = padded(texts, 1)
    return ids, (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long()
