"""A heat map as a PNG: documents by passage and layer above, the same documents by token of the text below."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from model_worker.heatmap.colours import STOPS, UNKNOWN, grey, ink, percent, shade
from model_worker.heatmap.grid import HeatMap
from model_worker.heatmap.words import NOTHING, facts, passages_title, readers, shares, shortened, tokens_title, visible
from model_worker.recall.tally import Floats

# Inches.
_WIDTH, _MARGIN, _HEAD = 13.0, 0.3, 1.5
_LABELS, _RIGHT = 3.1, 1.15  # Beside the tables: names, and a colour bar with its numbers.
_TITLE, _ROW, _LAYER, _GAP, _BAR = 0.72, 0.33, 0.64, 0.12, 0.14

_MOST_LAYERS = 6  # Columns of numbers; beyond them only all layers together.
_NAMED_TOKENS = 72  # More have no room for their text.
_MOST_COLUMNS = 320
_SMALL, _TINY = 8.5, 7.0  # Points.
_INK, _GREY = "#22242a", "#5c6270"
_FONT = "DejaVu Sans"  # Comes with matplotlib.


def save_picture(heat: HeatMap, path: Path, dpi: int = 150) -> None:
    """Write a PNG."""
    picture(heat).savefig(path, dpi=dpi, format="png")


def picture(heat: HeatMap) -> Figure:
    """The figure, to be saved in any format matplotlib knows."""
    columns = Columns.of(heat)
    rows = max(1, len(heat.rows)) * _ROW
    below = 0.25 + (columns.name_width if columns.stand else 0.15 if columns.names else 0.3)
    height = _HEAD + 2 * (_TITLE + rows) + 0.3 + below if heat.rows else _HEAD + _TITLE + rows + _MARGIN
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    sheet = _Sheet(figure, height, rows)
    _heading(sheet, heat)
    top = _HEAD + _TITLE
    if not heat.rows:
        axes = _table(sheet, _MARGIN, top, _WIDTH - 2 * _MARGIN, heat)
        axes.set_xticks([])
        _box(axes, 0, UNKNOWN, NOTHING)
        return figure
    layers = len(heat.layers) if 1 < len(heat.layers) <= _MOST_LAYERS else 0
    wide = _WIDTH - _LABELS - _RIGHT - (layers + 1) * _LAYER - _GAP
    _places(sheet, top, wide, heat)
    _layers(sheet, top, _LABELS + wide + _GAP, layers, heat)
    _tokens(sheet, top + rows + 0.3 + _TITLE, heat, columns)
    return figure


@dataclass(frozen=True)
class Columns:
    """The tokens that asked, as columns: each its own while there is room, else several together."""

    tokens: range
    together: int
    names: tuple[str, ...]  # Empty if there is no room.

    @classmethod
    def of(cls, heat: HeatMap) -> Columns:
        """As many columns as a page is wide."""
        asked = heat.asked
        texts = heat.token_texts[asked.start : asked.stop] if len(asked) <= _NAMED_TOKENS else ()
        names = tuple(_drawable(shortened(visible(text), 14)) for text in texts)
        return cls(asked, max(1, -(-len(asked) // _MOST_COLUMNS)), names)

    @property
    def name_width(self) -> float:
        """Inches the longest name takes."""
        return 0.075 * max(map(len, self.names), default=0)

    @property
    def stand(self) -> bool:
        """Whether names are too wide for their column."""
        return bool(self.names) and self.name_width > (_WIDTH - _LABELS - _RIGHT) / len(self.names)

    @property
    def edges(self) -> list[int]:
        return [*self.tokens[:: self.together], self.tokens.stop]

    def means(self, by_token: Floats) -> Floats:
        """A row's columns; nan where no token asked."""
        filled = np.full((len(self.edges) - 1) * self.together, np.nan)
        filled[: len(self.tokens)] = by_token[self.tokens.start : self.tokens.stop]
        groups = filled.reshape(-1, self.together)
        count = (~np.isnan(groups)).sum(1)
        means = np.full(len(groups), np.nan)
        np.divide(np.nansum(groups, 1), count, means, where=count > 0)
        return means


