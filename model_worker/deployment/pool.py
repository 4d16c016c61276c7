"""Worker actors between a least and a most number, fed with tasks: who dies is replaced, and its tasks are done again.

A worker holds a model, which takes seconds to open, so workers stay while there are tasks. Each is given two at a time:
while it computes on one it prepares the other. No more tasks are drawn than workers have room for, so slow workers slow
down who makes the tasks. What a worker tells while it works comes back at once. Ray places the workers, notices their
deaths and, where a cluster grows by itself, sees the demand of those that wait for a place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError

from memory_service.errors import FailedPrecondition, Internal, InvalidArgument, Unavailable
from model_worker.deployment.backlog import Backlog, Job
from model_worker.deployment.runtime import Cluster
from model_worker.deployment.worker import AT_ONCE, Worker, WorkerActor

ATTEMPTS = 3  # Of a task whose workers die: maybe it kills them.
STARTS = 3  # Of workers in a row that die before they are open.
IDLE_S = 10.0  # Then a worker beyond the least goes.
OPEN_S = 900.0  # To wait for the first worker: a cluster may have to start a machine, and a model takes a while.
_SAY_S = 60.0  # Then it is said that none is open.
_TURN_S = 1.0

Task = TypeVar("Task")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Crew:
    """How many workers, and what each takes of its node."""

    least: int = 1
    most: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise InvalidArgument(f"there is at least 1 worker, and MIN ≤ MAX, got {self.least}-{self.most}")
        if self.cpus < 0 or self.gpus < 0:
            raise InvalidArgument(f"a worker takes 0 or more CPUs and GPUs, got {self.cpus:g} and {self.gpus:g}")

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")

    def told(self, cluster: Cluster) -> dict[str, Any]:
        """For a report."""
        return {"nodes": cluster.nodes, "workers": [self.least, self.most], "cpus": self.cpus, "gpus": self.gpus}

    @property
    def threads(self) -> int:
        """Threads that a worker's model may use."""
        return max(1, int(self.cpus))


class _Event(NamedTuple):
    """Something a worker said of a job, or, with `lost`, that the job is to be done again."""

    job: Job
    kind: str  # told, done or lost
    what: Any = None


@dataclass(slots=True, eq=False)
class _Place:
    """A worker as its driver sees it."""

    actor: Any
    opening: Any  # A reference until the worker is open, then None.
    jobs: dict[Any, Job] = field(default_factory=dict)  # By the stream that what they tell comes in.
    idle_since: float = field(default_factory=time.monotonic)


