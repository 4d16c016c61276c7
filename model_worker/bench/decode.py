"""`fot bench decode`: milliseconds a token with many tokens in memory, against the authors' algorithm.

The memory is planted: documents of attention-like random keys (see `memory_service.bench.synthetic`), so that a
million tokens need no prompt of a million. A prompt fills the window, then tokens are read one by one, the same ones by
every contender. Each contender is a process of its own, confined to as many cores as it has threads; they take turns:

    dense        FotModel over Memory.open(":memory:"): softmax over every key
    exact        the same, over the 32 highest-scoring keys a query
    index        the same, chosen by an index, at the cheapest of a few settings with recall ≥ 0.95 of those 32
    grpc-…       the same three through a `fot serve` in another process
    reference    `model_worker.bench.reference`, which concatenates and casts the whole memory at every token
    index-64k    beside the largest memory: `index` over 64K tokens, so that their ratio is of one time

Dense answers are compared with the reference's, exact ones with those over gRPC; the two indexes are built apart.
Recall and mass of the index are those of the model's own queries, measured apart from its time.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from memory_service.bench.harness import Figures, Progress, Result, ratio, say, scratch, served, show
from memory_service.bench.synthetic import Head
from memory_service.client import Client
from memory_service.types.questions import Engine
from memory_service.types.specs import DType
from model_worker.bench.geometry import QUICK, Geometry
from model_worker.bench.launch import launch
from model_worker.bench.subject import PLANTED_TOKENS, Measured, Mode, Quality, Setup, Subject
from model_worker.bench.turns import Runs, distance, label, measured_row, seconds, take_turns

TOKENS = (4_096, 16_384, 65_536, 262_144, 1_048_576)
LAYERS = ((2,), (2, 4))
DTYPES = (DType.F32, DType.BF16)
HUGE = 1_048_576  # From here one memory layer in bf16 alone: more would not fit a small machine.
REFERENCE_TOKENS = 262_144
GRPC_TOKENS = 262_144
TOP_K = 32
RECALL = 0.95
SEARCHES: tuple[dict[str, float], ...] = ({}, {"nprobe": 64}, {"nprobe": 128}, {"nprobe": 256}, {"nprobe": 512})
ASKED = 32  # Tokens whose queries the index is judged by.
ROUNDS, STEPS = 6, 16  # Tokens a round; all of them must fit the window after its prompt.
TOLERANCE = {DType.F32: 1e-3, DType.BF16: 5e-2}  # Of logits; the window of a session may round to bf16 either way.
# The sizes of a quick run stand in for the real ones, under their names.
QUICK_TOKENS = {65_536: 128, 262_144: 256, 1_048_576: 512}

DENSE = Mode("dense")
EXACT = Mode("exact", TOP_K, Engine.EXACT)
INDEX = Mode("index", TOP_K, Engine.INDEX)


@dataclass(frozen=True, slots=True)
class Cell:
    """What is held fixed while contenders vary."""

    size: int  # Planted tokens, as figures call them.
    tokens: int  # Planted tokens.
    layers: tuple[int, ...]
    dtype: DType
    threads: int
    small: int | None = None  # Tokens of the smaller memory measured beside the largest.

    def figure(self, what: str, size: bool = True) -> str:
        """The figure's name here; plain for one memory layer, float32 and one thread."""
        parts = [what] + ([label(self.size)] if size else [])
        parts += [] if len(self.layers) == 1 else [f"{len(self.layers)}layers"]
        parts += [] if self.dtype is DType.F32 else [str(self.dtype)]
        return "_".join(parts + ([] if self.threads == 1 else [f"{self.threads}threads"]))


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    geometry: Geometry
    reference_tokens: int
    grpc_tokens: int
    rounds: int
    steps: int
    here: bool = False  # All contenders in this process: quick, and the figures mean nothing.


