"""`fot eval dense`: attention to every key against exact top-k, as the memory grows. Is exact top-k a denoiser?

One haystack of each length is encoded once and kept as one document; every question is asked over it with top_k = 1, 4,
16, 64, 256 and densely (a softmax over every key in memory). Two haystacks:

    keys     the Landmark prompt's filler with labelled pass keys spread evenly, all of them asked
    lookup   a JSON object of UUID pairs, keys spread evenly are asked (∞-Bench's Retrieve.KV)

Told are greedy accuracy with 95 % Wilson intervals, the probability of the answer's tokens, and the captured mass: the
top k's share of the dense softmax mass, mean over heads and the queries that predict the answer, in the first memory
layer, whose queries do not depend on what memory answers. The engine is exact throughout: nothing here is approximate
but the k itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memory_service import AttendOptions, Engine
from memory_service.errors import InvalidArgument
from model_worker.evaluation.haystacks import HAYSTACKS, haystack_of
from model_worker.evaluation.report import Column, Report, percent
from model_worker.evaluation.subject import Library, Queries, Subject, Tell
from model_worker.evaluation.wilson import Share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = (4096, 16_384, 65_536)
TOP_K = (1, 4, 16, 64, 256)
QUESTIONS = 32
_APART = 1.03  # Between the lines of a picture, as a factor along its axis.
COLUMNS = (
    Column("haystack"), Column("tokens"), Column("attends to"), Column("asked"), Column("right", form=percent),
    Column("low", "95 % from", percent), Column("high", "to", percent), Column("tokens_right", form=percent),
    Column("captured_mass", form=percent),
)  # fmt: skip


def run(
    subject: Subject,
    *,
    haystacks: Sequence[str] = tuple(HAYSTACKS),
    lengths: Sequence[int] = LENGTHS,
    top_k: Sequence[int] = TOP_K,
    questions: int = QUESTIONS,
    seed: int = 0,
    tell: Tell = lambda *_: None,
) -> Report:
    """Ask every haystack with every k and densely. Raises InvalidArgument."""
    if questions < 1 or not lengths or any(one < 1 for one in top_k):
        raise InvalidArgument(
            "this study needs a length, a question, and top_k of at least 1; dense is always measured"
        )
    rows: list[dict[str, Any]] = []
    cases = [(name, tokens) for name in haystacks for tokens in sorted(lengths)]
    for number, (name, tokens) in enumerate(cases):
        tell(number, len(cases), f"{name}, {tokens:,} tokens")
        haystack = haystack_of(
            name,
            subject.tokenizer,
            tokens,
            questions,
            Random(f"{seed} {name} {tokens}"),
            subject.trained.last_context_length,
        )
        with subject.library() as library:
            library.put({"haystack": haystack.ids})
            asked = library.queries(haystack.questions)
            for k in (*sorted(set(top_k)), 0):
                recall = replace(library.model.recall, top_k=k, engine=Engine.EXACT)
                answers = library.ask(haystack.questions, recall=recall)
                right = Share(sum(one.exact for one in answers), len(answers))
                each = [token for one in answers for token in one.right]
                rows.append(
                    {
                        "haystack": name,
                        "length": tokens,
                        "tokens": len(haystack.ids),
                        "top_k": k,
                        "attends to": f"top {k}" if k else "all",
                        "asked": right.trials,
                        "right": right.value,
                        "low": right.low,
                        "high": right.high,
                        "tokens_right": sum(each) / len(each),
                        "captured_mass": captured_mass(library, asked, k),
                    }
                )
    longest = max(lengths)
    figures = {
        f"{what}_{row['haystack']}_{'top_' + str(row['top_k']) if row['top_k'] else 'dense'}_{longest}": row[what]
        for row in rows
        if row["length"] == longest
        for what in ("right", "captured_mass")
    }
    settings = {
        **subject.told(), "haystacks": list(haystacks), "lengths": list(lengths), "top_k": list(top_k),
        "questions": questions, "seed": seed, "engine": "exact",
    }  # fmt: skip
    return Report("dense", __doc__ or "", settings, rows, figures)


def captured_mass(library: Library, asked: Sequence[Queries], top_k: int) -> float:
    """The exact top k's share of the dense softmax mass, mean over heads and queries; 1 if k covers everything."""
    if not top_k:
        return 1.0
    best = library.attend(asked, AttendOptions(top_k=top_k, engine=Engine.EXACT))
    whole = library.attend(asked, AttendOptions())
    masses: list[Tensor] = []
    for few, every in zip(best, whole, strict=True):
        masses.append((few.lse - every.lse).exp().clamp(max=1.0).flatten())
    return float(torch.cat(masses).mean())


def picture(report: Report) -> Figure:
    """Accuracy by length, a line for each k; of the haystack whose choice of k matters most."""
    from model_worker.evaluation.pictures import Axis, Line, lines

    def telling(name: str) -> tuple[float, float]:
        found = [float(row["right"]) for row in report.rows if row["haystack"] == name]
        return max(found) - min(found), max(found)

    name = max(dict.fromkeys(row["haystack"] for row in report.rows), key=telling)
    here = [row for row in report.rows if row["haystack"] == name]
    choices = list(dict.fromkeys(row["top_k"] for row in here))
    series = []
    for number, k in enumerate(choices):
        rows = [row for row in here if row["top_k"] == k]
        low, high = [row["low"] for row in rows], [row["high"] for row in rows]
        # Side by side, or equal answers would hide each other.
        x = [row["length"] * _APART ** (number - (len(choices) - 1) / 2) for row in rows]
        words = f"top {k}" if k else "every key (dense)"
        series.append(Line(words, x, [row["right"] for row in rows], low, high, dashed=not k))
    facts = (
        f"{report.settings['model']}, {HAYSTACKS[name]}, {here[0]['asked']} questions a point, 95 % Wilson intervals"
    )
    lengths = sorted({row["length"] for row in here})
    return lines(
        series, Axis("tokens in memory", "tokens", log=True, marks=lengths),
        Axis("answers right", "percent", lowest=-0.02, highest=1.04), "Dense attention against exact top-k", facts,
    )  # fmt: skip
