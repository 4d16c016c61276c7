"""`fot eval approximation`: what an approximate search over a model's own keys costs, in answers and in mass.

The Focused Transformer leaves open what approximate kNN does to a model (arXiv 2307.03170, section 6). Here the same
haystacks (`fot eval dense` describes them) are kept once for every index the service builds, and asked with several
search settings of each. Per index and setting:

    right          greedy answers that are exact, with 95 % Wilson intervals, beside those of the exact top k
    recall         share of the exact top k that was found, at the queries that predict the answers (first memory
                   layer); where keys are bit-identical, as those of a repeated filler, equals may stand for each other
    captured mass  softmax mass of what was found over that of the exact top k; also its 10th percentile over questions
    ms             of a call with one query of all heads, as decoding makes it, the median; taken in turns with the same
                   call answered exactly, so that their ratio holds on a busy machine
    bytes          of the index, beside those of the keys and values; and the seconds it took to build

Index names are Faiss's factory strings. What the service refuses, it refuses here, with its reason in the row. Inverted
lists are the service's own: keys far from every centroid are kept apart and scored exactly. Every index only names
candidates, which are scored again from the stored keys; rough codes are also asked for more of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from random import Random
from typing import TYPE_CHECKING, Any

from memory_service import AttendOptions, Engine, FotError
from memory_service.errors import FailedPrecondition, InvalidArgument
from memory_service.index.factories import choose_factory, parse_factory
from model_worker.evaluation.haystacks import HAYSTACKS, Haystack, haystack_of
from model_worker.evaluation.report import Column, Report, nbytes, percent
from model_worker.evaluation.subject import Library, Queries, Subject, Tell
from model_worker.evaluation.wilson import Share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS, QUESTIONS, TOP_K = 65_536, 32, 32
TIMED = 24  # Calls of one query.
FACTORIES = (
    "Flat", "SQ8", "IVF{lists},Flat", "IVF{lists},SQ8", "IVF{lists},PQ{dim}x4fsr", "IVF{lists},RaBitQ", "HNSW32",
    "RaBitQ",
)  # fmt: skip
PROBES = (1, 4, 16, 64)  # Lists visited.
REACH = (64, 256)  # efSearch of a graph.
MORE = 16  # Candidates for every key of the top k, where codes are rough: they are scored again exactly.
COLUMNS = (
    Column("haystack"), Column("index"), Column("setting"), Column("right", form=percent),
    Column("recall", form=percent), Column("captured_mass", form=percent), Column("mass_p10", "10th pct", percent),
    Column("ms"), Column("ms_exact", "exact ms"), Column("bytes", "index", nbytes),
    Column("build_s", "build s"), Column("refused"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """How a memory is asked."""

    name: str
    engine: Engine = Engine.INDEX
    search: Mapping[str, float] = field(default_factory=dict)


EXACT = Setting("exact", Engine.EXACT)


def run(
    subject: Subject,
    *,
    haystacks: Sequence[str] = tuple(HAYSTACKS),
    tokens: int = TOKENS,
    questions: int = QUESTIONS,
    top_k: int = TOP_K,
    factories: Sequence[str] = FACTORIES,
    probes: Sequence[int] = PROBES,
    seed: int = 0,
    tell: Tell = lambda *_: None,
) -> Report:
    """Ask every haystack through every index. `{lists}`, `{dim}` and `{half}` in a factory are filled in.

    Raises InvalidArgument for sizes below one or an unknown haystack.
    """
    if questions < 1 or top_k < 1 or any(one < 1 for one in probes):
        raise InvalidArgument("this study needs at least one question, a top_k and numbers of lists of at least 1")
    rows: list[dict[str, Any]] = []
    filled = [_filled(factory, tokens, subject.spec.head_dim) for factory in factories]
    steps = [(name, factory) for name in haystacks for factory in ("none", *filled)]
    made: dict[str, Haystack] = {}
    for number, (name, factory) in enumerate(steps):
        tell(number, len(steps), f"{name}: {'exact' if factory == 'none' else factory}")
        if name not in made:
            made[name] = haystack_of(
                name,
                subject.tokenizer,
                tokens,
                questions,
                Random(f"{seed} {name}"),
                subject.trained.last_context_length,
            )
        facts = {"haystack": name, "index": "none (exact)" if factory == "none" else factory}
        try:
            rows += [{**facts, **row} for row in _asked(subject, made[name], factory, top_k, probes)]
        except (InvalidArgument, FailedPrecondition) as error:
            if factory == "none":
                raise
            rows.append({**facts, "refused": _reason(error)})
    settings = {
        **subject.told(), "haystacks": list(haystacks), "tokens": tokens, "questions": questions, "top_k": top_k,
        "factories": filled, "probes": list(probes), "seed": seed,
    }  # fmt: skip
    return Report("approximation", __doc__ or "", settings, rows, _figures(rows))


def _asked(
    subject: Subject, haystack: Haystack, factory: str, top_k: int, probes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """One index, every setting."""
    with subject.library(factory) as library:
        library.put({"haystack": haystack.ids})
        build_s = library.index() if factory != "none" else 0.0
        asked = library.queries(haystack.questions)
        stats = library.stats()
        for setting in [EXACT] if factory == "none" else _settings(factory, probes, top_k, subject.spec.head_dim):
            recall = replace(library.model.recall, top_k=top_k, engine=setting.engine, search=setting.search)
            answers = library.ask(haystack.questions, recall=recall)
            right = Share(sum(one.exact for one in answers), len(answers))
            options = AttendOptions(top_k=top_k, engine=setting.engine, search=setting.search)
            recalls, masses = _quality(library, asked, options)
            yield {
                "setting": setting.name, "search": dict(setting.search), "tokens": len(haystack.ids),
                "asked": right.trials, "right": right.value, "low": right.low, "high": right.high,
                "recall": statistics.fmean(recalls), "captured_mass": min(1.0, statistics.fmean(masses)),
                "mass_p10": sorted(masses)[len(masses) // 10],
                **_times(library, asked, options),
                "bytes": stats.index_bytes, "stored_bytes": stats.bytes, "build_s": build_s, "refused": None,
            }  # fmt: skip


def _settings(factory: str, probes: Sequence[int], top_k: int, dim: int) -> list[Setting]:
    if factory.startswith("IVF"):
        settings = [Setting(f"nprobe {count}", search={"nprobe": count}) for count in probes]
        if parse_factory(factory, dim).coarse:
            most, candidates = max(probes), MORE * top_k
            words = f"nprobe {most}, {candidates} candidates"
            settings.append(Setting(words, search={"nprobe": most, "candidates": candidates}))
        return settings
    if factory.startswith("HNSW"):
        return [Setting(f"efSearch {reach}", search={"efSearch": reach}) for reach in REACH]
    return [Setting("all codes")]


def _filled(factory: str, tokens: int, dim: int) -> str:
    """The factory with as many lists as the service itself would make for so many tokens."""
    usual = parse_factory(choose_factory(max(tokens, 1024), dim, "auto"), dim)
    for name, value in {"lists": usual.lists, "dim": dim, "half": dim // 2}.items():
        factory = factory.replace(f"{{{name}}}", str(value))
    return factory


def _quality(library: Library, asked: Sequence[Queries], options: AttendOptions) -> tuple[list[float], list[float]]:
    """Recall and captured mass of each question, mean over its queries and heads."""
    if options.engine is Engine.EXACT:
        return [1.0] * len(asked), [1.0] * len(asked)
    answers = library.attend(asked, replace(options, measure=True))
    found = [one.measured for one in answers if one.measured is not None]
    return [one.recall for one in found], [one.captured_mass for one in found]


def _times(library: Library, asked: Sequence[Queries], options: AttendOptions) -> dict[str, float]:
    """Milliseconds of a call with one query of all heads, through the index and exactly; medians."""
    single = [replace(one, queries=one.queries[:, -1:]) for one in asked]

    def taking_turns(how: AttendOptions) -> Callable[[], object]:
        turn = cycle(single)
        return lambda: library.attend([next(turn)], how)

    exact = AttendOptions(top_k=options.top_k, engine=Engine.EXACT)
    calls = {"ms": taking_turns(options)} | ({} if options == exact else {"ms_exact": taking_turns(exact)})
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, TIMED):  # One before the first, to get warm.
        # Every other turn backwards, so that nobody always follows the same neighbour.
        for name in calls if turn % 2 else reversed(calls):
            started = time.perf_counter()
            calls[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {"ms_exact": math.nan} | {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}


def _reason(error: FotError) -> str:
    return error.message.partition(";")[0]


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of every haystack: the exact answer, and the fastest setting that captures 99 % of its mass."""
    figures: dict[str, float] = {}
    for name in dict.fromkeys(row["haystack"] for row in rows):
        here = [row for row in rows if row["haystack"] == name and not row["refused"]]
        exact, indexed = here[0], here[1:]
        figures |= {f"right_exact_{name}": exact["right"], f"ms_exact_{name}": exact["ms"]}
        good = sorted(
            (row for row in indexed if row["captured_mass"] >= 0.99), key=lambda row: row["ms"] / row["ms_exact"]
        )
        if good:
            best = good[0]
            figures |= {
                f"right_at_99_mass_{name}": best["right"],
                f"ms_at_99_mass_{name}": best["ms"],
                f"speedup_at_99_mass_{name}": best["ms_exact"] / best["ms"],
            }
    return figures


