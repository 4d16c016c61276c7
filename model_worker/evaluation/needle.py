"""`fot eval needle`: a pass key at every depth of haystacks of several kinds and lengths.

The trials are those of `fot passkey` (Landmark Attention's prompt, greedy, every token of the key must be right), in
four haystacks: the prompt's own five sentences over and over, real prose, real code, random words. Every trial has its
own key, haystack and memory; depths are spread evenly over the trials, each drawn within its own stretch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memory_service import Engine
from memory_service.errors import InvalidArgument
from model_worker.evaluation import passkey
from model_worker.evaluation.asking import Asking, MemoryAsker, Store
from model_worker.evaluation.report import Column, Report, number, percent, size
from model_worker.evaluation.subject import Subject, Tell
from model_worker.evaluation.trials import Outcome, Question
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
) -> Report:
    """Find keys in every filler at every length. Raises InvalidArgument."""
    recall = subject.settings.recall
    store = Store.DOCUMENTS if recall.engine == Engine.INDEX else Store.SESSION
    asker = MemoryAsker(
        subject.base, subject.trained, subject.client, Asking(store, recall.top_k, recall.engine, recall.search), "eval"
    )
    plans = [passkey.Plan(tuple(lengths), trials, depths, filler=_filler(one), seed=seed) for one in fillers]
    if not plans:
        raise InvalidArgument("this study needs at least one filler")
    rows: list[dict[str, Any]] = []
    watcher = _Watcher(tell, trials * len(lengths) * len(plans))
    for plan in plans:
        questions = plan.questions(subject.tokenizer, subject.trained.last_context_length)
        watcher.filler = plan.filler
        report = passkey.run(plan, questions, asker, watcher)
        # Of every length, its depths and then all of them together.
        for first in range(0, len(report.rows), depths + 1):
            *bands, whole = report.rows[first : first + depths + 1]
            rows.append({"filler": str(plan.filler), **whole, "depths": [dict(band) for band in bands]})
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


class _Watcher(passkey.Unwatched):
    """Tells how many trials are done."""

    def __init__(self, tell: Tell, trials: int):
        self.filler = ""
        self._tell, self._trials, self._done, self._found = tell, trials, 0, 0

    def begins(self, question: Question) -> None:
        words = f"{self.filler}, {size(question.trial.tokens)} tokens, depth {question.trial.depth:.0%}"
        self._tell(self._done, self._trials, f"{words} · {self._found} of {self._done} found")

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
