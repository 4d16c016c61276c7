"""`fot train`: its progress, its end, being stopped and killed, and several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model_worker.cli import train as command
from model_worker.training import curves, metrics, snapshots
from model_worker.training.metrics import Row
from model_worker.training.run import train
from tests.command import Fot
from tests.model_worker.trainings import small

TOML = """
steps = 6
out = "{out}"
snapshot_every = 2
log_every = 3

[model]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 3
num_attention_heads = 2
max_position_embeddings = 36
tie_word_embeddings = true
vocab_size = 64

[fot]
mem_layers = [1]
window = 36

[optimizer]
warmup = 3

[data]
source = "dictionary"

[[level]]
max_steps = 4
shapes = [{{documents = 2, group = 2, window = 36}}]

[[level]]
earlier = 0.4
temperatures = [1.0, 0.5]
lr = 0.5
shapes = [
    {{documents = 2, group = 2, window = 36}},
    {{documents = 2, group = 2, window = 36, hard = 0.5}},
]
"""


@pytest.fixture
def fot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fot:
    monkeypatch.setattr(curves, "draw", lambda rows, place: place)
    return Fot(monkeypatch, capsys)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "train.toml"
    place.write_text(TOML.format(out=tmp_path / "out"))
    return place


def assert_same_weights(one: Path, other: Path) -> None:
    have, want = snapshots.read(one), snapshots.read(other)
    assert have.step == want.step
    for mine, theirs in ((have.weights, want.weights), (have.optimizers, want.optimizers)):
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


def test_a_training_tells_how_far_it_is_and_where_the_model_lies(fot: Fot, file: Path) -> None:
    done = fot("train", file, "--threads", 1)
    assert done.code == 0
    assert f"The model is in {file.parent / 'out' / 'model'}" in done.out.replace("\n", "")
    lines = done.err.splitlines()
    assert lines[0].endswith(f"parameters, 6 steps; {file.parent / 'out'}")
    assert lines[1].startswith("step 3/6  level 0  loss 4.") and "tokens/s" in lines[1] and "left" in lines[1]
    assert lines[2].startswith("level 1 after step 4: 4 steps are over")
    assert lines[3].startswith("step 6/6  level 1")
    assert len(metrics.read(file.parent / "out")) == 6


def test_a_signal_ends_the_training_after_its_step_and_the_message_resumes_it(
    fot: Fot, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fot("train", file, "--out", tmp_path / "straight")
    before = signal.getsignal(signal.SIGTERM)

    def stepped(self: command.Shown, row: Row) -> None:
        if row.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(command.Shown, "stepped", stepped)
        stopped = fot("train", file, "--threads", 1)
    assert stopped.code == 130
    said = " ".join(stopped.out.split())
    assert said.startswith("Stopped after 4 of 6 steps")
    again = said.partition("Go on with: fot ")[2].split()
    assert again == ["train", str(file), "--threads", "1", "--resume"]
    assert fot(*again).code == 0
    assert_same_weights(tmp_path / "out", tmp_path / "straight")
    assert signal.getsignal(signal.SIGTERM) == before


def test_mistakes_are_one_sentence(fot: Fot, file: Path, tmp_path: Path) -> None:
    assert "No such file" in fot("train", tmp_path / "none.toml").err
    file.write_text(file.read_text().replace("log_every", "log_evry"))
    done = fot("train", file)
    assert done.code != 0 and "did you mean log_every?" in done.err.replace("\n", " ")


@pytest.mark.slow  # Another process imports torch and transformers, and draws its curves at every snapshot.
def test_a_process_that_is_killed_at_any_moment_resumes_to_the_very_same_weights(file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "memory_service.cli", "train", str(file), "--threads", "1", "--steps", "4000"]
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL) as process:
        place = tmp_path / "out" / snapshots.NAME
        for _ in range(1200):
            if place.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.kill()  # SIGKILL, wherever it is: in a step, in a snapshot, in an export.
    assert process.returncode == -signal.SIGKILL
    reached = snapshots.read(tmp_path / "out").step
    assert reached >= 2
    # As far again as it came, in this process; and all at once, for comparison.
    stops = {"out": reached + 2, "straight": reached + 2}
    for name, last in stops.items():
        config = small(tmp_path / name, steps=4000)
        seen: list[int] = []
        train(
            config, resume=name == "out", on_step=lambda row, seen=seen: seen.append(row.step), stop=_after(last, seen)
        )
    assert_same_weights(tmp_path / "out", tmp_path / "straight")


def _after(last: int, seen: list[int]) -> Callable[[], bool]:
    return lambda: bool(seen) and seen[-1] >= last - 1


@pytest.mark.slow  # Two processes that each import torch and transformers.
def test_two_processes_train_the_model_that_one_with_twice_the_batches_does(file: Path, tmp_path: Path) -> None:
    arguments = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "memory_service.cli", "train", str(file)]
    subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True
    )
    train(small(tmp_path / "one", steps=6, accumulate=2))
    have, want = (snapshots.read(tmp_path / name) for name in ("out", "one"))
    assert have.tokens == want.tokens
    for name, tensor in want.weights.items():
        torch.testing.assert_close(have.weights[name], tensor, atol=1e-5, rtol=0)
