"""How a training went: loss, answers and learning rate over the steps as a PNG, and for TensorBoard if it is there.

matplotlib is imported when a picture is drawn, tensorboard when a training begins; this is the only file with either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from model_worker.training.metrics import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "curves.png"
FOLDER = "tensorboard"

_BLUE, _ORANGE, _GREEN, _GREY, _INK = "#0072b2", "#d55e00", "#009e73", "#5c6270", "#22242a"  # Okabe and Ito's.
_SMOOTHING = 0.95
_SHOWN = ("loss", "answer_loss", "answer_accuracy", "text_loss", "lr", "gradient_norm", "level", "tokens_per_s")


def draw(rows: Sequence[Row], place: Path) -> Path:
    """Write the curves as a PNG: every step pale, their exponential mean above it, a line where a level begins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.5), facecolor="white")
    losses, answers, rates = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.4))
    figure.subplots_adjust(left=0.09, right=0.98, top=0.98, bottom=0.07, hspace=0.08)
    _curve(losses, rows, "loss", "loss that is minimised", _BLUE)
    _curve(losses, rows, "text_loss", "text, nats a token", _GREEN)
    _curve(losses, rows, "answer_loss", "answers, nats a token", _ORANGE)
    losses.set_ylabel("loss")
    losses.set_ylim(bottom=0)
    _curve(
        answers, [row for row in rows if not row.earlier], "answer_accuracy", "answer tokens that are right", _ORANGE
    )
    answers.set_ylabel("accuracy")
    answers.set_ylim(0, 1.02)
    rates.plot([row.step for row in rows], [row.lr for row in rows], color=_GREY, linewidth=1.2)
    rates.set_ylabel("learning rate\n(factor)")
    rates.set_ylim(bottom=0)
    rates.set_xlabel("step")
    for axes in (losses, answers, rates):
        axes.grid(color="#e3e5ea", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for begun in _levels(rows):
            axes.axvline(begun.step, color=_GREY, linewidth=0.8, linestyle=":")
    for begun in _levels(rows):
        losses.annotate(
            f"level {begun.level}",
            (begun.step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, -2),
            textcoords="offset points",
            fontsize=7.5,
            color=_INK,
            va="top",
            rotation=90,
        )
    for axes in (losses, answers):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8.5, loc="best")
    figure.savefig(place, dpi=150, format="png")
    return place


def _curve(axes: Axes, rows: Sequence[Row], name: str, label: str, colour: str) -> None:
    points = [(row.step, getattr(row, name)) for row in rows if getattr(row, name) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=colour, linewidth=0.5, alpha=0.25)
    axes.plot(steps, smooth(values), color=colour, linewidth=1.6, label=label)


def smooth(values: Sequence[float], share: float = _SMOOTHING) -> list[float]:
    """The exponential mean up to each value, of the values there are: the first ones do not start from zero."""
    means, total, count = [], 0.0, 0.0
    for value in values:
        total, count = share * total + value, share * count + 1
        means.append(total / count)
    return means


def _levels(rows: Sequence[Row]) -> list[Row]:
    """The first row of every level but the first."""
    return [row for before, row in pairwise(rows) if row.level > before.level]


class Board:
    """TensorBoard's event files, where tensorboard is installed; else nothing."""

    def __init__(self, folder: Path, done: int = 0):
        """Go on after `done` steps: later ones of a run that was killed are hidden."""
        self._writer: Any = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / FOLDER), purge_step=done + 1 if done else None)

    def add(self, row: Row) -> None:
        """Write a row's numbers."""
        if self._writer is None:
            return
        numbers = asdict(row)
        for name in _SHOWN:
            if numbers[name] is not None:
                self._writer.add_scalar(name, numbers[name], row.step)

    def close(self) -> None:
        """Write what is left. Harmless twice."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