class Pool(Generic[Task, Answer]):
    """Workers that `make` opens on the nodes of a cluster. Use `with`, or `close` it."""

    def __init__(self, make: Callable[[], Worker[Task, Answer]], crew: Crew, cluster: Cluster):
        """`make` runs in the workers. Raises FailedPrecondition if a cluster of this machine has no room for one."""
        self._make, self._crew = make, crew
        self._places: list[_Place] = []
        self._failed_starts = 0  # In a row.
        self._ever = self._said = False  # Whether any worker was open; whether it was said that none is.
        self._begun = time.monotonic()
        if cluster.ours and (crew.cpus > cluster.cpus or crew.gpus > cluster.gpus):
            here = f"{cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs"
            raise FailedPrecondition(f"a worker needs {crew}, but this machine has {here}")
        for _ in range(crew.least):
            self._start()

    def wait(self) -> None:
        """Until the least number of workers is open. Raises as `run`."""
        while sum(one.opening is None for one in self._places) < self._crew.least:
            self._turn()
            self._fit(more=False)

    def run(
        self, tasks: Iterable[Task], heard: Callable[[Task, Any], None] = lambda *_: None
    ) -> Iterator[tuple[Task, Answer]]:
        """Every task with its answer, as they are ready; `heard` gets what a worker tells of a task meanwhile.

        Raises what a worker raises, Unavailable for a task that no worker survives and if no worker can be placed,
        Internal for a defect.
        """
        backlog = Backlog(tasks)
        while True:
            while (place := self._roomiest()) is not None and (job := backlog.take()) is not None:
                job.attempts += 1
                place.jobs[place.actor.work.options(num_returns="streaming").remote(job.task)] = job
            if not backlog.more and not any(one.jobs for one in self._places):
                return
            self._fit(backlog.more)
            for job, kind, what in self._turn():
                if kind == "told":
                    heard(job.task, what)
                elif kind == "done":
                    yield job.task, what
                else:
                    backlog.give_back(job)

    def close(self) -> None:
        """End all workers at once. Harmless twice."""
        for place in [*self._places]:
            self._end(place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # --- Workers come and go ---

    def _start(self) -> None:
        # A worker that dies is replaced here rather than by Ray, which would do its tasks again behind our back.
        options = {"num_cpus": self._crew.cpus, "num_gpus": self._crew.gpus, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(WorkerActor).options(max_restarts=0, max_concurrency=AT_ONCE + 1, **options).remote()
        self._places.append(_Place(actor, actor.open.remote(self._make, self._crew.threads)))

    def _end(self, place: _Place) -> None:
        self._places.remove(place)
        if ray.is_initialized():
            ray.kill(place.actor)

    def _roomiest(self) -> _Place | None:
        """The open worker with the fewest tasks, if it has room."""
        places = [one for one in self._places if one.opening is None and len(one.jobs) < AT_ONCE]
        return min(places, key=lambda one: len(one.jobs), default=None)

    def _fit(self, more: bool) -> None:
        """Start a worker if tasks wait for one, end one that has had nothing to do for a while."""
        now = time.monotonic()
        for place in self._places:
            if place.jobs or place.opening is not None:
                place.idle_since = now
        wanted = self._crew.least
        busy = all(one.opening is None and len(one.jobs) >= AT_ONCE for one in self._places)
        if more and busy:
            wanted = min(len(self._places) + 1, self._crew.most)
        while len(self._places) < wanted:
            self._start()
        idle = [one for one in self._places if now - one.idle_since > IDLE_S]
        for place in idle[: max(0, len(self._places) - self._crew.least)]:
            self._end(place)

    # --- What workers say ---

    def _turn(self) -> list[_Event]:
        """What is heard next; nothing if all are silent for a second."""
        speaking = {one: place for place in self._places for one in (place.opening, *place.jobs) if one is not None}
        ready, _ = ray.wait([*speaking], num_returns=1, timeout=_TURN_S)
        if not ready:
            self._check_place()
            return []
        (one,) = ready
        place = speaking[one]
        try:
            return self._opened(place) if one is place.opening else self._heard(place, one)
        except RayTaskError as error:
            raise Internal(f"a worker failed: {_last(error)}") from error
        except (RayActorError, WorkerCrashedError, ObjectLostError) as error:
            return self._lost(place, error)

    def _opened(self, place: _Place) -> list[_Event]:
        failure = ray.get(place.opening)
        if failure is not None:
            raise failure
        place.opening = None
        self._ever, self._failed_starts = True, 0
        return []

    def _heard(self, place: _Place, stream: Any) -> list[_Event]:
        job = place.jobs[stream]
        said = ray.get(next(stream))
        kind, what = said[-1]
        if kind == "failed":
            raise what
        if kind == "done":
            del place.jobs[stream]
        return [_Event(job, *one) for one in said]

    def _lost(self, place: _Place, error: Exception) -> list[_Event]:
        """A worker died, or nobody can tell: it is ended, and what it had is done again."""
        if place.opening is not None:
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                raise Unavailable(f"{STARTS} workers died while they started: {_last(error)}") from None
        for job in place.jobs.values():
            if job.attempts >= ATTEMPTS:
                raise Unavailable(f"{ATTEMPTS} workers died at the same task, {job.task}: {_last(error)}") from None
        self._end(place)
        return [_Event(job, "lost") for job in place.jobs.values()]

    def _check_place(self) -> None:
        waited_s = time.monotonic() - self._begun
        if self._ever or waited_s < _SAY_S:
            return
        words = f"no worker is open after {waited_s:.0f} s; each needs {self._crew} that are free on a node"
        if waited_s > OPEN_S:
            raise Unavailable(words)
        if not self._said:
            self._said = True
            logging.getLogger(__name__).warning("%s", words)


def _last(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
