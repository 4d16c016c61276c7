"""The main job: how many passkeys a model finds, by length of the prompt and depth of the key.

Protocol (Landmark Attention, arXiv 2305.16300, as LongLLaMA's authors ran it, arXiv 2307.03170): a task sentence, a
haystack of five sentences over and over, somewhere in it "The pass key is N. Remember it. N is the pass key.", and at
the end "What is the pass key? The pass key is". The model goes on greedily for as many tokens as N has, and every one
must be right. The haystack may be of any length. Depths are spread evenly over the trials, each drawn within its own
stretch; every trial has its own key and a memory of its own. Distractors are documents beside the prompt that hold
other keys under other labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from memory_service.errors import InvalidArgument
from model_worker.evaluation.asking import Asker
from model_worker.evaluation.questions import DISTRACTOR_TOKENS, Questions, Wording
from model_worker.evaluation.report import Column, Report, nbytes, number, percent, size
from model_worker.evaluation.trials import Asked, Band, Outcome, Question, Trial, bands_of, trials_of
from model_worker.evaluation.wilson import Share
from model_worker.tasks.fillers import Filler
from model_worker.tasks.tokens import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDY = "passkey"
MOST_TOKENS = 1 << 30
WHOLE = "0–100 %"  # All depths together.
_SURE = 4096  # Tokens of a prompt that has room for any label.


@dataclass(frozen=True, slots=True)
class Plan:
    """What is tried."""

    lengths: tuple[int, ...] = (262_144,)  # Tokens of the prompts.
    trials: int = 20  # Of each length.
    depths: int = 10  # Stretches of depth that are told apart.
    wording: Wording = Wording.PLAIN
    distractors: int = 0
    filler: Filler = Filler.LANDMARK
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or len(set(self.lengths)) != len(self.lengths):
            raise InvalidArgument(f"lengths must be distinct, and at least one, got {list(self.lengths)}")
        if not all(1 <= one <= MOST_TOKENS for one in self.lengths):
            raise InvalidArgument(f"a prompt has 1 to {MOST_TOKENS:,} tokens, got {list(self.lengths)}")
        if self.trials < 1 or self.depths < 1:
            raise InvalidArgument(f"trials and depths must be ≥ 1, got {self.trials} and {self.depths}")
        if self.depths > self.trials:
            raise InvalidArgument(
                f"{self.trials} trials cannot show {self.depths} depths: give at least as many trials as depths"
            )
        if self.distractors < 0 or self.seed < 0:
            raise InvalidArgument(f"distractors and seed must be ≥ 0, got {self.distractors} and {self.seed}")

    @property
    def tokens(self) -> int:
        """Tokens of all trials together, distractors among them."""
        return self.trials * sum(tokens + self.distractors * DISTRACTOR_TOKENS for tokens in self.lengths)

    def asked(self) -> Iterator[Trial]:
        """The trials, short ones first."""
        return trials_of(self.lengths, self.trials, self.seed)

    def questions(self, tokenizer: Tokenizer, window: int) -> Questions:
        """What makes this plan's prompts, of which the last `window` tokens are read at once.

        Raises InvalidArgument if its shortest prompts cannot be made.
        """
        made = Questions(tokenizer, window, self.wording, self.filler, self.distractors)
        for trial in trials_of((min(self.lengths),), self.trials, self.seed):
            made.question(trial)
            if trial.tokens > _SURE:  # Labels differ by a few tokens: only short prompts may have no room for some.
                break
        return made


@dataclass(frozen=True, slots=True)
class Parts:
    """What asks a plan's questions."""

    questions: Questions
    asker: Asker
    settings: Mapping[str, Any]  # Of model and memory, for the report.


class Watcher(Protocol):
    """Hears how the job goes on."""

    def begins(self, trial: Trial, tokens: int) -> None:
        """A trial begins that puts so many tokens into memory; on a cluster while others are under way."""

    def fills(self, tokens: int) -> None:
        """So many more tokens stand in memory."""

    def ends(self, outcome: Outcome) -> None:
        """A trial ended."""


class Unwatched:
    """Hears nothing."""

    def begins(self, trial: Trial, tokens: int) -> None:
        pass

    def fills(self, tokens: int) -> None:
        pass

    def ends(self, outcome: Outcome) -> None:
        pass