class _Sheet:
    """A figure measured in inches from its upper left corner."""

    def __init__(self, figure: Figure, height: float, rows: float):
        self.figure = figure
        self.rows = rows  # How tall the tables are.
        self._height = height

    def axes(self, left: float, top: float, width: float, tall: float) -> Axes:
        place = (left / _WIDTH, 1 - (top + tall) / self._height, width / _WIDTH, tall / self._height)
        return self.figure.add_axes(place)

    def write(self, text: str, left: float, top: float, size: float, colour: str = _INK, bold: bool = False) -> None:
        place = (left / _WIDTH, 1 - top / self._height)
        style = {"fontsize": size, "color": colour, "fontweight": "bold" if bold else "normal", "va": "center"}
        self.figure.text(*place, _drawable(text), **style)  # type: ignore[arg-type]

    def bar(self, top: float, most: float) -> None:
        """A colour bar at the right of a table."""
        place = self.axes(_WIDTH - _RIGHT + _GAP, top, _BAR, self.rows)
        # Where the table is low, numbers would lie on each other.
        marks = [0.0, most * 0.1, most * 0.4, most] if self.rows > 1 else [0.0, most]
        colours = LinearSegmentedColormap.from_list("fot", STOPS)
        bar = self.figure.colorbar(ScalarMappable(PowerNorm(0.5, 0, most), colours), cax=place, ticks=marks)
        bar.ax.set_yticklabels([percent(value) for value in marks])
        bar.ax.tick_params(labelsize=_TINY, length=2, colors=_GREY)
        bar.outline.set_visible(False)
        self.write("share of attention", _WIDTH - _RIGHT + _GAP, top - 0.14, _TINY, _GREY)


def _heading(sheet: _Sheet, heat: HeatMap) -> None:
    sheet.write(f"“{shortened(heat.prompt, 105)}”", _MARGIN, 0.33, 13, bold=True)
    sheet.write("   ·   ".join(facts(heat)), _MARGIN, 0.62, _SMALL, _GREY)
    sheet.write(f"Share of attention, {readers(heat)}", _MARGIN, 0.83, _SMALL, _GREY)
    axes = sheet.axes(_MARGIN, 1.02, _WIDTH - 2 * _MARGIN, 0.2)
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    left, place = 0.0, _MARGIN
    for name, mass, colour in shares(heat):
        axes.add_patch(Rectangle((left, 0), mass, 1, facecolor=colour, linewidth=0))
        left += mass
        words = f"{percent(mass)} {name}"
        sheet.write("■", place, 1.38, _SMALL, colour)
        sheet.write(words, place + 0.16, 1.38, _SMALL)
        place += 0.5 + 0.078 * len(words)


def _table(sheet: _Sheet, left: float, top: float, width: float, heat: HeatMap, named: bool = True) -> Axes:
    """Axes with a row for each row, one unit tall, and its name."""
    axes = sheet.axes(left, top, width, sheet.rows)
    axes.set_ylim(max(1, len(heat.rows)), 0)
    axes.set_yticks([])
    if named:
        names = [f"{shortened(row.name, 32)}{f'  {row.tokens:,}' if row.tokens else ''}" for row in heat.rows]
        axes.set_yticks([number + 0.5 for number in range(len(names))], [_drawable(name) for name in names])
    axes.tick_params(axis="y", length=0, labelsize=_SMALL)
    axes.tick_params(axis="x", length=2, labelsize=_TINY, colors=_GREY)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _title(sheet: _Sheet, top: float, name: str, rest: str) -> None:
    sheet.write(name, _LABELS, top - 0.36, 10.5, bold=True)
    sheet.write(rest, _LABELS, top - 0.14, _TINY, _GREY)


def _box(axes: Axes, row: int, colour: str, words: str = "", ink_colour: str = _GREY, rows: int = 1) -> None:
    axes.add_patch(Rectangle((0, row + 0.05), 1, rows - 0.1, facecolor=colour, linewidth=0))
    axes.text(0.5, row + rows / 2, words, ha="center", va="center", fontsize=_TINY, color=ink_colour)


