"""`fot bench prefill`: how fast a long prompt is read into memory, against the authors' algorithm on the same weights.

A prompt of random tokens, the logits of its last token wanted, dense exact memory. Each contender is a process of its
own, confined to as many cores as it has threads, all on the same seeded weights; they take turns:

    inprocess   FotModel over Memory.open(":memory:")
    grpc        FotModel over a `fot serve` in another process, whose threads are its own
    reference   `model_worker.bench.reference`: every window through all layers, memory grown by concatenation

`inprocess-4k` takes turns with those at 64K tokens, so that flatness compares speeds of one time. And with one window
over the whole prompt and no memory:

    sdpa          the untouched transformers model with torch's scaled_dot_product_attention
    self-extend   the same weights with Self-Extend, group 8, neighbour window 1,024

The last logits of every contender are compared with the reference's wherever it runs. Peak memory is the process's own:
what a service holds is not in it. A reference row at 64K tokens is one run of minutes, not an extrapolation.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memory_service.bench.harness import Figures, Progress, Result, ratio, say, scratch, served, show
from memory_service.types.specs import DType
from model_worker.bench.geometry import QUICK, Geometry
from model_worker.bench.launch import launch
from model_worker.bench.subject import Measured, Setup
from model_worker.bench.turns import Runs, distance, label, measured_row, seconds, take_turns

TOKENS = (4_096, 16_384, 65_536, 262_144)
LAYERS = ((2,), (2, 4))
DTYPES = (DType.F32, DType.BF16)
REFERENCE_TOKENS = 65_536  # The reference's time grows with the square: 256K would take an hour and more.
TWO_LAYERS_TOKENS = 65_536  # With several memory layers ours reads all that went before, too.
FLAT = (4_096, 65_536)  # Sizes whose tokens a second are compared.
LONG = 32_768  # From here the reference runs once.
ROUNDS = 3
EXTENDED = (4_096, 8_192, 16_384)
EXTEND = (8, 1_024)  # Group and neighbour window.
TOLERANCE = {DType.F32: 1e-3, DType.BF16: 5e-2}  # Of logits; rounding to bf16 may fall either way.

# The sizes of a quick run stand in for the real ones, under their names.
QUICK_TOKENS = dict(zip(TOKENS, (64, 128, 256, 512), strict=True))
QUICK_EXTENDED = dict(zip(EXTENDED, (64, 128, 192), strict=True))
QUICK_EXTEND = (4, 16)


@dataclass(frozen=True, slots=True)
class Cell:
    """What is held fixed while contenders and prompts vary."""

    layers: tuple[int, ...]
    dtype: DType
    threads: int

    def figure(self, what: str, size: int | None = None) -> str:
        """The figure's name here: what_1layer_64k, what_2layers_64k_bf16, what_1layer_2threads."""
        count = len(self.layers)
        parts = [what, "1layer" if count == 1 else f"{count}layers"]
        parts += [label(size)] if size is not None else []
        parts += [] if self.dtype is DType.F32 else [str(self.dtype)]
        return "_".join(parts + ([] if self.threads == 1 else [f"{self.threads}threads"]))


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    geometry: Geometry
    tokens: Mapping[int, int]  # The size as figures call it, and what is run.
    extended: Mapping[int, int]
    extend: tuple[int, int]
    reference_tokens: int
    rounds: int
    here: bool = False  # All contenders in this process: quick, and the figures mean nothing.

    def reads(self, cell: Cell) -> list[int]:
        """Sizes this cell is measured at."""
        return [size for size in self.tokens if len(cell.layers) == 1 or size <= TWO_LAYERS_TOKENS]


