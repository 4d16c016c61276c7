"""Jobs on a cluster say what they say in one process."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from memory_service import FailedPrecondition, InvalidArgument, Unavailable
from model_worker.cli.evaluate_job import StudyJob
from model_worker.cli.passkey_job import Opening, open_parts
from model_worker.deployment import runtime, trials
from model_worker.deployment.pool import Crew, Pool
from model_worker.deployment.runtime import connect
from model_worker.deployment.training import train
from model_worker.evaluation import passkey
from model_worker.evaluation.asking import Asking
from model_worker.evaluation.place import Place
from model_worker.evaluation.subject import Settings
from model_worker.settings import Recall
from model_worker.training import snapshots
from model_worker.training.metrics import Row
from model_worker.training.run import train as train_here
from tests.deployment.doubler import Doubler, refuse
from tests.deployment.nodes import RayNodes
from tests.model_worker.trainings import small

pytestmark = pytest.mark.timeout(900)  # Workers start in seconds, but on a machine that is full in minutes.

CREW = Crew(2, 2, cpus=0.5)
TIMES = ("prefill_s", "answer_s", "seconds", "prefill_tokens_per_s", "encoded_per_s", "index_s")


def untimed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in TIMES}


class Heard(passkey.Unwatched):
    """What a watcher was told."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.filled = 0
        self.ended: list[int] = []

    def begins(self, trial: Any, tokens: int) -> None:
        self.begun.append(trial.number)

    def fills(self, tokens: int) -> None:
        self.filled += tokens

    def ends(self, outcome: Any) -> None:
        self.ended.append(outcome.trial.number)


def test_passkeys_are_asked_and_found_as_in_one_process(ray_cluster: RayNodes) -> None:
    plan = passkey.Plan((700, 1500), trials=3, depths=3)
    opening = Opening("reference", ":memory:", Asking(), None, {}, None, "cpu", 1, None, None, False)
    with ExitStack() as stack:
        parts = opening.parts(plan, stack)
        expected = passkey.run(plan, parts.questions, parts.asker, settings=parts.settings)
    heard = Heard()
    with connect() as cluster:
        make = partial(trials.PasskeyWorker, partial(open_parts, opening, plan))
        report = trials.run(plan, make, CREW, cluster, heard)
    assert [untimed(one) for one in report.trials] == [untimed(one) for one in expected.trials]
    assert [untimed(one) for one in report.rows] == [untimed(one) for one in expected.rows]
    assert report.settings == expected.settings
    assert report.figures["accuracy"] == 1.0
    assert sorted(heard.begun) == sorted(heard.ended) == list(range(6))
    assert heard.filled == sum(one["tokens_in_memory"] for one in expected.trials)


STUDIES: dict[str, dict[str, Any]] = {
    "lookup": {"lengths": (700, 1400), "questions": 4},  # Its steps are spread.
    "dense": {"haystacks": ("lookup",), "lengths": (1024,), "top_k": (4,), "questions": 4},  # Runs as a whole.
}


@pytest.mark.slow
@pytest.mark.parametrize("study", ["lookup", "dense"])
def test_a_study_finds_what_it_finds_in_one_process(ray_cluster: RayNodes, study: str) -> None:
    settings = Settings(Recall(top_k=32 if study == "lookup" else 0), Place())
    job = StudyJob(study, ("lookup",), settings, 1, {**STUDIES[study], "seed": 0})
    expected = job.run_here(lambda *_: None)
    said: list[tuple[int, int]] = []
    report = job.run_on_ray(lambda done, total, _: said.append((done, total)), None, "1-2", 0.5)
    assert [untimed(one) for one in report.rows] == [untimed(one) for one in expected.rows]
    assert report.settings.keys() == {*expected.settings, "ray"}
    assert said and {total for _, total in said} == {2 if study == "lookup" else said[0][1]}


def test_a_directory_is_refused_for_it_cannot_be_shared() -> None:
    job = StudyJob("lookup", ("lookup",), Settings(place=Place("./here")), 1, {})
    with pytest.raises(InvalidArgument, match="cannot share the memory"):
        job.run_on_ray(lambda *_: None, None, None, None)


