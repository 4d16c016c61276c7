"""Services and nodes that die while a model writes and a corpus comes in: nobody notices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from model_worker import reference
from model_worker.cli.ingest_job import Opening
from model_worker.decoder.model import FotModel
from model_worker.ingestion.intake import IngestReport
from model_worker.settings import Recall
from tests.deployment.nodes import RayNodes
from tests.deployment.test_ingest import counts, documents, plain
from tests.deployment.test_ingest import run as run_on_ray
from tests.deployment.traffic import kill, plan, reports, running, until, until_ready
from tests.model_worker.workers import QUESTION, with_key

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MODEL = reference.path("reference")
FILES = 150


def opening(target: str) -> Opening:
    return Opening(MODEL, target, "m", None, None, None, None, None, "cpu", 1, None, None, False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many texts, and one that hides a pass key."""
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    folder.mkdir()
    for number in range(FILES):
        (folder / f"{number:03}.txt").write_text(f"{number} is the number of this text. " * 60)
    return folder


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that hides a pass key, in a folder of its own."""
    folder = tmp_path_factory.mktemp("key") / "keys"
    folder.mkdir()
    (folder / "key.txt").write_text(with_key(4711))
    return folder


@dataclass(slots=True)
class Writing:
    """What a model wrote so far."""

    texts: int = 0
    failure: BaseException | None = None

    def more(self, texts: int = 2) -> None:
        """Wait until so many more texts were written, whole."""
        goal = self.texts + texts
        until(lambda: self.texts >= goal or self.failure is not None)
        assert self.failure is None, self.failure


@contextmanager
def writing(target: str) -> Iterator[Writing]:
    """A model that answers the same question over and over, its long prompt in a session and the key in a document."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompt = torch.tensor([tokenizer(f"{with_key(0).replace('pass key', 'colour') * 12} {QUESTION}").input_ids])
    done, ending = Writing(), threading.Event()

    def write() -> None:
        try:
            with FotModel.from_pretrained(MODEL, memory=target, name="m") as model:
                assert prompt.shape[1] > 3 * model.fot.window
                recall = Recall(documents=("key.txt",), top_k=32)
                while not ending.is_set():
                    told = model.generate(prompt, recall=recall, max_new_tokens=8, do_sample=False)
                    text = tokenizer.decode(told[0, prompt.shape[1] :])
                    assert text.startswith(" 4711"), text
                    done.texts += 1
        except BaseException as error:  # Whatever it is, the test fails with it rather than the thread.
            done.failure = error

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield done
    finally:
        ending.set()
        thread.join()
    assert done.failure is None, done.failure


def test_a_killed_service_and_a_lost_node_fail_no_answer_and_lose_and_double_no_document(
    ray_cluster: RayNodes, tmp_path: Path, corpus: Path, key: Path
) -> None:
    alone = opening(str(tmp_path / "alone"))
    expected = plain(corpus, alone)
    plain(key, alone)
    with ray_cluster.whole_again(), running(plan("works", tmp_path, shards=2, replicas=2)) as state:
        opened = opening("ray://works")
        assert plain(key, opened).added == 1
        killed: list[str] = []
        with writing("ray://works") as written:

            def lose(report: IngestReport) -> None:
                if report.stored >= 5 and not killed:
                    victim = next(one.report for one in state.copies if one.report and one.copy.replica == 0)
                    kill(victim)
                    killed.append("service")
                    written.more()
                    until_ready("works")
                if report.stored >= 60 and len(killed) == 1:
                    ray_cluster.remove("node-2")
                    killed.append("node")
                    written.more()

            written.more()
            report = run_on_ray(corpus, opened, on_progress=lose)
            until(lambda: all(one.node_name != "node-2" for one in reports("works")))
            until_ready("works")
            written.more()
        assert killed == ["service", "node"]
        assert counts(report) == counts(expected)
        assert documents(opened) == documents(alone)