def picture(report: Report) -> Figure:
    """Answers right by captured mass, a line for each index; of the haystack whose answers the model knows best."""
    from model_worker.evaluation.pictures import Axis, Line, lines

    exact = {row["haystack"]: row["right"] for row in report.rows if row.get("setting") == EXACT.name}
    name = max(exact, key=lambda one: float(exact[one]))
    here = [row for row in report.rows if row["haystack"] == name and not row["refused"]]
    indexed = [row for row in here if row["setting"] != EXACT.name]
    if not indexed:
        raise InvalidArgument("there is no picture without an index that the service builds")
    series = []
    for index in dict.fromkeys(row["index"] for row in indexed):
        rows = sorted((row for row in indexed if row["index"] == index), key=lambda row: float(row["captured_mass"]))
        series.append(Line(index, [row["captured_mass"] for row in rows], [row["right"] for row in rows]))
    facts = (
        f"{report.settings['model']}, {HAYSTACKS[name]}, {here[0]['tokens']:,} tokens, {here[0]['asked']} questions, "
        f"top {report.settings['top_k']}; dotted: exact search"
    )
    return lines(
        series, Axis("softmax mass captured, of the exact top k's", "percent"),
        Axis("answers right", "percent", lowest=-0.02, highest=1.04), "What approximate search costs", facts,
        level=exact[name],
    )  # fmt: skip
