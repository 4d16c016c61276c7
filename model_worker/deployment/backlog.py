"""Tasks on their way to workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, eq=False)
class Job:
    """A task on its way."""

    task: Any
    attempts: int = 0


class Backlog:
    """Tasks that wait: those to be done again, then those that come."""

    def __init__(self, tasks: Iterable[Any]):
        self._tasks = iter(tasks)
        self._jobs: deque[Job] = deque()

    @property
    def more(self) -> bool:
        """Whether a task waits; draws one to know."""
        if not self._jobs:
            for task in self._tasks:
                self._jobs.append(Job(task))
                break
        return bool(self._jobs)

    def take(self) -> Job | None:
        """The next, if there is one."""
        return self._jobs.popleft() if self.more else None

    def give_back(self, job: Job) -> None:
        """It is the next again."""
        self._jobs.appendleft(job)
