"""A corpus gets into a memory once through workers on a cluster, whoever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from memory_service import AlreadyExists, DocumentInfo, InvalidArgument, Memory
from memory_service.bench.harness import served
from model_worker.cli.ingest_job import Opening, open_parts
from model_worker.corpus import Choice, Notes, Reading, read
from model_worker.corpus.source import Note
from model_worker.deployment.ingest import Corpus, IngestWorker, batches_of, ingest
from model_worker.deployment.pool import Crew
from model_worker.deployment.runtime import connect
from model_worker.ingestion.ingest import ingest as ingest_here
from model_worker.ingestion.intake import IngestReport, settings_of
from tests.deployment.nodes import ROOT, RayNodes
from tests.model_worker.tiny import save_tiny_llama

pytestmark = pytest.mark.timeout(900)  # Workers start in seconds, but on a machine that is full in minutes.

FILES = 160


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("service") / "data") as address:
        yield address


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 2 KB in a folder, with an empty one that has no text and one that is no text."""
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    folder.mkdir()
    for number in range(FILES):
        (folder / f"{number:03}.txt").write_text(f"{number} is the number of this text. " * 60)
    (folder / "rows.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "three"}\n')
    (folder / "picture.bin").write_bytes(bytes(range(256)))
    return folder


def opening(model: Path, target: str, name: str) -> Opening:
    return Opening(str(model), target, name, (1,), None, None, None, None, "cpu", 1, None, None, False)


def run(
    folder: Path,
    opened: Opening,
    *,
    crew: Crew | None = None,
    workers_read: bool = False,
    notes: Notes | None = None,
    belongs: bool = False,
    on_progress: object = None,
) -> IngestReport:
    notes = notes or Notes()
    make = partial(IngestWorker, partial(open_parts, opened), Reading(), request=opened.name)
    batches = batches_of(Corpus((folder,), Choice(), Reading(), workers_read=workers_read), notes)
    with connect() as cluster:
        return ingest(
            batches, make, crew or Crew(cpus=0.5), cluster, memory=opened.memory, notes=notes,
            belongs=(lambda _: True) if belongs else None, on_progress=on_progress or (lambda _: None),  # type: ignore[arg-type]
        )  # fmt: skip


def plain(folder: Path, opened: Opening) -> IngestReport:
    from contextlib import ExitStack

    notes = Notes()
    with ExitStack() as stack:
        parts = opened.parts(stack, lambda _: None)
        return ingest_here(
            read([folder], note=notes), parts.encoder, parts.tokenizer, parts.memory,
            settings=settings_of(parts.encoder), notes=notes,
        )  # fmt: skip


def documents(opened: Opening) -> list[DocumentInfo]:
    """What a memory holds, apart from when it was stored and in which order."""
    with opened.memory() as memory:
        return [replace(one, generation=0, committed_at=0.0) for one in memory.documents()]


def counts(report: IngestReport) -> IngestReport:
    """A report apart from how long it took."""
    return replace(report, seconds=0.0)


@pytest.fixture(scope="module")
def expected(corpus: Path, model: Path, target: str) -> tuple[IngestReport, list[DocumentInfo]]:
    """What the plain ingest says and stores."""
    opened = opening(model, target, "plain")
    return plain(corpus, opened), documents(opened)


Expected = tuple[IngestReport, list[DocumentInfo]]


@pytest.mark.slow
@pytest.mark.parametrize("workers_read", [False, True])
def test_workers_report_and_store_what_one_process_does(
    ray_cluster: RayNodes, corpus: Path, model: Path, target: str, expected: Expected, workers_read: bool
) -> None:
    opened = opening(model, target, f"workers-{workers_read}")
    report = run(corpus, opened, crew=Crew(1, 2, cpus=0.5), workers_read=workers_read)
    assert counts(report) == counts(expected[0])
    assert documents(opened) == expected[1]


def test_every_document_is_stored_once_though_a_worker_and_a_node_are_killed(
    ray_cluster: RayNodes, corpus: Path, model: Path, target: str, expected: Expected
) -> None:
    opened = opening(model, target, "killed")
    killed: list[str] = []

    def kill(report: IngestReport) -> None:
        if report.stored >= 5 and not killed:
            os.kill(workers(ray_cluster)[0].pid, signal.SIGKILL)
            killed.append("worker")
        if report.stored >= 70 and len(killed) == 1:
            ray_cluster.remove("node-2")
            killed.append("node")

    try:
        report = run(corpus, opened, crew=Crew(3, 3, cpus=1.0), on_progress=kill)
    finally:
        if "node-2" not in ray_cluster.nodes:
            ray_cluster.add("node-2")
    assert killed == ["worker", "node"]
    assert counts(report) == counts(expected[0])
    assert documents(opened) == expected[1]
    with opened.memory() as memory:
        # A memory counts its commits: none was made twice.
        assert sorted(one.generation for one in memory.documents()) == list(range(1, FILES + 3))


def workers(nodes: RayNodes) -> list[psutil.Process]:
    return [one for one in nodes.processes if one.name().startswith("ray::WorkerActor")]


@pytest.mark.slow
def test_a_killed_driver_is_gone_on_from(
    ray_cluster: RayNodes, corpus: Path, model: Path, target: str, expected: Expected
) -> None:
    opened = opening(model, target, "driver")
    command = ["ingest", str(corpus), "--model", str(model), "--memory", target, "--name", "driver"]
    options = ["--mem-layers", "1", "--ray", "--address", ray_cluster.address, "--workers", "1"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(
        [sys.executable, "-m", "memory_service.cli", *command, *options], env=environ, stderr=subprocess.PIPE
    )
    try:
        with Memory.open(target, "plain") as memory:
            spec = memory.spec
        with Memory.open(target, "driver", spec) as memory:
            until = time.monotonic() + 90
            while memory.info().documents < 10 and driver.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
    finally:
        driver.kill()
        _, said = driver.communicate()
    before = len(documents(opened))
    assert 10 <= before < FILES, said.decode()
    report = run(corpus, opened)
    # Its workers end a moment after it, so that some documents more may have been stored.
    assert report.unchanged >= before and report.unchanged + report.added == FILES + 2
    assert documents(opened) == expected[1]
    with opened.memory() as memory:
        assert sorted(one.generation for one in memory.documents()) == list(range(1, FILES + 3))


@pytest.mark.slow
def test_a_second_run_stores_nothing_and_prunes_what_is_gone(
    ray_cluster: RayNodes, tmp_path: Path, model: Path, target: str
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("kept.txt", "gone.txt"):
        (folder / name).write_text(f"This is {name}.")
    opened = opening(model, target, "second")
    assert plain(folder, opened).added == 2
    (folder / "gone.txt").unlink()
    report = run(folder, opened, belongs=True)
    assert (report.unchanged, report.stored, report.removed) == (1, 0, 1)


@pytest.mark.slow
def test_what_is_not_ours_is_refused_as_by_one_process(
    ray_cluster: RayNodes, tmp_path: Path, model: Path, target: str, expected: Expected
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "000.txt").write_text("A text of the same name.")
    with pytest.raises(AlreadyExists, match="from texts, not from other"):
        run(other, opening(model, target, "plain"))


def test_a_limit_contradicts_workers_that_read() -> None:
    with pytest.raises(InvalidArgument, match="limit"):
        Corpus((), Choice(), Reading(), limit=1, workers_read=True)


def test_batches_hold_a_corpus_in_order_and_are_bounded(corpus: Path) -> None:
    notes: list[Note] = []
    batches = list(batches_of(Corpus((corpus,), Choice(), Reading()), notes.append))
    names = [source.id for batch in batches for source in batch.sources]
    assert names == [source.id for source in read([corpus])]
    assert len(batches) > 2 and max(len(batch.sources) for batch in batches) <= 64
    assert {one.why for one in notes} == {"is binary", "has no text"}