class Steps:
    """A watcher that keeps what it hears, and asks for an end after so many steps."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.rows: list[Row] = []
        self.saves: list[int] = []
        self._most = most

    def began(self, *_: object) -> None:
        pass

    def stepped(self, row: Row) -> None:
        self.rows.append(row)

    def passed(self, *_: object) -> None:
        pass

    def saved(self, step: int) -> None:
        self.saves.append(step)

    def stop(self) -> bool:
        return len(self.rows) >= self._most


@pytest.mark.slow
# Ray Train copies the context of Ray Data, whose own deprecations warn when they are copied.
@pytest.mark.filterwarnings("ignore:.* deprecated:DeprecationWarning")
def test_one_process_of_ray_train_trains_the_same_model(ray_cluster: RayNodes, tmp_path: Path) -> None:
    alone = train_here(small(tmp_path / "alone", threads=1))
    steps = Steps()
    with connect():
        result = train(small(tmp_path / "ray", threads=1), Crew(cpus=0.5), watcher=steps, stop=steps.stop)
    assert (result.steps, result.finished, result.level) == (alone.steps, True, alone.level)
    assert [row.step for row in steps.rows] == list(range(1, 11)) and steps.saves == [10]
    expected, found = (load_file(one.model / "model.safetensors") for one in (alone, result))
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* deprecated:DeprecationWarning")
def test_two_processes_stop_when_asked_and_go_on(ray_cluster: RayNodes, tmp_path: Path) -> None:
    told = small(tmp_path / "ray", threads=1, steps=400)
    steps = Steps(most=3)
    with connect():
        first = train(told, Crew(2, 2, cpus=0.5), watcher=steps, stop=steps.stop)
        assert not first.finished and snapshots.read(told.out).step == first.steps
        with pytest.raises(FailedPrecondition, match="holds a training already"):
            train(told, Crew(cpus=0.5))
        second = train(told, Crew(2, 2, cpus=0.5), resume=True)
    assert second.finished and second.steps == 400 and first.steps < 400


def test_a_pool_grows_to_its_work_and_gives_every_answer_once(ray_cluster: RayNodes) -> None:
    with connect() as cluster, Pool(Doubler, Crew(1, 3, cpus=0.1), cluster) as pool:
        heard: list[int] = []
        answers = dict(pool.run(range(1, 200), lambda _, what: heard.append(what)))
        assert answers == {one: 2 * one for one in range(1, 200)}
        assert sorted(heard) == list(range(1, 200))
        with pytest.raises(InvalidArgument, match="-3 is negative"):
            list(pool.run([1, -3]))


def test_what_a_worker_cannot_open_is_told_as_it_was_raised(ray_cluster: RayNodes) -> None:
    with (
        connect() as cluster,
        Pool(refuse, Crew(1, 1, cpus=0.1), cluster) as pool,
        pytest.raises(InvalidArgument, match="there is no such model"),
    ):
        pool.wait()


@pytest.mark.slow
def test_a_task_that_kills_its_workers_is_told_as_such(ray_cluster: RayNodes) -> None:
    with (
        connect() as cluster,
        Pool(Doubler, Crew(1, 1, cpus=0.1), cluster) as pool,
        pytest.raises(Unavailable, match="workers died at the same task, 0"),
    ):
        list(pool.run([0]))


def test_what_is_wrong_with_a_cluster_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="host:port of its head"):
        runtime._dial("head")
    with pytest.raises(Unavailable, match="no Ray cluster answers at"):
        runtime._dial("127.0.0.1:1")
    monkeypatch.setattr(runtime, "find_spec", lambda _: None)
    with pytest.raises(FailedPrecondition, match=r"pip install 'fot-memory\[ray\]'"):
        runtime.need_ray()


def test_crews_are_at_least_one_worker() -> None:
    with pytest.raises(InvalidArgument, match="got 3-2"):
        Crew(3, 2)
