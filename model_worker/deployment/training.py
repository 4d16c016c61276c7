"""A training on a cluster: Ray Train starts its processes, places them and starts them again when one dies.

Every process runs the same `train` as `fot train` does alone or under torchrun; the first writes the snapshots and the
model into the configuration's folder, which a restarted training reads, so all nodes must see it. What the first
process tells comes to the driver through an actor, and the wish to stop goes back by it.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from memory_service.errors import FotError, Internal
from model_worker.deployment.pool import Crew
from model_worker.training import snapshots
from model_worker.training.config import TrainConfig
from model_worker.training.metrics import Row
from model_worker.training.run import TrainResult, Watcher
from model_worker.training.run import train as train_here

RESTARTS = 3  # Of all processes, when one dies.
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class _Told:
    """What every process gets."""

    config: TrainConfig
    resume: bool
    mailbox: Any


def train(
    config: TrainConfig,
    crew: Crew,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train as `model_worker.training.run.train`, in `crew.most` processes on the cluster this process belongs to.

    `watcher` and `stop` are called in this thread. Raises as that, and Internal for a training that fails otherwise.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = replace(config, out=Path(os.path.abspath(config.out)))  # noqa: PTH100 - links keep their names
    mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()
    each = {"CPU": crew.cpus} | ({"GPU": crew.gpus} if crew.gpus else {})
    config.out.mkdir(parents=True, exist_ok=True)
    # Beside our files, for Ray Train wants to see it on every node too.
    with tempfile.TemporaryDirectory(prefix=".ray-", dir=config.out) as folder:
        trainer = TorchTrainer(
            _process,
            train_loop_config={"told": _Told(config, resume, mailbox)},
            scaling_config=ScalingConfig(num_workers=crew.most, use_gpu=crew.gpus > 0, resources_per_worker=each),
            torch_config=TorchConfig(backend="nccl" if config.device.startswith("cuda") else "gloo"),
            # What Ray Train writes of its own; snapshots and models are ours.
            run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=RESTARTS)),
        )
        # In a thread of its own: the one that watches and hears signals is this.
        fitting = _Fitting(trainer)
        try:
            while True:
                ended = not fitting.is_alive()
                for name, arguments in ray.get(mailbox.take.remote()):
                    if watcher is not None:
                        getattr(watcher, name)(*arguments)
                if ended:
                    break
                if stop():
                    ray.get(mailbox.stop.remote())
                time.sleep(_POLL_S)
            outcome = ray.get(mailbox.outcome.remote())
        finally:
            ray.kill(mailbox)
    if isinstance(outcome, FotError):
        raise outcome
    if outcome is None:
        raise Internal(f"the training failed: {fitting.failure}") from fitting.failure
    result: TrainResult = outcome
    return result


class _Fitting(threading.Thread):
    """Ray Train at work."""

    def __init__(self, trainer: Any):
        super().__init__(name="fot-train", daemon=True)
        self._trainer = trainer
        self.failure: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # Raised in the thread that waits.
            self.failure = error


class _Mailbox:
    """What the first process tells until the driver takes it, and whether it shall stop."""

    def __init__(self) -> None:
        self._told: list[tuple[str, tuple[Any, ...]]] = []
        self._stopping = self._began = False
        self._outcome: TrainResult | FotError | None = None

    def tell(self, name: str, arguments: tuple[Any, ...]) -> bool:
        """Take down a call of the watcher; gives whether to stop."""
        self._told.append((name, arguments))
        self._began = True
        return self._stopping

    def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        """What was told since the last time."""
        told, self._told = self._told, []
        return told

    def stop(self) -> None:
        """The training shall end after its step."""
        self._stopping = True

    def began(self) -> bool:
        """Whether an earlier attempt of this training began."""
        return self._began

    def end(self, outcome: TrainResult | FotError) -> None:
        """What came out."""
        self._outcome = outcome

    def outcome(self) -> TrainResult | FotError | None:
        """None: nothing was said of it."""
        return self._outcome


class _Post:
    """The watcher of the first process: tells the mailbox, and hears from it, a step late, whether to stop."""

    def __init__(self, mailbox: Any):
        self._mailbox = mailbox
        self._answers: list[Any] = []
        self._stopping = False

    def began(self, config: TrainConfig, done: int, parameters: int) -> None:
        self._tell("began", config, done, parameters)

    def stepped(self, row: Row) -> None:
        self._tell("stepped", row)

    def passed(self, step: int, level: int, why: str) -> None:
        self._tell("passed", step, level, why)

    def saved(self, step: int) -> None:
        self._tell("saved", step)

    def stop(self) -> bool:
        """Whether somebody asked for it."""
        if self._answers:
            ready, self._answers = ray.wait(self._answers, num_returns=len(self._answers), timeout=0)
            self._stopping = self._stopping or any(ray.get(ready))
        return self._stopping

    def _tell(self, name: str, *arguments: Any) -> None:
        self._answers.append(self._mailbox.tell.remote(name, arguments))


def _process(given: dict[str, Any]) -> None:
    """One process of the training."""
    import torch.distributed as dist

    told: _Told = given["told"]
    # An earlier attempt of this training may have left a snapshot; nobody else's is gone on from unasked.
    again = ray.get(told.mailbox.began.remote()) and (told.config.out / snapshots.NAME).exists()
    if dist.is_initialized():
        dist.barrier()  # Who is first tells the mailbox as soon as it begins.
    first = not dist.is_initialized() or dist.get_rank() == 0
    post = _Post(told.mailbox)
    try:
        result = train_here(
            told.config,
            resume=told.resume or again,
            watcher=post if first else None,
            stop=post.stop if first else lambda: False,
        )
    except FotError as error:
        # Doing it again would not help.
        ray.get(told.mailbox.end.remote(error))
        return
    if first:
        ray.get(told.mailbox.end.remote(result))