def _places(sheet: _Sheet, top: float, wide: float, heat: HeatMap) -> None:
    _title(sheet, top, "Passages", passages_title(heat))
    axes = _table(sheet, _LABELS, top, wide, heat)
    axes.set_xlim(0, 1)
    if not heat.most_of_a_cell:
        words = "dense attention tells documents, not passages: ask for the top k" if not heat.top_k else "nothing told"
        _box(axes, 0, UNKNOWN, words, rows=len(heat.rows))
        axes.set_xticks([])
        return
    most, boxes, colours = heat.most_of_a_cell, [], []
    for number, row in enumerate(heat.rows):
        for cell in row.cells:
            left, width = cell.place.first_token / row.tokens, cell.place.tokens / row.tokens
            boxes.append(Rectangle((left, number + 0.05), width, 0.9))
            colours.append(shade(cell.mass, most))
        if not row.cells:
            _box(axes, number, UNKNOWN, "together" if row.documents > 1 else "not told")
    line = 0.6 if len(boxes) < 300 else 0.25
    axes.add_collection(PatchCollection(boxes, facecolors=colours, edgecolors="white", linewidths=line))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["beginning", "25 %", "50 %", "75 %", "end"])
    if most > 0:
        sheet.bar(top, most)


def _layers(sheet: _Sheet, top: float, left: float, layers: int, heat: HeatMap) -> None:
    """Whole documents: all layers together, then layer by layer."""
    most = heat.most_of_a_row
    for column in range(layers + 1):
        axes = _table(sheet, left + column * _LAYER, top, _LAYER - 0.04, heat, named=False)
        axes.set_xlim(0, 1)
        axes.set_xticks([])
        for number, row in enumerate(heat.rows):
            value = float(row.by_layer[column - 1]) if column else row.mass
            if row.documents > 1:
                _box(axes, number, grey(value), percent(value), _INK)
            else:
                _box(axes, number, shade(value, most), percent(value), ink(value, most))
        name = f"layer {heat.layers[column - 1]}" if column else "whole"
        sheet.write(name, left + column * _LAYER + 0.05, top - 0.14, _TINY, _GREY)


def _tokens(sheet: _Sheet, top: float, heat: HeatMap, columns: Columns) -> None:
    _title(sheet, top, "Tokens of the text", tokens_title(heat, columns.together))
    axes = _table(sheet, _LABELS, top, _WIDTH - _LABELS - _RIGHT, heat)
    table = [columns.means(row.by_token) for row in heat.rows]
    single = [values for values, row in zip(table, heat.rows, strict=True) if row.documents < 2]
    most = float(np.nanmax(single)) if single else 0.0
    boxes, colours = [], []
    for number, (values, row) in enumerate(zip(table, heat.rows, strict=True)):
        for value, left, right in zip(values, columns.edges[:-1], columns.edges[1:], strict=True):
            boxes.append(Rectangle((left, number + 0.05), right - left, 0.9))
            colours.append(UNKNOWN if np.isnan(value) else grey(value) if row.documents > 1 else shade(value, most))
    line = 0.6 if len(columns.edges) <= 120 else 0.0
    axes.add_collection(PatchCollection(boxes, facecolors=colours, edgecolors="white", linewidths=line))
    axes.set_xlim(columns.edges[0], columns.edges[-1])
    _token_names(axes, columns)
    if columns.edges[0] < heat.prompt_tokens < columns.edges[-1]:
        axes.axvline(heat.prompt_tokens, color=_INK, linewidth=1.2)
        place = (heat.prompt_tokens, 0)
        axes.annotate("answer ▸", place, (3, 2), textcoords="offset points", fontsize=_TINY, va="bottom")
    if most > 0:
        sheet.bar(top, most)


def _token_names(axes: Axes, columns: Columns) -> None:
    if not columns.names:
        axes.set_xlabel("token of the text", fontsize=_TINY, color=_GREY)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        return
    turn = 90 if columns.stand else 0
    axes.set_xticks([token + 0.5 for token in columns.tokens], columns.names, rotation=turn, family="monospace")
    axes.tick_params(axis="x", length=0, colors=_INK)


def _drawable(text: str) -> str:
    """The text with letters that the font has, and no mathematics."""
    known = _letters()
    return "".join(letter if ord(letter) in known else "▯" for letter in text).replace("$", r"\$")


@functools.cache
def _letters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=_FONT))).get_charmap())
