"""`fot eval distraction`: how much of the memory's attention reaches the right document among d of them.

The distraction issue of the Focused Transformer (arXiv 2307.03170, section 3.3): a model that never saw other documents
in training spreads its attention over all of them alike, so the right one gets r_d ≈ 1/d. Cross-batch training is meant
to keep r_d high. Give --model twice or more to compare models trained with and without negatives.

There are `documents` documents of equal length, encoded each on its own. For every d = 1, 2, 4, … they are split into
sets of d; each document of a set is the right one once, so every d has as many measurements. r_d is the softmax mass on
the right document over that on all d (the memory's own attribution, mean over heads), taken at the queries that predict
the answer; 95 % bootstrap intervals. Two kinds:

    keys   each document is real text with one labelled pass key; asked is the key of one document
    text   each document is what stands before a window of a held-out file; asked is the window, token by token, as in
           the paper, where the right document is the text's own past
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

from memory_service.errors import FailedPrecondition, InvalidArgument
from model_worker.evaluation.bootstrap import mean_of
from model_worker.evaluation.haystacks import KEYS, Cloze, asking, cloze_of
from model_worker.evaluation.report import Column, Report, percent
from model_worker.evaluation.steps import Each, InTurn, Say
from model_worker.evaluation.subject import Answer, Library, Subject, Tell
from model_worker.tasks.corpus import Kind, Split, Text, texts
from model_worker.tasks.labels import Labels, stated_twice
from model_worker.tasks.parts import text_of
from model_worker.tasks.tokens import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCUMENTS, TOKENS = 64, 512
_LONG = 16  # Tokens: more is a text whose tokens count, not an answer that is right or wrong.
KINDS = ("keys", "text")
COLUMNS = (
    Column("model"), Column("kind"), Column("documents"), Column("r_d", form=percent),
    Column("low", "95 % from", percent), Column("high", "to", percent), Column("uniform", "1/d", percent),
    Column("memory_share", "memory's share", percent), Column("right", "answers right", percent),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A document and the question whose answer it holds."""

    document: Sequence[int]
    question: Cloze


def run(
    subjects: Sequence[Subject],
    *,
    documents: int = DOCUMENTS,
    tokens: int = TOKENS,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    found: Sequence[Text] | None = None,
    tell: Tell = lambda *_: None,
    each: Each | None = None,
) -> Report:
    """Measure every model at every d; `documents` must be a power of two, `tokens` is each one's length.

    `found` are the texts, by default this machine's held-out code. Raises InvalidArgument, FailedPrecondition.
    """
    if documents < 1 or documents & (documents - 1):
        raise InvalidArgument(f"documents must be a power of two, so that it splits into equal sets, got {documents}")
    if not subjects or tokens < 1 or not kinds or set(kinds) - set(KINDS):
        raise InvalidArgument(f"this study needs a model, at least one token, and kinds of {', '.join(KINDS)}")
    each = each or InTurn(subjects, tell)
    names = _names(subjects)
    steps = [(at, name, kind) for at, name in enumerate(names) for kind in kinds]
    work = partial(_rows, documents=documents, tokens=tokens, seed=seed, found=found)
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    for (_, name, kind), more in zip(steps, each(work, steps), strict=True):
        rows += more
        figures[f"r_{documents}_{kind}" + (f"_{name}" if len(subjects) > 1 else "")] = rows[-1]["r_d"]
    settings = {
        "models": [one.told() for one in subjects], "documents": documents, "tokens": tokens, "kinds": list(kinds),
        "seed": seed,
    }  # fmt: skip
    return Report("distraction", __doc__ or "", settings, rows, figures)


def _rows(
    subjects: Sequence[Subject],
    step: tuple[int, str, str],
    say: Say,
    *,
    documents: int,
    tokens: int,
    seed: int,
    found: Sequence[Text] | None,
) -> list[dict[str, Any]]:
    """One model and kind, at every d."""
    at, name, kind = step
    say(f"{name}: {kind}")
    files = texts(Split.HELD_OUT, Kind.CODE) if found is None else found
    make = _keys if kind == "keys" else _windows
    cases = make(subjects[at], files, documents, tokens, Random(f"{seed} {kind}"))
    with subjects[at].library() as library:
        library.put({_id(number): case.document for number, case in enumerate(cases)})
        sizes = [1 << power for power in range(documents.bit_length())]
        return [{"model": name, "kind": kind, **_measure(library, cases, one, seed)} for one in sizes]