def run(
    *,
    tokens: Sequence[int] = TOKENS,
    layers: Sequence[tuple[int, ...]] = LAYERS,
    dtypes: Sequence[DType] = DTYPES,
    threads: Sequence[int] = (1,),
    reference_tokens: int = REFERENCE_TOKENS,
    grpc_tokens: int = GRPC_TOKENS,
    rounds: int = ROUNDS,
    directory: Path | None = None,
    quick: bool = False,
    progress: Progress = say,
) -> Result:
    """Measure everything; about half an hour, or seconds with `quick`, whose figures mean nothing.

    Larger memories than `reference_tokens` and `grpc_tokens` are not given to the reference and to a service: the
    service would have to build the index a second time. 1M tokens in bf16 are 0.5 GiB a head of 64 dimensions
    and layer on disk and twice that in RAM.
    """
    plan = Plan(Geometry(), reference_tokens, grpc_tokens, rounds, STEPS)
    sizes: Mapping[int, int] = {one: one for one in sorted(tokens)}
    if quick:
        plan, sizes = replace(plan, geometry=QUICK, rounds=1, steps=4, here=True), QUICK_TOKENS
        layers = layers[:1]
    rows: list[dict[str, Any]] = []
    figures: Figures = {}
    medians: dict[tuple[Cell, str], float] = {}
    with scratch(directory, "fot-bench-decode-") as place, ExitStack() as stack:
        targets = {one: stack.enter_context(served(place / f"threads-{one}", threads=one)) for one in threads}
        for size, count in sizes.items():
            for chosen in layers:
                for dtype in dtypes:
                    if size >= HUGE and (len(chosen) > 1 or dtype is not DType.BF16):
                        continue
                    for number in threads:
                        cell = Cell(size, count, chosen, dtype, number, sizes.get(65_536) if size >= HUGE else None)
                        found = _measure(cell, plan, targets[number], place / "planted.safetensors", progress)
                        rows += found.rows
                        figures |= found.figures
                        medians |= {(cell, name): value for name, value in found.medians.items()}
    figures |= _growth(medians)
    settings = {
        "hidden": plan.geometry.hidden, "layers": plan.geometry.layers, "heads": plan.geometry.heads,
        "window": plan.geometry.window, "last_context_length": plan.geometry.last_context_length,
        "tokens": list(sizes.values()), "memory_layers": [list(one) for one in layers],
        "memory_dtypes": [str(one) for one in dtypes], "threads": list(threads), "top_k": TOP_K,
        "planted": f"documents of {PLANTED_TOKENS} tokens", "reference_tokens": reference_tokens,
        "grpc_tokens": grpc_tokens, "index_recall_wanted": RECALL, "rounds": plan.rounds, "steps": plan.steps,
        "logit_tolerance": {str(one): TOLERANCE[one] for one in dtypes},
        "transformers": version("transformers"), "quick": quick,
    }  # fmt: skip
    return Result("decode", figures | _headlines(figures), rows, settings)


def render(result: Result) -> None:
    """Print milliseconds a token and the figures."""
    lines = [
        (
            r["contender"], r["tokens"], r["memory_layers"], r["memory_dtype"], r["threads"],
            r["median_ms"], r["p75_ms"], r["peak_rss_mb"], r.get("recall", ""),
        )
        for r in result.rows
    ]  # fmt: skip
    columns = ("contender", "in memory", "layers", "memory", "threads", "ms/token", "p75", "peak MB", "recall@32")
    show("decode, milliseconds a token", columns, lines, result.figures)


@dataclass(frozen=True)
class _Found:
    rows: list[dict[str, Any]]
    figures: Figures
    medians: dict[str, float]  # Seconds a token of each contender.


def _measure(cell: Cell, plan: Plan, target: str, planted: Path, progress: Progress) -> _Found:
    """All contenders over one planted memory."""
    what = f"{cell.tokens:,} tokens, memory layers {list(cell.layers)} in {cell.dtype}, threads {cell.threads}"
    progress(f"{what}: planting and indexing")
    setup = Setup(
        "fot", plan.geometry, cell.layers, cell.dtype, planted=str(planted), threads=cell.threads,
        name=cell.figure("decode"),  # Of the memory: all cells share one service.
    )  # fmt: skip
    with ExitStack() as stack:
        calls: dict[str, tuple[Subject, Mode]] = {}
        if cell.small is not None:
            _draw(replace(cell, tokens=cell.small), plan.geometry, planted)
            small = stack.enter_context(launch(setup, here=plan.here))
            calls["index-64k"] = (small, _cheapest(small, plan)[1])
        _draw(cell, plan.geometry, planted)
        local = stack.enter_context(launch(setup, here=plan.here))
        quality, index = _cheapest(local, plan)
        modes = {"dense": DENSE, "exact": EXACT, "index": index}
        calls |= {name: (local, mode) for name, mode in modes.items()}
        if cell.size <= plan.grpc_tokens:
            remote = stack.enter_context(launch(replace(setup, target=target), here=plan.here))
            stack.callback(_forget, target, setup.name)
            calls |= {f"grpc-{name}": (remote, mode) for name, mode in modes.items()}
        if cell.size <= plan.reference_tokens:
            reference = stack.enter_context(launch(replace(setup, kind="reference"), here=plan.here))
            calls["reference"] = (reference, DENSE)
        progress(f"{what}: {', '.join(calls)}")
        for subject, mode in calls.values():
            subject.start(plan.geometry.last_context_length, mode)
            subject.decode(plan.steps, mode)
        steps = {name: partial(subject.decode, plan.steps, mode) for name, (subject, mode) in calls.items()}
        runs = take_turns(steps, dict.fromkeys(steps, plan.rounds))
    return _found(cell, runs, quality, index)


def _forget(target: str, name: str) -> None:
    """Delete a planted memory from the service, whose RAM the next one needs."""
    with Client.open(target) as client:
        client.delete(name)


