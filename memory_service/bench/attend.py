"""`fot bench attend`: how fast the service answers attention, against Faiss and torch on the same keys.

Contenders, one thread each side, over bf16 keys and values of one layer, 4 kv heads of 64 dimensions, taken in turns:

    flatip      one Faiss IndexFlatIP a head over the same keys in float32, top 32, softmax, weighted sum of values
    exact       Memory.attend(engine="exact", top_k=32) in this process
    grpc        the same call to a service in another process
    index       Memory.attend(engine="index", top_k=32); its recall and captured mass are measured apart from its time
    dense       Memory.attend(top_k=0): softmax over every key
    sdpa-f32    torch's scaled_dot_product_attention over float32 copies of the keys and values
    sdpa-bf16   the same over the bf16 keys and values
    session     exact, but the tokens came in as windows of 512 appended to a session
    documents   exact, but the tokens came in as documents of 512 tokens

The keys are synthetic and seeded: see `synthetic.Workload`. Before anything is timed the answers are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from memory_service.bench.harness import (
    Figures,
    Progress,
    Result,
    interleave,
    ratio,
    row,
    say,
    scratch,
    served,
    show,
    single_threaded,
)
from memory_service.bench.synthetic import Workload
from memory_service.client import Memory, Session
from memory_service.types.answers import Partial
from memory_service.types.operations import OperationState
from memory_service.types.questions import Engine
from memory_service.types.specs import Fingerprint, IndexPolicy, MemorySpec

HEADS, DIM, TOP_K, LAYER = 4, 64, 32, 0
KEYS = (65_536, 262_144)
QUERIES = (1, 32, 512)
WINDOW = 512  # Tokens of a session's window and of a small document.
ROUNDS = {1: 60, 32: 15, 512: 5}
PAIR_ROUNDS = {1: 200, 32: 30, 512: 9}  # Of exact against grpc, whose difference is small.
QUICK_KEYS = (1_024, 2_048)
SCALE = DIM**-0.5
Call = Callable[[], object]


def run(
    *,
    keys: Sequence[int] = KEYS,
    queries: Sequence[int] = QUERIES,
    directory: Path | None = None,
    quick: bool = False,
    progress: Progress = say,
) -> Result:
    """Measure everything; about ten minutes, or seconds with `quick`, whose figures mean nothing."""
    keys = QUICK_KEYS if quick else sorted(keys)
    rows: list[dict[str, Any]] = []
    figures: Figures = {}
    with single_threaded(), scratch(directory, "fot-bench-attend-") as place:
        for tokens in keys:
            progress(f"{tokens:,} keys × {HEADS} heads × {DIM}: storing and indexing")
            workload = Workload.draw(HEADS, tokens, DIM, max(queries), seed=tokens)
            with stage(workload, place / str(tokens)) as contenders:
                figures = {}
                for count in queries:
                    measured = _measure(contenders, workload.queries[:, :count].contiguous(), tokens, quick, progress)
                    rows += measured.rows
                    figures |= measured.figures
                figures |= contenders.quality(workload.queries)
                figures["session_vs_document"] = max(figures[f"session_vs_document_q{count}"] for count in queries)
        settings = {"heads": HEADS, "head_dim": DIM, "top_k": TOP_K, "keys": list(keys), "queries": list(queries)}
        return Result("attend", figures, rows, settings | {"window": WINDOW, "dtype": "bf16", "quick": quick})


def render(result: Result) -> None:
    """Print the medians and the figures."""
    lines = [(r["contender"], r["keys"], r["queries"], r["median_ms"], r["p25_ms"], r["p75_ms"]) for r in result.rows]
    show("attend, milliseconds a call", ("contender", "keys", "queries", "median", "p25", "p75"), lines, result.figures)


@dataclass(frozen=True)
class _Measured:
    rows: list[dict[str, Any]]
    figures: Figures


def _measure(contenders: Contenders, queries: Tensor, tokens: int, quick: bool, progress: Progress) -> _Measured:
    """All contenders at one number of queries; the figures of the last, largest number of keys are the ones kept."""
    count = queries.shape[1]
    progress(f"{tokens:,} keys, {count} queries × {HEADS} heads")
    calls = contenders.calls(queries)
    contenders.compare(queries)
    rounds, pair_rounds = (2, 2) if quick else (ROUNDS.get(count, 5), PAIR_ROUNDS.get(count, 9))
    seconds = interleave(calls, rounds)
    pair = interleave({"exact": calls["exact"], "grpc": contenders.through_grpc(queries)}, pair_rounds)
    rows = [row(name, taken, keys=tokens, queries=count) for name, taken in seconds.items()]
    rows += [row(f"{name} (pair)", taken, keys=tokens, queries=count) for name, taken in pair.items()]
    # The median of differences between neighbours in time, not the difference of medians: both drift with the machine.
    added = statistics.median(b - a for a, b in zip(pair["exact"], pair["grpc"], strict=True))
    figures = {
        f"exact_vs_flatip_q{count}": ratio(seconds["flatip"], seconds["exact"]),
        f"grpc_vs_inprocess_q{count}": ratio(pair["grpc"], pair["exact"]),
        f"grpc_added_ms_q{count}": round(1000 * added, 3),
        f"ivf_vs_exact_q{count}": ratio(seconds["exact"], seconds["index"]),
        f"dense_vs_sdpa_q{count}": ratio(seconds["sdpa-f32"], seconds["dense"]),
        f"dense_vs_sdpa_bf16_q{count}": ratio(seconds["sdpa-bf16"], seconds["dense"]),
        f"session_vs_document_q{count}": ratio(seconds["session"], seconds["exact"]),
        f"documents_vs_document_q{count}": ratio(seconds["documents"], seconds["exact"]),
    }
    return _Measured(rows, figures)


# --- Contenders -----------------------------------------------------------------------------------------------------


class FlatIP:
    """Exact top-k by Faiss: an IndexFlatIP a head, then softmax over the scaled scores and the values' weighted sum."""

    def __init__(self, keys: Tensor, values: Tensor):
        self._values = values  # [H, T, D] float32
        self._indexes = [faiss.IndexFlatIP(keys.shape[-1]) for _ in keys]
        for index, head in zip(self._indexes, keys, strict=True):
            index.add(head.numpy())

    def attend(self, queries: Tensor, top_k: int) -> Partial:
        """Attention of queries [H, Q, D] over each head's top k."""
        outputs, lses = [], []
        for index, head_queries, head_values in zip(self._indexes, queries, self._values, strict=True):
            found, ids = index.search(head_queries.numpy(), top_k)
            scores = torch.from_numpy(found) * SCALE  # [Q, K]
            outputs.append((scores.softmax(-1)[:, None] @ head_values[torch.from_numpy(ids)]).squeeze(1))
            lses.append(scores.logsumexp(-1))
        return Partial(torch.stack(outputs), torch.stack(lses))


