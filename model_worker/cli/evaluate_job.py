"""A study as the command line tells it, run in this process or by workers on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_worker.cli.crew import address_of, check_own_or_shared, crew_of, model_of, token_of
from model_worker.cli.opening import checkpoint_of, quiet

if TYPE_CHECKING:
    from model_worker.evaluation.report import Report
    from model_worker.evaluation.steps import Each
    from model_worker.evaluation.subject import Settings, Subject, Tell

COMPARING = ("distraction",)  # Studies that take several models.
STEPPED = ("distraction", "lookup", "needle", "ruler")  # Studies whose steps do not depend on each other.


@dataclass(frozen=True, slots=True)
class StudyJob:
    """A study, its models, and what it is told."""

    study: str
    models: tuple[str, ...]
    settings: Settings
    threads: int | None
    options: Mapping[str, Any]

    def run_here(self, tell: Tell) -> Report:
        """In this process."""
        with ExitStack() as stack:
            return self._run(self._subjects(stack), tell)

    def run_on_ray(self, tell: Tell, address: str | None, workers: str | None, cpus: float | None) -> Report:
        """By workers: its steps spread over them, or the whole of it in one."""
        from model_worker.deployment.runtime import connect

        target = self.settings.place.target
        check_own_or_shared(target)
        place = replace(self.settings.place, token=token_of(self.settings.place.token))
        models = tuple(model_of(one) for one in self.models)
        job = replace(self, models=models, settings=replace(self.settings, place=place))
        address = address_of(address, target)
        if self.study not in STEPPED:
            return alone(job.run_here, tell, address, cpus)
        with connect(address) as cluster, ExitStack() as stack:
            from model_worker.deployment.pool import Pool
            from model_worker.deployment.studies import Spread, StudyWorker

            crew = crew_of(workers, cpus, None, cluster)
            with Pool(partial(StudyWorker, job.subjects), crew, cluster) as pool:
                report = self._run(self._subjects(stack), tell, Spread(pool, tell))
        return replace(report, settings={**report.settings, "ray": crew.told(cluster)})

    def subjects(self) -> list[Subject]:
        """The models, open until the process ends."""
        return self._subjects(ExitStack())

    def _subjects(self, stack: ExitStack) -> list[Subject]:
        directories = [checkpoint_of(name) for name in self.models]
        # Torch takes a second to import; a wrong path should not.
        import torch

        from model_worker.evaluation.subject import Subject

        quiet()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return [stack.enter_context(Subject.open(Path(one), self.settings)) for one in directories]

    def _run(self, subjects: list[Subject], tell: Tell, each: Each | None = None) -> Report:
        job = import_module(f"model_worker.evaluation.{self.study}")
        studied = subjects if self.study in COMPARING else subjects[0]
        spread = {} if each is None else {"each": each}
        report: Report = job.run(studied, **self.options, tell=tell, **spread)
        return report


def alone(study: Callable[[Tell], Report], tell: Tell, address: str | None, cpus: float | None) -> Report:
    """A whole study in one worker on a cluster, where the cores are."""
    from model_worker.deployment.runtime import connect

    with connect(address) as cluster:
        from model_worker.deployment.pool import Pool
        from model_worker.deployment.studies import StudyWorker, whole

        crew = crew_of(None, cpus, None, cluster, tasks=1)
        with Pool(partial(StudyWorker, tuple), crew, cluster) as pool:
            report = whole(pool, study, tell)
    return replace(report, settings={**report.settings, "ray": crew.told(cluster)})
