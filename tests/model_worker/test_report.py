"""Reports, intervals and pictures of studies: what is written is what was found, whole or not at all."""

from __future__ import annotations

import io
import json
import math
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from memory_service.errors import InvalidArgument
from model_worker.evaluation import pictures
from model_worker.evaluation.pictures import Axis, Bars, Cell, Line, bars, grid, lines
from model_worker.evaluation.report import (
    Column,
    Report,
    check_file,
    duration,
    nbytes,
    number,
    percent,
    show,
    size,
)
from model_worker.evaluation.wilson import Share, wilson


class Kind(StrEnum):
    PLAIN = "plain"


def report(**changes: object) -> Report:
    """One row and one figure."""
    given: dict[str, object] = {
        "study": "sums", "protocol": "Add\n  up.", "settings": {"kind": Kind.PLAIN},
        "rows": [{"tokens": 64, "sum": 0.5}], "figures": {"sum": 0.5},
    }  # fmt: skip
    return Report(**(given | changes))  # type: ignore[arg-type]


# --- Intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "trials", "low", "high"),
    [
        (20, 20, 0.8389, 1.0),
        (0, 10, 0.0, 0.2775),
        (8, 10, 0.4902, 0.9433),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I.
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_those_of_the_literature(found: int, trials: int, low: float, high: float) -> None:
    assert wilson(found, trials) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 500).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_an_interval_holds_the_share_and_mirrors_and_narrows(case: tuple[int, int]) -> None:
    found, trials = case
    low, high = wilson(found, trials)
    assert 0 <= low <= found / trials <= high <= 1 and low < high
    assert wilson(trials - found, trials) == (pytest.approx(1 - high), pytest.approx(1 - low))
    wider, more = wilson(found, trials), wilson(4 * found, 4 * trials)
    assert more[1] - more[0] < wider[1] - wider[0]


def test_no_trial_leaves_everything_open() -> None:
    assert wilson(0, 0) == (0, 1)
    assert math.isnan(Share(0, 0).value) and str(Share(0, 0)) == "no trial"


def test_shares_add_up_and_are_told_with_their_interval() -> None:
    assert str(Share(9, 10) + Share(10, 10)) == "95.0 % (76.4–99.1)"
    for wrong in ((2, 1), (-1, 3)):
        with pytest.raises(InvalidArgument, match="found"):
            Share(*wrong)
        with pytest.raises(InvalidArgument, match="found"):
            wilson(*wrong)


# --- Reports --------------------------------------------------------------------------------------------------------


def test_a_report_is_json_whatever_numbers_it_was_given(tmp_path: Path) -> None:
    rows = [{"a": np.float32(0.5), "b": torch.tensor(3), "c": math.nan, "d": (1, 2), "e": Path("x"), "f": Share(1, 2)}]
    made = report(rows=rows, trials=[{"found": True}])
    made.save(tmp_path / "out.json")
    told = json.loads((tmp_path / "out.json").read_text())
    row = {"a": 0.5, "b": 3, "c": None, "d": [1, 2], "e": "x", "f": {"found": 1, "trials": 2}}
    assert told["rows"] == [row] and told["trials"] == [{"found": True}]
    assert (told["study"], told["protocol"], told["settings"]) == ("sums", "Add up.", {"kind": "plain"})
    assert told["figures"] == {"sum": 0.5}
    assert {"date", "cpu", "cpus", "threads", "versions", "load"} <= set(told["environment"])


def test_a_report_replaces_the_old_one_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.json"
    report().save(file)
    before = file.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model_worker.evaluation.report.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        report(figures={"sum": 1.0}).save(file)
    assert file.read_text() == before and [one.name for one in tmp_path.iterdir()] == ["out.json"]