@dataclass(frozen=True)
class Contenders:
    """One workload, stored in every form that is measured."""

    flat: FlatIP
    local: Memory
    small_documents: Memory
    session: Session
    remote: Memory
    keys: Tensor  # [H, T, D] bf16
    values: Tensor
    keys_f32: Tensor
    values_f32: Tensor

    def calls(self, queries: Tensor) -> dict[str, Call]:
        """What is timed against each other, by name."""
        queries_bf16 = queries.bfloat16()
        sdpa = scaled_dot_product_attention
        return {
            "flatip": lambda: self.flat.attend(queries, TOP_K),
            "exact": lambda: _attend(self.local, queries, "doc"),
            "index": lambda: _attend(self.local, queries, "doc", engine=Engine.INDEX),
            "dense": lambda: _attend(self.local, queries, "doc", top_k=0),
            "sdpa-f32": lambda: sdpa(queries[None], self.keys_f32[None], self.values_f32[None], scale=SCALE),
            "sdpa-bf16": lambda: sdpa(queries_bf16[None], self.keys[None], self.values[None], scale=SCALE),
            "session": lambda: _attend(self.local, queries, self.session),
            "documents": lambda: _attend(self.small_documents, queries, None),
        }

    def through_grpc(self, queries: Tensor) -> Call:
        return lambda: _attend(self.remote, queries, "doc")

    def compare(self, queries: Tensor) -> None:
        """Assert that every exact way gives the same answer: a fast wrong answer is not a result."""
        want = self.flat.attend(queries, TOP_K)
        for name, memory, scope in (
            ("exact", self.local, "doc"),
            ("grpc", self.remote, "doc"),
            ("session", self.local, self.session),
            ("documents", self.small_documents, None),
        ):
            have = _attend(memory, queries, scope)
            worst = max((have.output - want.output).abs().max().item(), (have.lse - want.lse).abs().max().item())
            assert worst < 1e-3, f"{name} differs from IndexFlatIP by {worst}"

    def quality(self, queries: Tensor) -> Figures:
        """What the index costs in accuracy, against the exact top k of the same queries."""
        answer = self.local.attend(LAYER, queries, scope="doc", top_k=TOP_K, engine=Engine.INDEX, measure=True)
        assert answer.measured is not None
        return {
            "ivf_recall32": round(answer.measured.recall, 4),
            "ivf_mass": round(answer.measured.captured_mass, 4),
        }


def _attend(memory: Memory, queries: Tensor, scope: Any, top_k: int = TOP_K, engine: str = Engine.EXACT) -> Partial:
    return memory.attend(LAYER, queries, scope=scope, top_k=top_k, engine=engine).partial


@contextmanager
def stage(workload: Workload, place: Path) -> Iterator[Contenders]:
    """Store a workload in this process and in a service of another; both go away at exit."""
    spec = MemorySpec(
        # Only built when asked for, so that no background build takes the processor from what is measured.
        Fingerprint("bench"), (LAYER,), HEADS, DIM, index=IndexPolicy(min_tokens=1 << 40),
    )  # fmt: skip
    place.mkdir()
    with ExitStack() as stack:
        local = stack.enter_context(Memory.open(str(place / "here"), "whole", spec))
        local.put("doc", workload.keys, workload.values)
        built = local.wait(local.start("index"))
        assert built.state is OperationState.DONE, built.message
        session = stack.enter_context(local.session(lease_s=3600))
        small = stack.enter_context(Memory.open(str(place / "here"), "small", spec))
        for number, (keys, values) in enumerate(_windows(workload)):
            session.append(LAYER, keys[0], values[0])
            small.put(f"doc-{number}", keys, values)
        target = stack.enter_context(served(place / "there"))
        remote = stack.enter_context(Memory.open(target, "whole", spec))
        remote.put("doc", workload.keys, workload.values)
        keys, values = workload.keys[0], workload.values[0]
        keys_f32, values_f32 = keys.float(), values.float()
        flat = FlatIP(keys_f32, values_f32)
        yield Contenders(flat, local, small, session, remote, keys, values, keys_f32, values_f32)


def _windows(workload: Workload) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, workload.keys.shape[2], WINDOW):
        window = slice(first, first + WINDOW)
        yield workload.keys[:, :, window], workload.values[:, :, window]
