"""A study's pictures as PNG: a grid of accuracy by length and depth, lines with error bars, bars.

Import this where a picture is drawn: matplotlib takes a second. Colours are told apart by colour-blind readers (Okabe
and Ito's palette; orange to blue), and every line has a mark of its own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from memory_service.errors import InvalidArgument
from model_worker.evaluation.report import size, write_aside

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5c6270", "#22242a")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
DPI = 150

_INK, _GREY, _GRID = "#22242a", "#5c6270", "#e3e5ea"
_NOTHING = "#f1f1f4"  # No trial.
_STOPS = ((0.0, "#a63a0b"), (0.25, "#e8863a"), (0.5, "#fbe6bf"), (0.75, "#8db9d6"), (0.9, "#3f86b8"), (1.0, "#11588f"))
_TITLE, _TEXT, _SMALL = 12.5, 9.5, 8.0  # Points.


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of a grid: how many of its trials were found."""

    column: str  # As written below it, the length: "256K".
    row: str  # As written beside it, the depth: "0–10 %".
    found: int
    trials: int


@dataclass(frozen=True, slots=True)
class Line:
    """Values along x, with the ends of their error bars if known; nan leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False  # For what is compared with.


@dataclass(frozen=True, slots=True)
class Bars:
    """One value for each group, with the ends of their error bars if known; nan leaves a gap."""

    name: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """How an axis is named and written: "number", "percent", "tokens" (64K, 1M) or "seconds"."""

    name: str
    form: str = "number"
    log: bool = False
    lowest: float | None = None
    highest: float | None = None
    marks: Sequence[float] | None = None  # Where numbers stand; None: matplotlib chooses, for tokens the values.


def save(figure: Figure, path: Path) -> None:
    """Write a PNG as one step."""
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, format="png")
    write_aside(path, content.getvalue())


def grid(cells: Sequence[Cell], title: str, facts: str = "", x: str = "tokens", y: str = "depth of the key") -> Figure:
    """Accuracy by column and row, in the order they first appear, the counts written in."""
    if not cells:
        raise InvalidArgument("a picture needs at least one cell")
    columns = list(dict.fromkeys(cell.column for cell in cells))
    rows = list(dict.fromkeys(cell.row for cell in cells))
    width, height = max(6.4, 2.6 + 0.95 * len(columns)), 1.75 + 0.36 * len(rows)
    figure = Figure(figsize=(width, height), facecolor="white")
    left, right, below, above = 1.15 / width, 1 - 1.05 / width, 0.68 / height, 1 - 0.85 / height
    axes = figure.add_axes((left, below, right - left, above - below))
    colours = LinearSegmentedColormap.from_list("found", list(_STOPS))
    for cell in cells:
        place = (columns.index(cell.column), rows.index(cell.row))
        share = cell.found / cell.trials if cell.trials else math.nan
        colour = colours(share) if cell.trials else _NOTHING
        axes.add_patch(Rectangle(place, 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
        words = f"{cell.found}/{cell.trials}" if cell.trials else "–"
        dark = cell.trials and (share < 0.15 or share > 0.85)
        ink = "white" if dark else _INK if cell.trials else _GREY
        axes.text(place[0] + 0.5, place[1] + 0.5, words, ha="center", va="center", fontsize=_TEXT, color=ink)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.set_xticks([number + 0.5 for number in range(len(columns))], columns)
    axes.set_yticks([number + 0.5 for number in range(len(rows))], rows)
    axes.set_xlabel(x, fontsize=_TEXT, color=_INK)
    axes.set_ylabel(y, fontsize=_TEXT, color=_INK)
    axes.tick_params(length=0, labelsize=_TEXT, colors=_INK)
    for side in axes.spines.values():
        side.set_visible(False)
    _scale(figure, colours, (right + 0.18 / width, below, 0.13 / width, above - below))
    _heading(figure, title, facts)
    return figure


def lines(series: Sequence[Line], x: Axis, y: Axis, title: str, facts: str = "", level: float | None = None) -> Figure:
    """Lines with error bars; `level` is a thin line across, as of chance or of a paper's figure."""
    figure, axes = _plot(title, facts)
    for number, line in enumerate(series):
        colour, mark = PALETTE[number % len(PALETTE)], MARKS[number % len(MARKS)]
        style: dict[str, Any] = {"color": colour, "marker": mark, "markersize": 5.5, "linewidth": 1.8, "zorder": 3}
        axes.errorbar(
            line.x, line.y, yerr=_reach(line.y, line.low, line.high), label=line.name, capsize=3, elinewidth=1.0,
            linestyle="--" if line.dashed else "-", markeredgecolor="white", markeredgewidth=0.6, **style,
        )  # fmt: skip
    places = sorted({float(one) for line in series for one in line.x})
    _dress(axes.xaxis, axes.set_xscale, x, places if x.form == "tokens" else None)
    _dress(axes.yaxis, axes.set_yscale, y, None)
    _limits(axes, x, y)
    _finish(axes, x, y, level, legend=len(series) > 1)
    return figure


