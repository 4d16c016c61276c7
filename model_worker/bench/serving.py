"""`fot bench serving`: many chats at once through one model, batched, against one after another.

All streams are submitted at once, greedily, over a memory of documents that all of them see, with their sources told.
Contenders take turns:

    one-by-one    `answering.answer` for each stream, in order, over Memory.open(":memory:")
    batched       the same streams through a `Batcher`
    grpc-…        both through a `fot serve` in another process

Every stream's text must be the same for all of them. Times a token are those between two pieces of a stream's text,
divided among their tokens; the time to the first token counts from when all streams were submitted.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from memory_service.bench.harness import Figures, Progress, Result, row, say, scratch, served, show, single_threaded
from model_worker import reference
from model_worker.answering.answers import answer, token_ids
from model_worker.decoder.model import FotModel
from model_worker.ingestion.encoding import Encoder
from model_worker.serving.batcher import Batcher
from model_worker.serving.requests import Event, Failed, Request, Text
from model_worker.serving.settings import BatchSettings
from model_worker.settings import Recall

STREAMS, NEW_TOKENS, ROUNDS = 16, 64, 3
DOCUMENTS, SENTENCES = 16, 100
MANNERS = {"dense": Recall(), "top32": Recall(top_k=32)}
_PLACES = ("garden", "harbour", "library", "tower", "kitchen", "bridge", "market", "station")
_THINGS = ("lamp", "letter", "map", "key", "clock", "coat", "basket", "mirror")


@dataclass
class Stream:
    """What one stream of a round was told, and when; seconds from the submission of all."""

    text: str = ""
    tokens: int = 0
    first_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # Between tokens.
    _last_s: float = 0.0

    def tell(self, text: str, tokens: int, at_s: float) -> None:
        """Take a piece."""
        if not self.tokens:
            self.first_s = at_s
        else:
            self.gaps_s += [(at_s - self._last_s) / max(1, tokens)] * tokens
        self.text, self.tokens, self._last_s = self.text + text, self.tokens + tokens, at_s


@dataclass(frozen=True)
class Round:
    """All streams, once."""

    seconds: float
    cpu_s: float
    tokens: int
    streams: list[Stream]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def run(
    *,
    streams: int = STREAMS,
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
    model: str | Path | None = None,
    directory: Path | None = None,
    quick: bool = False,
    progress: Progress = say,
) -> Result:
    """Measure the `reference` model or the checkpoint `model`; a few minutes, or seconds with `quick`."""
    if quick:
        streams, new_tokens, rounds = 4, 8, 1
    path = reference.path() if model is None else model
    rows: list[dict[str, Any]] = []
    figures: Figures = {}
    with scratch(directory, "fot-bench-serving-") as place, ExitStack() as stack:
        stack.enter_context(single_threaded())
        target = stack.enter_context(served(place / "served"))
        progress(f"{streams} streams of {new_tokens} tokens: documents")
        tokenizer = AutoTokenizer.from_pretrained(path)
        for name, where in (("", ":memory:"), ("grpc-", target)):
            with FotModel.from_pretrained(path, memory=where) as fot:
                tokens = _fill(fot, tokenizer, 2 if quick else DOCUMENTS)
                for manner, recall in MANNERS.items():
                    progress(f"{name or 'embedded '}{manner}")
                    taken = _measure(fot, tokenizer, _prompts(tokenizer, streams), new_tokens, recall, rounds)
                    for contender, runs in taken.items():
                        rows.append(_row(f"{name}{contender}", runs, manner=manner, memory_tokens=tokens))
                    figures |= _figures(name.replace("-", "_"), manner, taken)
    settings = {
        "model": "reference" if model is None else str(model), "streams": streams, "new_tokens": new_tokens,
        "rounds": rounds, "documents": DOCUMENTS, "threads": 1, "transformers": version("transformers"), "quick": quick,
    }  # fmt: skip
    return Result("serving", figures, rows, settings)


def render(result: Result) -> None:
    """Print tokens a second and the times of tokens."""
    lines = [
        (
            r["contender"], r["manner"], r["tokens_per_s"], r["cpu_ms_per_token"], r["token_p50_ms"], r["token_p99_ms"],
            r["first_p50_ms"], r["first_p99_ms"],
        )
        for r in result.rows
    ]  # fmt: skip
    columns = ("contender", "memory", "tokens/s", "CPU ms/token", "token p50", "p99", "first p50", "p99")
    show("serving, milliseconds", columns, lines, result.figures)


def _measure(
    fot: FotModel, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int, recall: Recall, rounds: int
) -> dict[str, list[Round]]:
    """Rounds of both contenders in turns, after a short one of each that is not counted."""

    def one_by_one(count: int) -> Round:
        return _one_by_one(fot, tokenizer, prompts, count, recall)

    def batched(count: int) -> Round:
        return _batched(fot, tokenizer, prompts, count, recall)

    contenders = {"one-by-one": one_by_one, "batched": batched}
    for contender in contenders.values():
        contender(2)
    taken: dict[str, list[Round]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in contenders if number % 2 == 0 else reversed(contenders):
            taken[name].append(contenders[name](new_tokens))
    texts = {tuple(stream.text for stream in one.streams) for runs in taken.values() for one in runs}
    assert len(texts) == 1, f"streams differ between contenders or rounds: {texts}"
    return taken


def _one_by_one(
    fot: FotModel, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int, recall: Recall
) -> Round:
    streams, tokens = [Stream() for _ in prompts], 0
    started, cpu = time.perf_counter(), time.process_time()
    for stream, prompt in zip(streams, prompts, strict=True):

        def on_text(piece: str, stream: Stream = stream) -> None:
            stream.tell(piece, 1, time.perf_counter() - started)

        told = answer(fot, tokenizer, prompt, recall=recall, max_new_tokens=new_tokens, on_text=on_text)
        tokens += len(told.token_ids)
    return Round(time.perf_counter() - started, time.process_time() - cpu, tokens, streams)


def _batched(fot: FotModel, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int, recall: Recall) -> Round:
    streams = [Stream() for _ in prompts]
    ended, failed, tokens = threading.Semaphore(0), list[Exception](), [0]
    with Batcher(fot, tokenizer, BatchSettings(max_rows=len(prompts))) as batcher:
        started, cpu = time.perf_counter(), time.process_time()

        def listener(stream: Stream) -> Callable[[Event], None]:
            def on_event(event: Event) -> None:
                if isinstance(event, Text):
                    stream.tell(event.text, event.tokens, time.perf_counter() - started)
                    return
                if isinstance(event, Failed):
                    failed.append(event.error)
                else:
                    tokens[0] += event.completion_tokens
                ended.release()

            return on_event

        for stream, prompt in zip(streams, prompts, strict=True):
            batcher.submit(Request(tuple(prompt), new_tokens, recall=recall), listener(stream))
        for _ in prompts:
            ended.acquire()
        seconds, used = time.perf_counter() - started, time.process_time() - cpu
    if failed:
        raise failed[0]
    return Round(seconds, used, tokens[0], streams)


# --- What is asked --------------------------------------------------------------------------------------------------


def _fill(fot: FotModel, tokenizer: Any, documents: int) -> int:
    """Documents of plain sentences into the memory; how many tokens."""
    assert fot.memory is not None
    texts = [token_ids(tokenizer, _text(random.Random(number), SENTENCES)) for number in range(documents)]
    for number, (ids, made) in enumerate(zip(texts, Encoder(fot).encode(texts), strict=True)):
        fot.memory.put(f"document-{number}", made.keys, made.values, token_ids=ids)
    return sum(len(ids) for ids in texts)


def _prompts(tokenizer: Any, streams: int) -> list[list[int]]:
    """Chats of one to six sentences."""
    return [token_ids(tokenizer, _text(random.Random(1000 + n), 1 + n % 6) + "The") for n in range(streams)]


def _text(dice: random.Random, sentences: int) -> str:
    return "".join(
        f"The {dice.choice(_THINGS)} of the {dice.choice(_PLACES)} has the number {dice.randrange(10_000)}. "
        for _ in range(sentences)
    )


# --- Figures --------------------------------------------------------------------------------------------------------


def _row(name: str, runs: Sequence[Round], **facts: Any) -> dict[str, Any]:
    gaps = [gap for one in runs for stream in one.streams for gap in stream.gaps_s]
    firsts = [stream.first_s for one in runs for stream in one.streams]
    return row(
        name,
        [one.seconds for one in runs],
        **facts,
        tokens_per_s=round(statistics.median(one.tokens_per_s for one in runs), 2),
        cpu_ms_per_token=round(1000 * statistics.median(one.cpu_s / one.tokens for one in runs), 3),
        token_p50_ms=_percentile(gaps, 50),
        token_p99_ms=_percentile(gaps, 99),
        first_p50_ms=_percentile(firsts, 50),
        first_p99_ms=_percentile(firsts, 99),
    )


def _figures(place: str, manner: str, taken: dict[str, list[Round]]) -> Figures:
    """Ratios of neighbours in time: the machine's speed drifts."""
    pairs = list(zip(taken["one-by-one"], taken["batched"], strict=True))
    speeds = [batched.tokens_per_s / alone.tokens_per_s for alone, batched in pairs]
    work = [alone.cpu_s / batched.cpu_s for alone, batched in pairs]
    gaps = [gap for _, one in pairs for stream in one.streams for gap in stream.gaps_s]
    firsts = [stream.first_s for _, one in pairs for stream in one.streams]
    return {
        f"serving_{place}batched_vs_one_by_one_{manner}": round(statistics.median(speeds), 3),
        f"serving_{place}batched_vs_one_by_one_cpu_{manner}": round(statistics.median(work), 3),
        f"serving_{place}token_p50_ms_{manner}": _percentile(gaps, 50),
        f"serving_{place}token_p99_ms_{manner}": _percentile(gaps, 99),
        f"serving_{place}first_token_p50_ms_{manner}": _percentile(firsts, 50),
    }


def _percentile(seconds: Sequence[float], percent: int) -> float:
    """In milliseconds."""
    ordered = sorted(seconds)
    return round(1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 3) if ordered else 0.0