def test_where_nothing_can_be_written_is_said_beforehand(tmp_path: Path) -> None:
    check_file(None)
    check_file(tmp_path / "new.png", ".png")
    for path, message in (
        (tmp_path, "is a directory"),
        (tmp_path / "absent" / "out.json", "there is no directory"),
        (tmp_path / "out.jpg", "must end in .png"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            check_file(path, *([".png"] if path.suffix == ".jpg" else []))


def test_a_table_shows_what_the_rows_say(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = {"tokens": 65_536, "way": "exact [1]"}, {"tokens": 1_048_576, "way": "index"}
    rows = [{**first, "right": 0.984}, {**second, "right": None}]
    show(report(rows=rows), [Column("way"), Column("tokens", "in memory", size), Column("right", form=percent)], "Sums")
    out = capsys.readouterr().out
    for words in ("Sums", "exact [1]", "in memory", "64K", "1M", "98.4 %", "–", "sum"):
        assert words in out


def test_numbers_are_written_for_people() -> None:
    assert [size(one) for one in (300, 1024, 262_144, 1 << 20, 10_000_000, 262_145)] == [
        "300", "1K", "256K", "1M", "10M", "262,145",
    ]  # fmt: skip
    assert [nbytes(one) for one in (12, 2048, 3 << 20, 5 << 30)] == ["12 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]
    assert [duration(one) for one in (0.25, 12.34, 125.0)] == ["0.25 s", "12.3 s", "2 min 5 s"]
    assert [number(one) for one in (12345, 12345.6, 0.12345, math.nan, None, "x")] == [
        "12,345", "12,346", "0.1235", "–", "–", "x",
    ]  # fmt: skip
    assert percent(math.nan) == "–"


# --- Pictures -------------------------------------------------------------------------------------------------------


def test_a_grid_has_a_cell_for_every_length_and_depth() -> None:
    found = {"0–50 %": 4, "50–100 %": 1}
    cells = [Cell(column, row, count, 4) for column in ("64K", "256K") for row, count in found.items()]
    figure = grid([*cells, Cell("1M", "0–50 %", 0, 0)], "Found", "facts")
    axes = figure.axes[0]
    assert [one.get_text() for one in axes.get_xticklabels()] == ["64K", "256K", "1M"]
    assert [one.get_text() for one in axes.get_yticklabels()] == ["0–50 %", "50–100 %"]
    assert [one.get_text() for one in axes.texts] == ["4/4", "1/4", "4/4", "1/4", "–"]
    right, wrong = axes.patches[0].get_facecolor(), axes.patches[1].get_facecolor()
    assert right == axes.patches[2].get_facecolor() != wrong
    with pytest.raises(InvalidArgument, match="at least one cell"):
        grid([], "Found")


def test_pictures_are_written_as_images(tmp_path: Path) -> None:
    made = {
        "grid": grid([Cell("64K", "all", 1, 2)], "$5"),
        "lines": lines(
            [Line("a", [1024, 4096], [0.5, math.nan], [0.4, 0.5], [0.6, 0.7]), Line("b", [1024], [1.0], dashed=True)],
            Axis("tokens", "tokens", log=True), Axis("share", "percent", lowest=0, highest=1), "Lines", level=0.92,
        ),
        "bars": bars(
            ["x", "y"], [Bars("a", [0.5, 1], [0.4, 0.9], [0.6, 1]), Bars("b", [0, math.nan])], Axis("s"), "Bars"
        ),
    }  # fmt: skip
    for name, figure in made.items():
        pictures.save(figure, tmp_path / f"{name}.png")
        pixels = imread(tmp_path / f"{name}.png")
        width, height = figure.get_size_inches() * pictures.DPI
        assert pixels.shape[:2] == (int(height), int(width)) and pixels.std() > 0.01


def test_lines_show_their_points_and_error_bars_on_an_axis_of_tokens() -> None:
    tokens = [16_384, 262_144, 1_048_576]
    figure = lines(
        [Line("exact", tokens, [1, 0.9, 0.8], [0.9, 0.8, 0.7], [1, 1, 0.9])],
        Axis("tokens in memory", "tokens", log=True), Axis("right", "percent"), "Lines",
    )  # fmt: skip
    axes = figure.axes[0]
    drawn(figure)
    assert [one.get_text() for one in axes.get_xticklabels()] == ["16K", "256K", "1M"]
    assert axes.get_xscale() == "log" and list(axes.lines[0].get_ydata()) == [1, 0.9, 0.8]
    segments = axes.collections[0].get_segments()  # type: ignore[attr-defined]
    assert [tuple(round(float(end), 6) for end in one[:, 1]) for one in segments] == [(0.9, 1), (0.8, 1), (0.7, 0.9)]
    assert axes.get_legend() is None
    with pytest.raises(InvalidArgument, match="an axis is written as"):
        lines([], Axis("x", "miles"), Axis("y"), "Lines")


def drawn(figure: Figure) -> None:
    """Labels are made when a figure is drawn."""
    figure.savefig(io.BytesIO(), format="png")