def bars(
    groups: Sequence[str], series: Sequence[Bars], y: Axis, title: str, facts: str = "", level: float | None = None
) -> Figure:
    """Bars side by side for each group, their values written above."""
    figure, axes = _plot(title, facts, width=max(6.4, 1.6 + 0.42 * len(groups) * max(1, len(series))))
    wide = 0.8 / max(1, len(series))
    form = _form(y.form)
    for number, one in enumerate(series):
        places = [group - 0.4 + wide * (number + 0.5) for group in range(len(groups))]
        colour = PALETTE[number % len(PALETTE)]
        reach = _reach(one.values, one.low, one.high)
        style: dict[str, Any] = {"ecolor": _INK, "capsize": 3, "error_kw": {"elinewidth": 1.0}, "zorder": 3}
        axes.bar(places, one.values, wide * 0.92, yerr=reach, label=one.name, color=colour, **style)
        for spot, value, top in zip(places, one.values, one.high or one.values, strict=True):
            if not math.isnan(value):
                words = form(value, None)
                place: dict[str, Any] = {
                    "ha": "center",
                    "va": "bottom",
                    "xytext": (0, 3),
                    "textcoords": "offset points",
                }
                axes.annotate(words, (spot, top), fontsize=_SMALL, color=_GREY, **place)
    axes.set_xticks(range(len(groups)), groups)
    _dress(axes.yaxis, axes.set_yscale, y, None)
    _limits(axes, Axis(""), y)
    _finish(axes, Axis(""), y, level, legend=len(series) > 1)
    return figure


# --- What they share ------------------------------------------------------------------------------------------------


def _plot(title: str, facts: str, width: float = 7.4, height: float = 4.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), facecolor="white")
    left, below, above = 0.95 / width, 0.72 / height, 1 - 0.9 / height
    axes = figure.add_axes((left, below, 1 - 0.3 / width - left, above - below))
    _heading(figure, title, facts)
    return figure, axes


def _heading(figure: Figure, title: str, facts: str) -> None:
    width, height = figure.get_size_inches()
    left = 0.3 / width
    figure.text(left, 1 - 0.3 / height, _safe(title), fontsize=_TITLE, fontweight="bold", color=_INK, va="center")
    figure.text(left, 1 - 0.56 / height, _safe(facts), fontsize=_SMALL, color=_GREY, va="center")


def _scale(figure: Figure, colours: LinearSegmentedColormap, place: tuple[float, float, float, float]) -> None:
    """What the colours of a grid mean."""
    axes = figure.add_axes(place)
    steps = 64
    for step in range(steps):
        axes.add_patch(Rectangle((0, step / steps), 1, 1.5 / steps, facecolor=colours(step / (steps - 1)), linewidth=0))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.tick_params(length=0, labelsize=_SMALL, colors=_GREY)
    for side in axes.spines.values():
        side.set_visible(False)


def _dress(axis: Any, set_scale: Any, told: Axis, places: Sequence[float] | None) -> None:
    """Scale and numbers of an axis."""
    if told.log:
        set_scale("log", base=2 if told.form == "tokens" else 10)
    marks = told.marks or places
    if marks:
        axis.set_major_locator(FixedLocator(list(marks)))
        axis.set_minor_locator(NullLocator())
    if told.form != "number" or not told.log:
        axis.set_major_formatter(FuncFormatter(_form(told.form)))


def _limits(axes: Axes, x: Axis, y: Axis) -> None:
    axes.set_xlim(x.lowest, x.highest)
    axes.set_ylim(y.lowest, y.highest)


def _finish(axes: Axes, x: Axis, y: Axis, level: float | None, legend: bool) -> None:
    axes.set_xlabel(_safe(x.name), fontsize=_TEXT, color=_INK)
    axes.set_ylabel(_safe(y.name), fontsize=_TEXT, color=_INK)
    axes.grid(True, axis="y", color=_GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, labelsize=_TEXT, colors=_INK, color=_GRID)
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(_GRID)
    if level is not None:
        axes.axhline(level, color=_GREY, linewidth=1.0, linestyle=":", zorder=2)
    if legend:
        axes.legend(frameon=False, fontsize=_TEXT, labelcolor=_INK)


def _reach(
    values: Sequence[float], low: Sequence[float] | None, high: Sequence[float] | None
) -> tuple[list[float], list[float]] | None:
    """How far error bars reach down and up, as matplotlib wants them."""
    if low is None and high is None:
        return None
    down, up = low or values, high or values
    return (
        [max(0.0, value - end) for value, end in zip(values, down, strict=True)],
        [max(0.0, end - value) for value, end in zip(values, up, strict=True)],
    )


def _form(name: str) -> Any:
    """How numbers of a kind are written, as matplotlib asks for it."""
    forms = {
        "number": lambda value, _: f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}",
        "percent": lambda value, _: f"{100 * value:.4g} %" if value < 1 + 1e-6 else "",  # An axis has some room above.
        "tokens": lambda value, _: size(value),
        "seconds": lambda value, _: _duration(value),
    }
    if name not in forms:
        raise InvalidArgument(f"an axis is written as {', '.join(forms)}, got {name!r}")
    return forms[name]


def _duration(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:,.3g} s" if seconds >= 0.1 else f"{1000 * seconds:,.3g} ms"


def _safe(text: str) -> str:
    return text.replace("$", r"\$")