def run(
    *,
    tokens: Sequence[int] = TOKENS,
    layers: Sequence[tuple[int, ...]] = LAYERS,
    dtypes: Sequence[DType] = DTYPES,
    threads: Sequence[int] | None = None,
    reference_tokens: int = REFERENCE_TOKENS,
    rounds: int = ROUNDS,
    extended: Sequence[int] = EXTENDED,
    directory: Path | None = None,
    quick: bool = False,
    progress: Progress = say,
) -> Result:
    """Measure everything; over an hour, or seconds with `quick`, whose figures mean nothing.

    `threads`: by default one, and all of this machine's; one alone takes half the time. `reference_tokens`: longer
    prompts are not given to the reference, whose two-layer run of 64K tokens alone takes six minutes.
    """
    plan = Plan(Geometry(), {n: n for n in sorted(tokens)}, {n: n for n in extended}, EXTEND, reference_tokens, rounds)
    if quick:
        plan = Plan(QUICK, QUICK_TOKENS, QUICK_EXTENDED, QUICK_EXTEND, reference_tokens, 1, here=True)
        dtypes, threads = dtypes[:1], threads or (1,)
    threads = threads or sorted({1, len(os.sched_getaffinity(0))})
    rows: list[dict[str, Any]] = []
    figures: Figures = {}
    with scratch(directory, "fot-bench-prefill-") as place, ExitStack() as stack:
        forgetful = _without_memory(plan)
        for count in threads:
            target = stack.enter_context(served(place / f"threads-{count}", threads=count))
            for dtype in dtypes:
                for chosen in layers:
                    cell = Cell(chosen, dtype, count)
                    found = _measure(cell, plan, target, forgetful, progress)
                    rows += found.rows
                    figures |= found.figures
            if plan.extended:
                found = _extend(plan, count, progress)
                rows += found.rows
                figures |= found.figures
    through = [Cell(one, DType.F32, 1).figure("grpc_vs_inprocess_prefill", 65_536) for one in layers]
    if told := [figures[name] for name in through if name in figures]:
        figures["grpc_vs_inprocess_prefill"] = max(told)
    settings = {
        "hidden": plan.geometry.hidden, "layers": plan.geometry.layers, "heads": plan.geometry.heads,
        "feed_forward": plan.geometry.feed_forward, "vocabulary": plan.geometry.vocabulary,
        "window": plan.geometry.window, "last_context_length": plan.geometry.last_context_length,
        "tokens": list(plan.tokens.values()), "memory_layers": [list(one) for one in layers],
        "memory_dtypes": [str(one) for one in dtypes], "threads": list(threads),
        "reference": "run in full, once from 32K tokens on", "reference_tokens": reference_tokens,
        "logit_tolerance": {str(one): TOLERANCE[one] for one in dtypes},
        "self_extend": {"group": plan.extend[0], "window": plan.extend[1], "tokens": list(plan.extended.values())},
        "rounds": plan.rounds, "transformers": version("transformers"), "quick": quick,
    }  # fmt: skip
    return Result("prefill", figures, rows, settings)


def render(result: Result) -> None:
    """Print tokens a second, memory and the figures."""
    lines = [
        (
            r["contender"], r["memory_layers"], r["memory_dtype"], r["threads"], r["tokens"],
            round(r["tokens_per_s"]), r["median_ms"] / 1000, r["peak_rss_mb"],
        )
        for r in result.rows
    ]  # fmt: skip
    columns = ("contender", "memory layers", "memory", "threads", "tokens", "tokens/s", "seconds", "peak MB")
    show("prefill, a prompt and its last logits", columns, lines, result.figures)


@dataclass(frozen=True)
class _Found:
    rows: list[dict[str, Any]]
    figures: Figures


# --- With a memory --------------------------------------------------------------------------------------------------


def _measure(cell: Cell, plan: Plan, target: str, forgetful: Measured, progress: Progress) -> _Found:
    """All contenders at all sizes of one cell."""
    found = _Found([], {})
    rates: dict[tuple[str, int], float] = {}
    name = cell.figure("prefill")  # Of the memory: all cells share one service.
    setup = Setup("fot", plan.geometry, cell.layers, cell.dtype, name=name, threads=cell.threads)
    with ExitStack() as stack:
        subjects = {
            name: stack.enter_context(launch(one, here=plan.here))
            for name, one in {
                "inprocess": setup,
                "grpc": replace(setup, target=target),
                "reference": replace(setup, kind="reference"),
            }.items()
        }
        for subject in subjects.values():
            subject.prefill(min(plan.tokens.values()))
        subjects["inprocess-4k"] = subjects["inprocess"]
        for size in plan.reads(cell):
            tokens = {
                name: plan.tokens[size] for name in subjects if name != "reference" or size <= plan.reference_tokens
            }
            if size == FLAT[1] and FLAT[0] in plan.tokens:
                subjects["inprocess-4k"], tokens["inprocess-4k"] = subjects["inprocess"], plan.tokens[FLAT[0]]
            progress(
                f"{plan.tokens[size]:,} tokens, memory layers {list(cell.layers)} in {cell.dtype}, "
                f"threads {cell.threads}"
            )
            rounds = {name: 1 if name == "reference" and size >= LONG else plan.rounds for name in tokens}
            runs = take_turns({name: partial(subjects[name].prefill, count) for name, count in tokens.items()}, rounds)
            checked = _compare(runs, cell, None if size > min(plan.tokens) else forgetful)
            for name, taken in runs.items():
                rates[name, size] = tokens[name] / statistics.median(seconds(taken))
                found.rows.append(_row(name, taken, tokens[name], cell, **checked.get(name, {})))
            found.figures.update(_figures(runs, cell, size))
    small, large = FLAT
    for what, long, short in (
        ("prefill_flatness", ("inprocess", large), ("inprocess-4k", large)),
        ("grpc_flatness", ("grpc", large), ("grpc", small)),
        ("reference_flatness", ("reference", large), ("reference", small)),
    ):
        if long in rates and short in rates:
            found.figures[cell.figure(what)] = round(rates[long] / rates[short], 3)
    return found


