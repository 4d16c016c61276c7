"""`fot eval lookup`: UUID keys to UUID values, in the form of ∞-Bench's Retrieve.KV (Zhang et al. 2024).

One JSON object of random UUID pairs, as long as asked, is encoded once and kept as one document, but for its last
tokens: they and the benchmark's question are what a window reads of such a prompt at once (`last_context_length`).
Keys spread evenly over the object are asked, each question over the same memory; 36 characters must come back. A
record is right if greedy decoding gives its value to the last token; a token is right if it is the likeliest one after
the value's right tokens before it. The first token tells whether the record was found, the others whether it was
copied.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from memory_service.errors import InvalidArgument
from model_worker.evaluation.haystacks import uuid_haystack
from model_worker.evaluation.report import Column, Report, percent
from model_worker.evaluation.steps import Each, InTurn, Say
from model_worker.evaluation.subject import Subject, Tell
from model_worker.evaluation.wilson import Share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = (4096, 16_384, 32_768)
QUESTIONS = 100
COLUMNS = (
    Column("tokens"), Column("records"), Column("asked"), Column("records_right", form=percent),
    Column("low", "95 % from", percent), Column("high", "to", percent), Column("tokens_right", form=percent),
    Column("first_right", "first token", percent),
    Column("encoded_per_s", "tokens/s encoded"), Column("seconds"),
)  # fmt: skip


def run(
    subject: Subject,
    *,
    lengths: Sequence[int] = LENGTHS,
    questions: int = QUESTIONS,
    seed: int = 0,
    tell: Tell = lambda *_: None,
    each: Each | None = None,
) -> Report:
    """Ask at most `questions` keys at each length; a short object has fewer. Raises InvalidArgument."""
    if questions < 1 or not lengths:
        raise InvalidArgument("a look-up needs at least one length and one question")
    each = each or InTurn([subject], tell)
    rows = list(each(partial(_row, questions=questions, seed=seed), sorted(lengths)))
    figures = {}
    for row in rows:
        figures[f"records_right_{row['length']}"] = row["records_right"]
        figures[f"tokens_right_{row['length']}"] = row["tokens_right"]
    settings = {**subject.told(), "lengths": list(lengths), "questions": questions, "seed": seed}
    return Report("lookup", __doc__ or "", settings, rows, figures)


def _row(subjects: Sequence[Subject], tokens: int, say: Say, *, questions: int, seed: int) -> dict[str, Any]:
    """One length."""
    (subject,) = subjects
    say(f"{tokens:,} tokens")
    haystack = uuid_haystack(
        subject.tokenizer, tokens, questions, Random(f"{seed} {tokens}"), subject.trained.last_context_length
    )
    with subject.library() as library:
        library.put({"records": haystack.ids})
        started = time.perf_counter()
        answers = library.ask(haystack.questions)
        seconds = time.perf_counter() - started
        right = Share(sum(one.exact for one in answers), len(answers))
        each = [token for one in answers for token in one.right]
        return {
            "tokens": len(haystack.ids),
            "records": haystack.facts,
            "asked": len(answers),
            "records_right": right.value,
            "low": right.low,
            "high": right.high,
            "tokens_right": sum(each) / len(each),
            "first_right": sum(one.right[0] for one in answers) / len(answers),
            "encoded_per_s": library.tokens / library.encode_s,
            "seconds": seconds,
            "length": tokens,
        }


def picture(report: Report) -> Figure:
    """Records and tokens right by length."""
    from model_worker.evaluation.pictures import Axis, Line, lines

    x = [row["length"] for row in report.rows]

    def column(key: str) -> list[float]:
        return [float(row[key]) for row in report.rows]

    series = [
        Line("whole records", x, column("records_right"), column("low"), column("high")),
        Line("tokens", x, column("tokens_right"), dashed=True),
    ]
    facts = f"{report.settings['model']}, {report.rows[0]['asked']} keys a length, 95 % Wilson intervals"
    return lines(
        series, Axis("tokens of JSON in memory", "tokens", log=True),
        Axis("right", "percent", lowest=-0.02, highest=1.04), "UUID key → value look-up", facts,
    )  # fmt: skip
