"""An ingest that is killed loses nothing that was stored, and the next one brings every file exactly once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from memory_service import Memory
from memory_service.cli import app
from model_worker.decoder.model import FotModel
from model_worker.settings import Read, Recall
from tests.model_worker.tiny import byte_tokenizer, save_tiny_llama

PACKAGES = ("json", "concurrent")
SEGMENTS = 3  # Files of the memory when the process is killed: some documents are committed, most are not.


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the Python standard library, with empty files as it has them."""
    library = tmp_path_factory.mktemp("crash") / "Lib"
    for package in PACKAGES:
        source = Path(sysconfig.get_path("stdlib")) / package
        shutil.copytree(source, library / package, ignore=shutil.ignore_patterns("__pycache__"))
    (library / "empty.py").touch()
    return library


@pytest.fixture(scope="module")
def model(library: Path) -> Path:
    return save_tiny_llama(library.parent / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def killed(library: Path, model: Path) -> int:
    """How many documents were there after `fot ingest` was killed in the middle of its work."""
    process = subprocess.Popen(
        [sys.executable, "-m", "memory_service.cli", *arguments(library, model)],
        env={name: value for name, value in os.environ.items() if not name.startswith("FOT_")},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while process.poll() is None and len(list(target(library).rglob("*.safetensors"))) < SEGMENTS:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL, "it had ended before it was killed"
    finally:
        process.kill()
        process.wait(30)
    with Memory.open(target(library)) as memory:
        return len(list(memory.documents()))


@pytest.fixture(scope="module")
def resumed(library: Path, model: Path, killed: int) -> dict[str, object]:
    """What the second run says it did."""
    answer = CliRunner().invoke(app, [*arguments(library, model), "--json"], catch_exceptions=False)
    assert answer.exit_code == 0
    return dict(json.loads(answer.stdout))


@pytest.fixture
def memory(library: Path, resumed: dict[str, object]) -> Iterator[Memory]:
    with Memory.open(target(library)) as memory:
        yield memory


def target(library: Path) -> Path:
    return library.parent / "memory"


def arguments(library: Path, model: Path) -> list[str]:
    return [
        "ingest", str(library), "--model", str(model), "--memory", str(target(library)), "--mem-layers", "1",
        "--threads", "1",
    ]  # fmt: skip


def files(library: Path) -> list[str]:
    return sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py"))


def test_the_second_run_encodes_only_what_was_not_stored(
    library: Path, killed: int, resumed: dict[str, object]
) -> None:
    assert 0 < killed < len(files(library))
    assert (resumed["unchanged"], resumed["added"], resumed["replaced"]) == (killed, len(files(library)) - killed, 0)


def test_every_file_is_there_exactly_once_and_complete(library: Path, memory: Memory) -> None:
    stored = list(memory.documents())
    assert [one.id for one in stored] == files(library)
    tokenizer = byte_tokenizer()
    for one in stored:
        ids = memory.fetch(one.id, 1, 0, one.tokens).token_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == (library / one.id).read_text(encoding="utf-8")


@pytest.mark.usefixtures("resumed")
def test_docs_ls_lists_every_file(library: Path) -> None:
    answer = CliRunner().invoke(app, ["docs", "ls", "default", "--target", str(target(library))])
    listed = [line.split()[0] for line in answer.stdout.splitlines() if ".py" in line]
    assert listed == files(library)


def test_a_query_restricted_by_metadata_touches_only_those_documents(
    library: Path, model: Path, memory: Memory
) -> None:
    touched: set[str] = set()

    def note(read: Read) -> None:
        assert read.attended.attribution is not None
        touched.update(one.source for one in read.attended.attribution)

    recall = Recall(where="name = __init__.py and size < 3000", attribution=True, on_read=note)
    expected = {
        name for name in files(library) if name.endswith("/__init__.py") and (library / name).stat().st_size < 3000
    }
    with FotModel.from_pretrained(model, memory=memory, mem_layers=(1,)) as decoder:
        decoder(torch.tensor([[0, *(byte + 4 for byte in b"import json")]]), recall=recall)
    assert {one for one in touched if not one.startswith("session:")} == expected
    assert len(expected) > 1
