"""`fot train`: a model with a memory from a TOML file, with its progress, to be stopped and resumed at any step."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model_worker.cli.console import say
from model_worker.cli.crew import PANEL, Address, CpusPerWorker, GpusPerWorker, OnRay, check_alone, device_of
from model_worker.cli.opening import quiet

if TYPE_CHECKING:
    from model_worker.training.config import TrainConfig
    from model_worker.training.metrics import Row
    from model_worker.training.run import TrainResult

_STOPPED = 130  # The exit status of a run that was interrupted.


def register(app: typer.Typer) -> None:
    """Add `fot train`."""
    from model_worker.cli import needs_worker

    app.command("train")(needs_worker(train))


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; docs/training.md lists its keys.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the snapshot in the output folder.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the file's.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default all cores.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for everything, instead of the file's.")] = None,
    ray: OnRay = False,
    address: Address = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that train together; by default 1.", rich_help_panel=PANEL)
    ] = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
) -> None:
    """Train a model that attends to a memory: from scratch, or on from a checkpoint.

    Under torchrun, or with --ray, several processes train together. Ctrl-C stops after the step and says how to go on.
    """
    from model_worker.training import config as configuration
    from model_worker.training.ranks import of_torchrun
    from model_worker.training.run import train as run

    quiet()
    again = _again(config, steps, threads, out)
    if ray:
        again += _again_on_ray(address, workers, cpus_per_worker, gpus_per_worker)
    check_alone(ray, address=address, workers=workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker)
    told = configuration.read(config, steps=steps, threads=threads, out=out)
    if ray:
        _tell(_on_ray(told, resume, address, workers or 1, cpus_per_worker, gpus_per_worker), told, again)
        return
    with of_torchrun() as ranks, _stops() as stopping:
        shown = Shown(told.log_every)
        try:
            result = run(told, resume=resume, watcher=shown, stop=stopping)
        finally:
            shown.close()
    if ranks.first:
        _tell(result, told, again)


def _on_ray(
    told: TrainConfig, resume: bool, address: str | None, workers: int, cpus: float | None, gpus: float | None
) -> TrainResult:
    from model_worker.deployment.runtime import connect

    with connect(address), _stops() as stopping:
        from model_worker.deployment.pool import Crew
        from model_worker.deployment.training import train as run

        crew = Crew(workers, workers, 1.0 if cpus is None else cpus, gpus or 0.0)
        told = replace(told, threads=told.threads or crew.threads, device=device_of(None, gpus) or told.device)
        shown = Shown(told.log_every)
        try:
            return run(told, crew, resume=resume, watcher=shown, stop=stopping)
        finally:
            shown.close()


def _tell(result: TrainResult, told: TrainConfig, again: str) -> None:
    done = f"{result.steps:,} of {told.steps:,} steps, {result.tokens:,} tokens, {result.seconds / 60:,.1f} minutes"
    if not result.finished:
        say(f"Stopped after {done}. Go on with: {again}")
        raise typer.Exit(_STOPPED)
    say(f"Trained: {done}; level {result.level} of {len(told.levels) - 1}. The model is in {result.model}")


class Shown:
    """Progress on standard error: a bar where somebody watches, else a line every so many steps."""

    def __init__(self, every: int):
        self._every = every
        self._bar: Progress | None = None
        self._rows: list[Row] = []  # Since the last line.
        self._begun = time.monotonic()
        self._first = self._last = 0

    def began(self, config: TrainConfig, done: int, parameters: int) -> None:
        """Training starts after `done` steps."""
        self._first, self._last, self._begun = done, config.steps, time.monotonic()
        again = f", on from step {done:,}" if done else ""
        sys.stderr.write(f"{parameters:,} parameters, {config.steps:,} steps{again}; {config.out}\n")
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=config.steps, completed=done)
            self._bar.start()

    def stepped(self, row: Row) -> None:
        """A step was taken."""
        self._rows.append(row)
        if self._bar is not None:
            self._rows = self._rows[-self._every :]
            self._bar.update(self._task, completed=row.step, description=words(self._rows))
        elif row.step % self._every == 0 or row.step == self._last:
            sys.stderr.write(f"step {row.step:,}/{self._last:,}  {words(self._rows)}{self._left(row.step)}\n")
            self._rows = []

    def passed(self, step: int, level: int, why: str) -> None:
        """The curriculum reached `level`."""
        self._line(f"level {level} after step {step:,}: {why}")

    def saved(self, step: int) -> None:
        """A snapshot and the model of this step lie on disk."""

    def close(self) -> None:
        """Take the bar away. Harmless twice."""
        if self._bar is not None:
            self._bar.stop()

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            sys.stderr.write(f"{text}\n")

    def _left(self, step: int) -> str:
        left_s = (time.monotonic() - self._begun) / (step - self._first) * (self._last - step)
        return f"  {left_s / 60:,.0f} min left" if left_s >= 90 else f"  {left_s:,.0f} s left"


def words(rows: list[Row]) -> str:
    """The means of some steps in a line."""
    accuracies = [row.answer_accuracy for row in rows if row.answer_accuracy is not None]
    texts = [row.text_loss for row in rows if row.text_loss is not None]
    said = [f"level {rows[-1].level}", f"loss {_mean([row.loss for row in rows]):.3f}"]
    if accuracies:
        said.append(f"answers {_mean(accuracies):.1%}")
    if texts:
        said.append(f"text {_mean(texts):.3f}")
    speed = len(rows) / sum(1 / row.tokens_per_s for row in rows)
    return "  ".join([*said, f"lr {rows[-1].lr:.2f}", f"{speed:,.0f} tokens/s"])


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


@contextmanager
def _stops() -> Iterator[_Stop]:
    """SIGINT and SIGTERM ask for an end after the step; a second one ends at once."""
    stop = _Stop()
    before = {number: signal.signal(number, stop.asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stop:
    """Whether somebody asked the run to end."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def __call__(self) -> bool:
        return self._signal is not None

    def asked(self, number: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number
        sys.stderr.write("stopping after this step; once more to stop at once\n")


def _again(config: Path, steps: int | None, threads: int | None, out: Path | None) -> str:
    given = [("--steps", steps), ("--threads", threads), ("--out", out)]
    options = [f"{name} {value}" for name, value in given if value is not None]
    return " ".join(["fot train", str(config), *options, "--resume"])


def _again_on_ray(address: str | None, workers: int | None, cpus: float | None, gpus: float | None) -> str:
    given = [("--address", address), ("--workers", workers), ("--cpus-per-worker", cpus), ("--gpus-per-worker", gpus)]
    return " ".join([" --ray", *(f"{name} {value}" for name, value in given if value is not None)])