def _figures(runs: Runs, cell: Cell, size: int) -> Figures:
    """What one size of one cell shows."""
    figures = {cell.figure("grpc_vs_inprocess_prefill", size): ratio(seconds(runs["grpc"]), seconds(runs["inprocess"]))}
    if "reference" in runs:
        figures[cell.figure("prefill_vs_reference", size)] = ratio(
            seconds(runs["reference"]), seconds(runs["inprocess"])
        )
    if size == FLAT[1]:
        for contender in [name for name in ("inprocess", "grpc", "reference") if name in runs]:
            taken = runs[contender]
            figures[cell.figure(f"{contender}_growth_mb", size)] = round(max(one.growth_mb for one in taken), 1)
    return figures


def _compare(runs: Runs, cell: Cell, forgetful: Measured | None) -> dict[str, dict[str, float]]:
    """Assert that ours gives the reference's logits: a fast wrong answer is not a result."""
    if "reference" not in runs:
        return {}
    want = runs["reference"][0]
    facts: dict[str, dict[str, float]] = {}
    for name in ("inprocess", "grpc"):
        worst = max(distance(one, want) for one in runs[name])
        assert worst < TOLERANCE[cell.dtype], f"{name} differs from the reference by {worst} in its last logits"
        facts[name] = {"logit_difference": worst}
    if forgetful is not None:
        # How far a model that forgets is off: what the tolerance must be well below.
        facts["reference"] = {"logit_difference_without_memory": distance(forgetful, want)}
    return facts


def _without_memory(plan: Plan) -> Measured:
    """The shortest prompt, read by a reference that forgets all but the last window."""
    with launch(Setup("reference", plan.geometry), here=plan.here) as subject:
        return subject.prefill(min(plan.tokens.values()))


# --- One window over everything -------------------------------------------------------------------------------------


def _extend(plan: Plan, threads: int, progress: Progress) -> _Found:
    """Self-Extend against plain attention over the whole prompt, the same model and no memory."""
    found = _Found([], {})
    longest = max(plan.extended.values())
    plain = Setup("base", plan.geometry, threads=threads)
    ours = replace(plain, kind="fot", longest=longest, extend=plan.extend)
    suffix = "" if threads == 1 else f"_{threads}threads"
    growth: dict[int, float] = {}
    with launch(plain, here=plan.here) as sdpa, launch(ours, here=plan.here) as extended:
        for subject in (sdpa, extended):
            subject.prefill(min(plan.extended.values()))
        for size, tokens in plan.extended.items():
            progress(f"Self-Extend: {tokens:,} tokens")
            runs = take_turns(
                {"sdpa": partial(sdpa.prefill, tokens), "self-extend": partial(extended.prefill, tokens)},
                {"sdpa": plan.rounds, "self-extend": plan.rounds},
            )
            for name, taken in runs.items():
                found.rows.append(_row(name, taken, tokens, Cell((), DType.F32, threads)))
            growth[size] = max(one.growth_mb for one in runs["self-extend"])
            took, against = seconds(runs["self-extend"]), seconds(runs["sdpa"])
            found.figures[f"self_extend_vs_sdpa_{label(size)}{suffix}"] = ratio(took, against)
    for half, whole in zip(list(growth), list(growth)[1:], strict=False):
        if growth[half] > 0:
            key = f"self_extend_growth_{label(half)}_to_{label(whole)}{suffix}"
            found.figures[key] = round(growth[whole] / growth[half], 3)
    return found


def _row(name: str, runs: list[Measured], tokens: int, cell: Cell, **facts: float) -> dict[str, Any]:
    return measured_row(
        name,
        runs,
        tokens=tokens,
        memory_layers=",".join(str(one) for one in cell.layers),
        memory_dtype=str(cell.dtype) if cell.layers else "",
        threads=cell.threads,
        tokens_per_s=round(tokens / statistics.median(seconds(runs)), 1),
        **facts,
    )
