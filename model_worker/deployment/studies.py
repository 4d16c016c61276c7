"""Studies by many workers: a study's steps are spread over them; one without steps runs as a whole in one worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from model_worker.deployment.pool import Pool
from model_worker.deployment.worker import Tell
from model_worker.evaluation.report import Report
from model_worker.evaluation.steps import Work
from model_worker.evaluation.subject import Subject
from model_worker.evaluation.subject import Tell as TellSteps


class StudyTask(NamedTuple):
    """A step and what does it."""

    number: int
    work: Work
    step: Any

    def __str__(self) -> str:
        return f"step {self.number + 1}"


class StudyWorker:
    """Does steps with the models it holds, one at a time."""

    def __init__(self, open_subjects: Callable[[], Sequence[Subject]]):
        self._subjects = open_subjects()
        self._working = threading.Lock()

    def work(self, task: StudyTask, tell: Tell) -> Any:
        """One step; tells what it says."""
        with self._working:
            return task.work(self._subjects, task.step, tell)


class Spread:
    """`Each` over a pool of study workers."""

    def __init__(self, pool: Pool[StudyTask, Any], tell: TellSteps):
        self._pool, self._tell = pool, tell

    def __call__(self, work: Work, steps: Sequence[Any]) -> Iterator[Any]:
        """The outcomes, once all are there: steps end in any order."""
        outcomes: dict[int, Any] = {}

        def heard(_: StudyTask, words: str) -> None:
            self._tell(len(outcomes), len(steps), words)

        for task, outcome in self._pool.run([StudyTask(n, work, step) for n, step in enumerate(steps)], heard):
            outcomes[task.number] = outcome
        for number in range(len(steps)):
            yield outcomes[number]


def whole(pool: Pool[StudyTask, Any], study: Callable[[TellSteps], Report], tell: TellSteps) -> Report:
    """A study in one worker; `study` is what a name stands for, or `partial` of it."""
    tasks = [StudyTask(0, _whole, study)]
    ((_, report),) = list(pool.run(tasks, lambda _, told: tell(*told)))
    found: Report = report
    return found


def _whole(_: Sequence[Subject], study: Callable[[TellSteps], Report], say: Tell) -> Report:
    return study(lambda done, total, words: say((done, total, words)))