def _found(cell: Cell, runs: Runs, quality: Quality, index: Mode) -> _Found:
    """Rows and figures of one planted memory."""
    facts: dict[str, dict[str, Any]] = {name: {} for name in runs}
    for name in ("index", "grpc-index"):
        if name in runs:
            facts[name] |= {"recall": round(quality.recall, 4), "mass": round(quality.mass, 4), **index.search}
    for name, difference in _compare(runs, cell.dtype).items():
        facts[name]["logit_difference"] = difference
    rows = [_row(name, taken, cell, facts[name]) for name, taken in runs.items()]
    figures: Figures = {
        cell.figure("index_recall32"): round(quality.recall, 4),
        cell.figure("index_mass"): round(quality.mass, 4),
    }
    if "index-64k" in runs:
        what = f"decode_ann_{label(cell.size)}_vs_64k"
        figures[cell.figure(what, size=False)] = ratio(seconds(runs["index"]), seconds(runs["index-64k"]))
    for name in ("dense", "exact", "index"):
        if "reference" in runs:
            took = ratio(seconds(runs["reference"]), seconds(runs[name]))
            figures[cell.figure(f"decode_{name}_vs_reference")] = took
        if f"grpc-{name}" in runs:
            figures[cell.figure(f"grpc_added_ms_decode_{name}")] = _added_ms(runs[name], runs[f"grpc-{name}"])
    return _Found(rows, figures, {name: statistics.median(seconds(taken)) for name, taken in runs.items()})


def _added_ms(here: list[Measured], there: list[Measured]) -> float:
    """The median of differences between neighbours in time, not the difference of medians: both drift."""
    pairs = zip(here, there, strict=True)
    added = [statistics.median(b.seconds) - statistics.median(a.seconds) for a, b in pairs]
    return round(1000 * statistics.median(added), 3)


def _compare(runs: Runs, dtype: DType) -> dict[str, float]:
    """Assert that dense answers are the reference's, and those over gRPC the same: fast wrong ones are no result."""
    differences = {}
    pairs = [("dense", "reference"), ("grpc-dense", "dense"), ("grpc-exact", "exact")]
    for name, other in pairs:
        if name in runs and other in runs:
            worst = max(distance(a, b) for a, b in zip(runs[name], runs[other], strict=True))
            assert worst < TOLERANCE[dtype], f"{name} differs from {other} by {worst} in its logits"
            differences[name] = worst
    return differences


def _growth(medians: Mapping[tuple[Cell, str], float]) -> Figures:
    """How the time of a token grows with the memory: against 64K tokens of the same kind."""
    figures: Figures = {}
    for (cell, name), before in medians.items():
        for (larger, other), after in medians.items():
            same = (larger.layers, larger.dtype, larger.threads, other) == (cell.layers, cell.dtype, cell.threads, name)
            if same and cell.size == 65_536 and larger.size > cell.size:
                what = f"decode_{name.replace('-', '_')}_{label(larger.size)}_vs_64k"
                figures[cell.figure(what, size=False)] = round(after / before, 3)
    return figures


def _headlines(figures: Figures) -> Figures:
    """The figures with names of their own, drawn from the others: one memory layer, one thread."""
    drawn = {
        # The same computation, in the dtype that memories have by default, here and in the authors' code.
        "decode_vs_reference_256k": "decode_dense_vs_reference_256k_bf16",
        "decode_ann_1m_vs_64k": "decode_ann_1m_vs_64k_bf16",
        "grpc_added_ms_decode": "grpc_added_ms_decode_dense_64k_bf16",
    }
    return {name: figures[source] for name, source in drawn.items() if source in figures}


# --- Planting -------------------------------------------------------------------------------------------------------


def _draw(cell: Cell, geometry: Geometry, file: Path) -> None:
    """Write keys and values [L, H, T, D] as hard to search as a model's."""
    generator = torch.Generator().manual_seed(cell.tokens)
    shape = (len(cell.layers), geometry.heads, cell.tokens, geometry.head_dim)
    keys, values = torch.empty(2, *shape, dtype=cell.dtype.torch)
    for layer in range(len(cell.layers)):
        for head in range(geometry.heads):
            keys[layer, head] = Head.draw(geometry.head_dim, generator).keys(cell.tokens, generator)
            values[layer, head] = torch.randn(cell.tokens, geometry.head_dim, generator=generator)
    save_file({"keys": keys, "values": values}, file)


def _cheapest(subject: Subject, plan: Plan) -> tuple[Quality, Mode]:
    """The first search setting that reaches the wanted recall for this model's queries, else the last."""
    for search in SEARCHES:
        mode = replace(INDEX, search=search)
        quality = subject.quality(min(ASKED, plan.geometry.last_context_length), mode)
        if quality.recall >= RECALL:
            break
    return quality, mode


def _row(name: str, runs: list[Measured], cell: Cell, facts: Mapping[str, Any]) -> dict[str, Any]:
    return measured_row(
        name,
        runs,
        tokens=cell.small if name == "index-64k" else cell.tokens,
        memory_layers=",".join(str(one) for one in cell.layers),
        memory_dtype=str(cell.dtype),
        threads=cell.threads,
        **facts,
    )