def picture(report: Report) -> Figure:
    """r_d by d, a line for each model and kind, and 1/d."""
    from model_worker.evaluation.pictures import Axis, Line, lines

    series = []
    for name, kind in dict.fromkeys((row["model"], row["kind"]) for row in report.rows):
        rows = [row for row in report.rows if (row["model"], row["kind"]) == (name, kind)]
        low, high = [row["low"] for row in rows], [row["high"] for row in rows]
        words = {"keys": "labelled keys", "text": "next tokens of code"}[kind]
        series.append(Line(f"{name}: {words}", [r["documents"] for r in rows], [r["r_d"] for r in rows], low, high))
    sizes = sorted({row["documents"] for row in report.rows})
    series.append(Line("1/d: spread alike", sizes, [1 / size for size in sizes], dashed=True))
    facts = f"{report.settings['tokens']} tokens a document, {report.settings['documents']} measurements a point, 95 %"
    return lines(
        series, Axis("documents in memory, d", "tokens", log=True, marks=sizes),
        Axis("mass on the right document, r_d", "percent", lowest=0.0, highest=1.04), "Distraction", facts,
    )  # fmt: skip


def _measure(library: Library, cases: Sequence[Case], size: int, seed: int) -> dict[str, Any]:
    """All cases, in sets of `size` documents."""
    masses, shares, right = [], [], []
    recall = replace(library.model.recall, attribution=True)
    for first in range(0, len(cases), size):
        members = range(first, first + size)
        answers = library.ask([cases[one].question for one in members], [_id(one) for one in members], recall)
        for one, answer in zip(members, answers, strict=True):
            masses.append(positive_mass(answer, _id(one)))
            shares.append(fmean(float(read.share.mean()) for read in answer.reads))
            right.append(fmean(answer.right) if len(answer.right) > _LONG else float(answer.exact))
    mean = mean_of(masses, seed=seed)
    return {
        "documents": size,
        "r_d": mean.value,
        "low": mean.low,
        "high": mean.high,
        "uniform": 1 / size,
        "memory_share": fmean(shares),
        "right": fmean(right),
    }


def positive_mass(answer: Answer, document: str) -> float:
    """r_d of one answer: the share of the memory's mass that this document got, mean over the memory layers."""
    found = []
    for read in answer.reads:
        masses = {one.source: one.mass for one in read.attended.attribution or ()}
        found.append(masses.get(document, 0.0) / sum(masses.values()))
    return fmean(found)


def _id(number: int) -> str:
    return f"document-{number}"


def _names(subjects: Sequence[Subject]) -> list[str]:
    """A name for each; those of equal folders get a number."""
    names = [one.name for one in subjects]
    return [name if names.count(name) == 1 else f"{name} {names[:at].count(name) + 1}" for at, name in enumerate(names)]


# --- Documents and questions ----------------------------------------------------------------------------------------


def _keys(subject: Subject, files: Sequence[Text], documents: int, tokens: int, rng: Random) -> list[Case]:
    """Real text with one labelled pass key at a random place."""
    labels = Labels(rng, held_out=True)
    cases = []
    for text in _passages(subject.tokenizer, files, documents, tokens, rng):
        label, key = labels.draw(), str(rng.randint(*KEYS))
        line = subject.tokenizer.encode(text_of(stated_twice(label, key)))
        if len(line) > tokens:
            raise InvalidArgument(
                f"a line with a key has {len(line)} tokens, a document only {tokens}: give more --tokens"
            )
        at = rng.randint(0, tokens - len(line))
        question = cloze_of(subject.tokenizer, asking(label, key))
        cases.append(Case([*text[:at], *line, *text[at : tokens - len(line)]], question))
    return cases


def _windows(subject: Subject, files: Sequence[Text], documents: int, tokens: int, rng: Random) -> list[Case]:
    """What stands before a window, and the window."""
    cases = []
    for text in _passages(subject.tokenizer, files, documents, tokens + subject.window, rng):
        cases.append(Case(text[:tokens], Cloze(text[tokens : tokens + 1], text[tokens + 1 :])))
    return cases


def _passages(
    tokenizer: Tokenizer, files: Sequence[Text], count: int, tokens: int, rng: Random
) -> Iterator[Sequence[int]]:
    """So many passages of so many tokens, of as many files as there are; later ones of a file do not overlap."""
    encoded = [ids for ids in tokenizer.encode_many([one.text for one in files]) if len(ids) >= tokens]
    rng.shuffle(encoded)
    cut = [ids[turn * tokens : (turn + 1) * tokens] for turn in range(count) for ids in encoded]
    whole = [one for one in cut if len(one) == tokens][:count]
    if len(whole) < count:
        raise FailedPrecondition(
            f"the held-out files of this machine hold only {len(whole)} passages of {tokens} tokens, not {count}: "
            "give fewer --documents or --tokens"
        )
    yield from whole
