"""`fot eval ruler`: RULER's synthetic tasks (Hsieh et al. 2024, arXiv 2404.06654) through the memory.

Needles (one; one of four keys; one of nothing but keys; four values; four questions), variable chains, common words and
frequent words, as `model_worker.tasks.ruler` writes them. A prompt is encoded into one document of a memory, but for
its end, which holds the question and stays in the window; the model goes on greedily for twice as many tokens as the
answers have, and 16. Scored as RULER does: the share of the answers that stand in what it said, in any order and case;
the share of all answers of a task's samples with its 95 % Wilson interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from memory_service.errors import InvalidArgument
from model_worker.evaluation.report import Column, Report, percent, size
from model_worker.evaluation.steps import Each, InTurn, Say
from model_worker.evaluation.subject import Library, Subject, Tell
from model_worker.evaluation.wilson import Share
from model_worker.tasks.ruler import Example, Task, example

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS = tuple(str(task) for task in Task)
LENGTHS = (4096, 16_384)
SAMPLES = 5
MORE_TOKENS = 16  # To be said beyond twice the answers.
COLUMNS = (
    Column("task"), Column("length", "tokens", size), Column("samples"), Column("score", form=percent),
    Column("low", "95 % from", percent), Column("high", "to", percent), Column("whole", "all answers found", percent),
)  # fmt: skip


def run(
    subject: Subject,
    *,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    tell: Tell = lambda *_: None,
    each: Each | None = None,
) -> Report:
    """Ask `samples` prompts of each task and length. Raises InvalidArgument for an unknown task or a short length."""
    chosen = [_task(name) for name in tasks]
    if samples < 1 or not lengths or not chosen:
        raise InvalidArgument("this study needs at least one task, one length and one sample")
    each = each or InTurn([subject], tell)
    steps = [(task, tokens) for tokens in sorted(lengths) for task in chosen]
    rows: list[dict[str, Any]] = list(each(partial(_row, samples=samples, seed=seed), steps))
    figures = {f"score_{row['task']}_{row['length']}": row["score"] for row in rows}
    for tokens in sorted(lengths):
        figures[f"score_{tokens}"] = sum(row["score"] for row in rows if row["length"] == tokens) / len(chosen)
    settings = {**subject.told(), "tasks": chosen, "lengths": list(lengths), "samples": samples, "seed": seed}
    return Report("ruler", __doc__ or "", settings, rows, figures)


def _row(subjects: Sequence[Subject], step: tuple[Task, int], say: Say, *, samples: int, seed: int) -> dict[str, Any]:
    """One task at one length."""
    (subject,), (task, tokens) = subjects, step
    say(f"{task}, {size(tokens)} tokens")
    rng = Random(f"{seed} {task} {tokens}")
    examples = [example(task, subject.tokenizer, tokens, rng) for _ in range(samples)]
    outputs = list(_outputs(subject, examples))
    scores = [one.score(output) for one, output in zip(examples, outputs, strict=True)]
    answers = sum(len(one.answers) for one in examples)
    share = Share(round(sum(score * len(one.answers) for score, one in zip(scores, examples, strict=True))), answers)
    return {
        "task": str(task), "length": tokens, "samples": samples, "score": share.value, "low": share.low,
        "high": share.high, "whole": sum(score == 1 for score in scores) / samples,
        "said": [
            {"answers": list(one.answers), "output": output, "score": score}
            for one, output, score in zip(examples, outputs, scores, strict=True)
        ],
    }  # fmt: skip


def _task(name: str) -> Task:
    try:
        return Task(name)
    except ValueError:
        raise InvalidArgument(f"a task is one of {', '.join(Task)}, got {name!r}") from None


def _outputs(subject: Subject, examples: Sequence[Example]) -> Iterator[str]:
    """What the model says to each prompt."""
    with subject.library() as library:
        texts = subject.tokenizer.encode_many([one.prompt for one in examples])
        budgets = [2 * len(subject.tokenizer.encode(", ".join(one.answers))) + MORE_TOKENS for one in examples]
        kept = [max(subject.window // 2, subject.window - budget) for budget in budgets]
        documents = {f"prompt-{number}": ids[: -kept[number]] for number, ids in enumerate(texts)}
        library.put({name: ids for name, ids in documents.items() if ids})
        for number, (one, ids) in enumerate(zip(examples, texts, strict=True)):
            here = [f"prompt-{number}"] if documents[f"prompt-{number}"] else []
            yield _output(subject, library, one, ids[-kept[number] :], here, budgets[number])


def _output(
    subject: Subject, library: Library, one: Example, ids: Sequence[int], documents: Sequence[str], budget: int
) -> str:
    # More words cannot lower a score that is whole already.
    (found,) = library.generate([ids], budget, documents, lambda said: one.score(subject.tokenizer.decode(said)) == 1)
    return subject.tokenizer.decode(found)


def picture(report: Report) -> Figure:
    """The score of every task, a bar for each length."""
    from model_worker.evaluation.pictures import Axis, Bars, bars

    tasks = list(dict.fromkeys(row["task"] for row in report.rows))
    series = []
    for tokens in dict.fromkeys(row["length"] for row in report.rows):
        rows = [row for row in report.rows if row["length"] == tokens]
        low, high = [row["low"] for row in rows], [row["high"] for row in rows]
        series.append(Bars(f"{size(tokens)} tokens", [row["score"] for row in rows], low, high))
    facts = f"{report.settings['model']}, {report.settings['samples']} prompts a bar, 95 % Wilson intervals"
    names = [task.replace("_", "\n") for task in tasks]
    y = Axis("answers found", "percent", lowest=0.0, highest=1.12, marks=(0, 0.25, 0.5, 0.75, 1))
    return bars(names, series, y, "RULER's synthetic tasks", facts)
