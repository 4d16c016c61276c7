"""The passkey job by many workers: each holds the model and asks trials; what came of them makes one report.

A trial's prompt follows from the plan's seed and its own number, so the questions are the same for any number of
workers, and a trial whose worker died is asked again as it was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from model_worker.deployment.pool import Crew, Pool
from model_worker.deployment.runtime import Cluster
from model_worker.deployment.worker import Tell
from model_worker.evaluation.passkey import Parts, Plan, Unwatched, Watcher, outcome_of, report_of
from model_worker.evaluation.report import Report
from model_worker.evaluation.trials import Outcome, Trial


@dataclass(frozen=True, slots=True)
class _Began:
    """A trial begins."""

    tokens: int
    settings: Mapping[str, Any]  # Of model and memory, as the worker opened them.


def run(
    plan: Plan,
    make: Callable[[], PasskeyWorker],
    crew: Crew,
    cluster: Cluster,
    watcher: Watcher | None = None,
) -> Report:
    """Ask every question of the plan, as `model_worker.evaluation.passkey.run`. Raises as that and as `Pool.run`."""
    watcher = watcher or Unwatched()
    settings: dict[str, Any] = {}
    outcomes: list[Outcome] = []

    def heard(trial: Trial, what: Any) -> None:
        if isinstance(what, _Began):
            settings.update(what.settings)
            watcher.begins(trial, what.tokens)
        else:
            watcher.fills(what)

    with Pool(make, crew, cluster) as pool:
        pool.wait()
        started = time.perf_counter()
        for _, outcome in pool.run(plan.asked(), heard):
            outcomes.append(outcome)
            watcher.ends(outcome)
        seconds = time.perf_counter() - started
    return report_of(plan, sorted(outcomes, key=lambda one: one.trial.number), seconds, settings)


class PasskeyWorker:
    """Asks trials, one at a time; the next one's prompt is made meanwhile."""

    def __init__(self, open_parts: Callable[[], Parts]):
        self._parts = open_parts()
        self._asking = threading.Lock()

    def work(self, trial: Trial, tell: Tell) -> Outcome:
        """One trial; tells that it begins and how many more tokens stand in memory."""
        parts = self._parts
        question = parts.questions.question(trial)
        with self._asking:
            tell(_Began(question.tokens, parts.settings))
            return outcome_of(question, parts.questions, parts.asker, tell)
