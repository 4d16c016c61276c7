"""The training loop: draw a batch, cross-batch attention, loss, gradients, a step of the optimizers, and again.

All that is random is drawn from (seed, step), so a training that goes on from a snapshot is the one that never stopped.
"""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from memory_service.errors import FailedPrecondition, InvalidArgument
from memory_service.process.allocator import keep_freed_memory
from model_worker.decoder.fitting import policies_of
from model_worker.hf.decoder import Decoder
from model_worker.training import snapshots
from model_worker.training.batches import source_of
from model_worker.training.config import Precision, TrainConfig
from model_worker.training.cross_batch import CrossBatchStep
from model_worker.training.curriculum import Curriculum, Draw
from model_worker.training.curves import Board
from model_worker.training.initial import start
from model_worker.training.metrics import Row, Rows
from model_worker.training.objective import Scored, Tallies, scored
from model_worker.training.optimizers import Optimizers, schedule
from model_worker.training.positions import positions_of, sampler_of
from model_worker.training.publish import MODEL, publish
from model_worker.training.ranks import Ranks
from model_worker.training.shapes import Batch, Source
from model_worker.training.snapshots import Snapshot

_KEPT_BYTES = 4 << 30  # Of freed memory: a step needs what the one before needed.


class Watcher(Protocol):
    """Who wants to know how a training goes; called in the first process only."""

    def began(self, config: TrainConfig, done: int, parameters: int) -> None:
        """Training starts after `done` steps."""

    def stepped(self, row: Row) -> None:
        """A step was taken."""

    def passed(self, step: int, level: int, why: str) -> None:
        """The curriculum reached `level`."""

    def saved(self, step: int) -> None:
        """A snapshot and the model of this step lie on disk."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came out."""

    steps: int  # Done.
    finished: bool  # False: stopped before the last step; resume goes on.
    level: int  # Reached.
    tokens: int
    seconds: float  # Of steps, in all runs.
    last: Row | None  # None if there was nothing left to do.
    model: Path  # The exported checkpoint.


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    on_step: Callable[[Row], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    source: Source | None = None,
) -> TrainResult:
    """Train as told; `stop` is asked before every step, and true makes it the last, with a snapshot.

    With torch.distributed up, every process calls this with the same arguments: gradients are added up, the first
    process writes. `source` replaces the configuration's. Raises InvalidArgument and UnsupportedModel for what cannot
    be trained, FailedPrecondition if `out` holds a training and `resume` was not asked for.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory(_KEPT_BYTES)
    with torch.random.fork_rng(devices=[]):
        return _Training(config, source, watcher, on_step).run(resume, stop)


class _Training:
    """One process of a training."""

    def __init__(
        self,
        config: TrainConfig,
        source: Source | None,
        watcher: Watcher | None,
        on_step: Callable[[Row], None] | None,
    ):
        self._config, self._ranks = config, Ranks()
        self._watcher, self._on_step = watcher, on_step
        self._start = start(config)
        self._described = {**config.described(), "start": self._start.described()}
        self._fot, self._base = self._start.fot, self._start.base
        self._decoder = Decoder(self._base, self._fot.window)
        self._policies = policies_of(self._decoder, self._fot)
        self._sampler = None if config.positions is None else sampler_of(config.positions, self._fot.window)
        self._source = source or source_of(
            config.data.source, self._start.tokenizer, config.seed, **config.data.options
        )
        self._optimizers = Optimizers(self._base, config.optimizer)
        self._curriculum = Curriculum(config.levels, config.seed)
        self._done = self._tokens = 0
        self._seconds = 0.0

    # --- the loop ---

    def run(self, resume: bool, stop: Callable[[], bool]) -> TrainResult:
        config = self._config
        last: Row | None = None
        stopping = False
        with self._owned(resume), self._attached():
            self._open(resume)
            with self._listeners() as listeners:
                while self._done < config.steps and not stopping:
                    began = time.perf_counter()
                    draw = self._curriculum.draw(self._done)
                    last, stopping = self._step(draw, stop, began)
                    passed = self._curriculum.answered(last.step, draw, last.answer_accuracy)
                    self._done = last.step
                    for listener in listeners:
                        listener(last)
                    if passed and self._watcher is not None and self._ranks.first:
                        self._watcher.passed(last.step, self._curriculum.level, self._curriculum.passed[-1][1])
                    due = config.snapshot_every is not None and self._done % config.snapshot_every == 0
                    if due or stopping or self._done == config.steps:
                        self._save()
            if last is None:
                self._publish(self._snapshot())  # There was nothing left to do: what is shown of it is made anew.
        finished = self._done == config.steps
        place = config.out / MODEL
        return TrainResult(self._done, finished, self._curriculum.level, self._tokens, self._seconds, last, place)

    def _step(self, draw: Draw, stop: Callable[[], bool], began: float) -> tuple[Row, bool]:
        """One step of all processes: what there is to know of it, and whether it shall be the last."""
        config, ranks = self._config, self._ranks
        numbers = [
            (self._done * config.accumulate + one) * ranks.count + ranks.rank for one in range(config.accumulate)
        ]
        batches = [self._source.batch(number, draw.shape) for number in numbers]
        # The loss is one mean over all batches of all processes, so its denominator comes first.
        told = torch.tensor([sum(float(one.weights.sum()) for one in batches), float(stop())], dtype=torch.float64)
        weight, stopping = ranks.add_(told).tolist()
        if not weight:
            raise InvalidArgument(f"no target in the batches of step {self._done} has a weight above 0")
        # For the dropout of models that have some: the same after a resume.
        torch.manual_seed(int(np.random.SeedSequence((config.seed, self._done, ranks.rank)).generate_state(1)[0]))
        tallies = torch.zeros(len(Tallies._fields), dtype=torch.float64)
        for number, batch in zip(numbers, batches, strict=True):
            result = self._scored(batch, draw, number)
            (result.loss / weight).backward()
            tallies += result.tallies.cpu()
        sums = Tallies(*ranks.add_(tallies).tolist())
        if not math.isfinite(sums.loss):
            raise FailedPrecondition(
                f"the loss of step {self._done + 1} is {sums.loss}: lower the learning rates; a snapshot is as it was"
            )
        ranks.add_gradients_(self._optimizers.parameters)
        factor = schedule(self._done, config.steps, config.optimizer) * self._curriculum.current.lr
        norm = float(self._optimizers.step(factor))
        took = time.perf_counter() - began
        tokens = sum(one.ids.numel() for one in batches) * ranks.count
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + took
        row = Row(
            step=self._done + 1,
            level=self._curriculum.level,
            loss=sums.mean_loss,
            answer_loss=sums.mean_answer_nll,
            answer_accuracy=sums.accuracy,
            text_loss=sums.mean_text_loss,
            lr=factor,
            gradient_norm=norm,
            temperature=draw.temperature,
            earlier=draw.level != self._curriculum.level,
            tokens=self._tokens,
            seconds=self._seconds,
            tokens_per_s=tokens / took,
        )
        return row, bool(stopping)

    def _scored(self, batch: Batch, draw: Draw, number: int) -> Scored:
        positions: Tensor | None = None
        if self._sampler is not None:
            positions = positions_of(self._sampler, batch.ids.shape, self._config.seed, number)
            positions = positions.to(self._decoder.device)
        attention = CrossBatchStep(
            batch.reads, self._policies, self._fot.mem_layers, positions=positions, temperature=draw.temperature
        )
        with self._autocast():
            return scored(self._decoder, batch, attention)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._config.dtype is Precision.FLOAT32:
            return nullcontext()
        return torch.autocast(self._decoder.device.type, dtype=torch.bfloat16)

    # --- before and after ---

    @contextmanager
    def _owned(self, resume: bool) -> Iterator[None]:
        """The folder, where no other training may write meanwhile. A kill lets go of it too."""
        out = self._config.out
        if resume:
            snapshots.find(out)
        if not self._ranks.first:
            yield
            return
        out.mkdir(parents=True, exist_ok=True)
        with (out / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FailedPrecondition(f"another process trains in {out}: choose another --out") from None
            yield

    def _open(self, resume: bool) -> None:
        """Begin, or go on."""
        out = self._config.out
        if resume:
            self._load(snapshots.read(out))
        elif (out / snapshots.NAME).exists():
            raise FailedPrecondition(
                f"{out} holds a training already: go on with --resume, choose another --out, or remove it"
            )
        self._ranks.copy_from_first_(self._start.trained.values())
        if self._watcher is not None and self._ranks.first:
            self._watcher.began(self._config, self._done, self._start.parameters)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """The decoder with our attention, in training mode."""
        if self._config.gradient_checkpointing:
            self._base.activation_checkpointing_enable()
        self._base.train()
        self._decoder.attach()
        try:
            yield
        finally:
            self._decoder.detach()
            self._base.eval()

    @contextmanager
    def _listeners(self) -> Iterator[list[Callable[[Row], None]]]:
        """Who is told of every step: nobody but in the first process."""
        with ExitStack() as opened:
            listeners: list[Callable[[Row], None]] = []
            if self._ranks.first:
                out = self._config.out
                listeners.append(opened.enter_context(Rows(out, self._done)).add)
                listeners.append(opened.enter_context(Board(out, self._done)).add)
                if self._watcher is not None:
                    listeners.append(self._watcher.stepped)
                if self._on_step is not None:
                    listeners.append(self._on_step)
            yield listeners

    def _save(self) -> None:
        """The model first: who finds a snapshot of the last step finds its model too."""
        snapshot = self._snapshot()
        self._publish(snapshot)
        if self._ranks.first:
            snapshots.write(self._config.out, snapshot)
            if self._watcher is not None:
                self._watcher.saved(self._done)
        self._ranks.wait()

    def _publish(self, snapshot: Snapshot) -> None:
        if self._ranks.first:
            with self._decoder.off():
                publish(self._config, self._start, snapshot, self._curriculum.passed, self._ranks.count)

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            step=self._done,
            config=self._described,
            curriculum=self._curriculum.state(),
            tokens=self._tokens,
            seconds=self._seconds,
            weights=self._start.trained,
            optimizers=self._optimizers.tensors(),
        )

    @torch.no_grad()
    def _load(self, snapshot: Snapshot) -> None:
        snapshots.check_same(snapshot, self._described)
        for name, weight in self._start.trained.items():
            weight.copy_(snapshot.weights[name])
        self._optimizers.load(snapshot.optimizers)
        self._curriculum.load(snapshot.curriculum)
        self._done, self._tokens, self._seconds = snapshot.step, snapshot.tokens, snapshot.seconds