def run(
    plan: Plan,
    questions: Questions,
    asker: Asker,
    watcher: Watcher | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Report:
    """Ask every question of the plan; `settings` of model and memory go into the report, for `picture` among others."""
    watcher = watcher or Unwatched()
    started = time.perf_counter()
    outcomes = []
    for question in _ahead(plan.asked(), questions.question):
        watcher.begins(question.trial, question.tokens)
        outcomes.append(outcome_of(question, questions, asker, watcher.fills))
        watcher.ends(outcomes[-1])
    return report_of(plan, outcomes, time.perf_counter() - started, settings)


def outcome_of(question: Question, questions: Questions, asker: Asker, fills: Callable[[int], None]) -> Outcome:
    """Ask one question; `fills` hears how many more tokens stand in memory."""
    started = time.perf_counter()
    asked: Asked = asker.ask(question, fills)
    return Outcome(
        trial=question.trial,
        tokens=len(question.ids),
        key=question.key,
        label=question.label,
        said=questions.text(asked.ids),
        found=asked.ids == question.answer,
        asked=asked,
        seconds=time.perf_counter() - started,
    )


def report_of(
    plan: Plan, outcomes: Sequence[Outcome], seconds: float, settings: Mapping[str, Any] | None = None
) -> Report:
    """What came of all trials of the plan, in `seconds`."""
    bands = bands_of(outcomes, plan.depths)
    return Report(
        study=STUDY,
        protocol=__doc__ or "",
        settings={**asdict(plan), **(settings or {})},
        rows=[row for length in _lengths(bands) for row in _rows(length)],
        figures=_figures(outcomes, seconds),
        trials=[one.row() for one in outcomes],
    )


def shares(report: Report) -> dict[int, Share]:
    """What was found, by length."""
    return {row["tokens"]: Share(row["found"], row["trials"]) for row in report.rows if row["depth"] == WHOLE}


def columns() -> list[Column]:
    """How the report's rows are shown."""
    return [
        Column("tokens", form=size),
        Column("depth", form=lambda depth: "all" if depth == WHOLE else str(depth)),
        Column("score", "found"),
        Column("accuracy", form=percent),
        Column("interval", "95 %"),
        Column("prefill_tokens_per_s", "tokens/s", _rate),
        Column("bytes", "memory", nbytes),
        Column("seconds", "s", lambda seconds: f"{seconds:.1f}"),
        Column("key_mass", "on key", percent),
    ]


def title(report: Report) -> str:
    """Passkeys found: 20 of 20 (100.0 %, 83.9–100.0)"""
    share = sum(shares(report).values(), Share(0, 0))
    return f"Passkeys found: {share.found} of {share.trials}, {share}"


def picture(report: Report) -> Figure:
    """Accuracy by length and depth."""
    from model_worker.evaluation.pictures import Cell, grid

    settings = report.settings
    bands = [row for row in report.rows if row["depth"] != WHOLE or settings["depths"] == 1]
    cells = [Cell(size(row["tokens"]), row["depth"], row["found"], row["trials"]) for row in bands]
    way = f"top {settings['top_k']}, {settings['engine']}" if settings["top_k"] else "every key"
    facts = [Path(settings["model"]).name, way, f"{settings['store']} at {settings['memory']}"]
    if settings["distractors"]:
        facts.append(f"{settings['distractors']} documents with other keys")
    return grid(cells, title(report), "  ·  ".join(facts), "tokens of the prompt")


def _ahead(trials: Iterator[Trial], make: Callable[[Trial], Question]) -> Iterator[Question]:
    """Questions, each made in a thread while the one before is asked."""
    with ThreadPoolExecutor(1, "fot-questions") as pool:
        waiting: Future[Question] | None = None
        for trial in chain(trials, [None]):
            ready = waiting
            waiting = None if trial is None else pool.submit(make, trial)
            if ready is not None:
                yield ready.result()


def _lengths(bands: Sequence[Band]) -> list[list[Band]]:
    return [[band for band in bands if band.tokens == tokens] for tokens in sorted({band.tokens for band in bands})]


def _rows(bands: Sequence[Band]) -> list[dict[str, Any]]:
    """A length's rows; the last is all of them together."""
    return [*(one.row() for one in bands), _whole(bands).row()]


def _whole(bands: Sequence[Band]) -> Band:
    """All depths of a length together."""
    return Band(bands[0].tokens, 0.0, 1.0, tuple(one for band in bands for one in band.outcomes))


def _rate(tokens_per_s: float) -> str:
    return number(tokens_per_s) if math.isnan(tokens_per_s) else f"{tokens_per_s:,.0f}"


def _figures(outcomes: Sequence[Outcome], seconds: float) -> dict[str, float]:
    share = Share(sum(one.found for one in outcomes), len(outcomes))
    prefill_s = sum(one.asked.prefill_s for one in outcomes)
    return {
        "accuracy": share.value,
        "low": share.low,
        "high": share.high,
        "trials": share.trials,
        "tokens": max(one.tokens for one in outcomes),
        "prefill_tokens_per_s": round(sum(one.asked.tokens for one in outcomes) / prefill_s, 1) if prefill_s else 0.0,
        "seconds": round(seconds, 3),
    }
