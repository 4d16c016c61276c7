"""`fot eval needle`: a pass key at every depth of haystacks of several kinds and lengths.

The trials are those of `fot passkey` (Landmark Attention's prompt, greedy, every token of the key must be right), in
four haystacks: the prompt's own five sentences over and over, real prose, real code, random words. Every trial has its
own key, haystack and memory; depths are spread evenly over the trials, each drawn within its own stretch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from memory_service import Engine
from memory_service.errors import InvalidArgument
from model_worker.evaluation import passkey
from model_worker.evaluation.asking import Asking, MemoryAsker, Store
from model_worker.evaluation.report import Column, Report, number, percent, size
from model_worker.evaluation.steps import Each, InTurn, Say
from model_worker.evaluation.subject import Subject, Tell
from model_worker.evaluation.trials import Outcome, Trial
from model_worker.evaluation.wilson import Share
from model_worker.tasks.fillers import Filler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = (4096, 16_384, 65_536)
TRIALS, DEPTHS = 10, 5
COLUMNS = (
    Column("filler"), Column("tokens", form=size), Column("found"), Column("trials", "of"),
    Column("accuracy", form=percent), Column("interval", "95 % interval"),
    Column("prefill_tokens_per_s", "tokens/s into memory", lambda value: number(float(value))),
    Column("key_mass", "mass on the key", percent),
)  # fmt: skip


def run(
    subject: Subject,
    *,
    fillers: Sequence[str] = tuple(Filler),
    lengths: Sequence[int] = LENGTHS,
    trials: int = TRIALS,
    depths: int = DEPTHS,
    seed: int = 0,
    tell: Tell = lambda *_: None,
    each: Each | None = None,
) -> Report:
    """Find keys in every filler at every length. Raises InvalidArgument."""
    plans = [passkey.Plan(tuple(lengths), trials, depths, filler=_filler(one), seed=seed) for one in fillers]
    if not plans:
        raise InvalidArgument("this study needs at least one filler")
    each = each or InTurn([subject], tell)
    steps = [replace(plan, lengths=(tokens,)) for plan in plans for tokens in sorted(lengths)]
    rows: list[dict[str, Any]] = list(each(_row, steps))
    share = sum((Share(row["found"], row["trials"]) for row in rows), Share(0, 0))
    figures = {"accuracy": share.value, "low": share.low, "high": share.high, "trials": share.trials}
    figures |= {f"accuracy_{row['filler']}_{row['tokens']}": row["accuracy"] for row in rows}
    settings = {
        **subject.told(), "fillers": list(fillers), "lengths": list(lengths), "trials": trials, "depths": depths,
        "seed": seed,
    }  # fmt: skip
    return Report("needle", __doc__ or "", settings, rows, figures)


def _filler(name: str) -> Filler:
    try:
        return Filler(name)
    except ValueError:
        raise InvalidArgument(f"a filler is one of {', '.join(Filler)}, got {name!r}") from None


def _row(subjects: Sequence[Subject], plan: passkey.Plan, say: Say) -> dict[str, Any]:
    """One filler at one length, and its depths."""
    (subject,) = subjects
    recall = subject.settings.recall
    store = Store.DOCUMENTS if recall.engine == Engine.INDEX else Store.SESSION
    asking = Asking(store, recall.top_k, recall.engine, recall.search)
    asker = MemoryAsker(subject.base, subject.trained, subject.client, asking, "eval")
    questions = plan.questions(subject.tokenizer, subject.trained.last_context_length)
    report = passkey.run(plan, questions, asker, _Watcher(say, plan.filler))
    *bands, whole = report.rows
    return {"filler": str(plan.filler), **whole, "depths": [dict(band) for band in bands]}


class _Watcher(passkey.Unwatched):
    """Says which trial begins, and what was found until then."""

    def __init__(self, say: Say, filler: str):
        self._say, self._filler, self._done, self._found = say, filler, 0, 0

    def begins(self, trial: Trial, tokens: int) -> None:
        words = f"{self._filler}, {size(trial.tokens)} tokens, depth {trial.depth:.0%}"
        self._say(f"{words} · {self._found} of {self._done} found")

    def ends(self, outcome: Outcome) -> None:
        self._done += 1
        self._found += int(outcome.found)


def picture(report: Report) -> Figure:
    """The grid, the fillers' lengths side by side."""
    from model_worker.evaluation.pictures import Cell, grid

    cells = [
        Cell(f"{row['filler']}\n{size(row['tokens'])}", band["depth"], band["found"], band["trials"])
        for row in report.rows
        for band in row["depths"]
    ]
    facts = f"{report.settings['model']}, {report.figures['trials']:.0f} trials"
    return grid(cells, "Pass keys in four haystacks", facts, x="haystack and tokens")
