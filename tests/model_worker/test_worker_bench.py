"""The worker's benchmarks measure what they say: fair turns, right answers, the promised figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from memory_service.bench.harness import Result
from memory_service.errors import InvalidArgument, Unavailable
from model_worker.bench import decode, prefill, serving
from model_worker.bench.geometry import QUICK
from model_worker.bench.launch import launch
from model_worker.bench.subject import Measured, Mode, Setup
from model_worker.bench.turns import distance, label, measured_row, take_turns
from model_worker.cli import bench as commands

PREFILL_FIGURES = {
    "prefill_vs_reference_1layer_64k", "prefill_flatness_1layer", "prefill_vs_reference_2layers_64k",
    "grpc_vs_inprocess_prefill", "self_extend_vs_sdpa_8k",
}  # fmt: skip
DECODE_FIGURES = {
    "decode_vs_reference_256k", "decode_ann_1m_vs_64k", "grpc_added_ms_decode", "index_recall32_1m_bf16",
}  # fmt: skip
ROW = {"contender", "tokens", "memory_layers", "memory_dtype", "threads", "median_ms", "samples_ms", "peak_rss_mb"}


def quiet(_: str) -> None:
    pass


def measured(*seconds: float, peak: float = 10.0) -> Measured:
    return Measured(list(seconds), sum(seconds), 8.0, peak, [1.0, 2.0])


def check(result: Result, figures: set[str], file: Path) -> None:
    told = json.loads(file.read_text())
    assert set(told) == {"bench", "figures", "rows", "settings", "environment"}
    assert set(told["figures"]) >= figures
    assert told["settings"]["quick"]
    assert {"cpu", "threads", "revision"} <= set(told["environment"])
    assert all(set(row) >= ROW for row in told["rows"])
    assert told["rows"] == result.rows


def test_the_slowest_takes_its_only_turn_in_the_middle() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], Measured]:
        return lambda: order.append(name) or measured(1.0)  # type: ignore[func-returns-value]

    runs = take_turns({name: call(name) for name in "abR"}, {"a": 3, "b": 3, "R": 1})
    assert "".join(order) == "ab" + "Rba" + "ab"
    assert {name: len(taken) for name, taken in runs.items()} == {"a": 3, "b": 3, "R": 1}


def test_a_row_tells_times_of_all_rounds_and_the_highest_peak() -> None:
    row = measured_row("x", [measured(0.001, 0.003), measured(0.002, peak=11.5)], tokens=5)
    assert row["median_ms"] == 2.0
    assert (row["rss_ready_mb"], row["peak_rss_mb"], row["growth_mb"]) == (8.0, 11.5, 3.5)
    assert row["cores_used"] == 1.0


def test_sizes_are_called_by_their_thousands() -> None:
    assert [label(tokens) for tokens in (65_536, 1 << 20, 300)] == ["64k", "1m", "300"]


@pytest.mark.slow
def test_a_process_answers_as_its_contender_does_here() -> None:
    setup = Setup("fot", QUICK, (2,))
    reference = Setup("reference", QUICK, (2,))
    with launch(setup) as there, launch(reference, here=True) as here:
        assert distance(there.prefill(200), here.prefill(200)) < 1e-4
        for subject in (there, here):
            subject.start(20, Mode("dense"))
        assert distance(there.decode(3, Mode("dense")), here.decode(3, Mode("dense"))) < 1e-4
        with pytest.raises(Unavailable, match="0 to 5"):
            launch(Setup("fot", QUICK, (7,)), here=True)


def test_prefill_measures_every_promised_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = prefill.run(quick=True, directory=tmp_path, progress=quiet)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(prefill, "run", lambda **_: result)
    ran = bench("prefill", "--quick", "--json", str(tmp_path / "x.json"))
    assert "prefill_flatness_1layer" in ran
    check(result, PREFILL_FIGURES, tmp_path / "x.json")


@pytest.mark.slow
def test_decode_measures_every_promised_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = decode.run(quick=True, directory=tmp_path, progress=quiet)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(decode, "run", lambda **_: result)
    ran = bench("decode", "--quick", "--json", str(tmp_path / "x.json"))
    assert "grpc_added_ms_decode" in ran
    check(result, DECODE_FIGURES, tmp_path / "x.json")


def test_sizes_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="commas"):
        commands.prefill(tokens="4k")
    with pytest.raises(InvalidArgument, match="f32"):
        commands.decode(dtypes="f64")


def bench(*arguments: str) -> str:
    """What a command of `fot bench` prints."""
    app = typer.Typer()
    app.command("prefill")(commands.prefill)
    app.command("decode")(commands.decode)
    ran = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert ran.exit_code == 0
    return ran.stdout


@pytest.mark.slow
def test_many_chats_are_measured_batched_and_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "serving.json"
    result = serving.run(quick=True, directory=tmp_path, progress=quiet)
    file.write_text(result.to_json())
    assert set(json.loads(file.read_text())["figures"]) == {
        f"serving_{place}{what}_{manner}"
        for place in ("", "grpc_")
        for what in (
            "batched_vs_one_by_one", "batched_vs_one_by_one_cpu", "token_p50_ms", "token_p99_ms", "first_token_p50_ms",
        )
        for manner in ("dense", "top32")
    }  # fmt: skip
    assert [row["contender"] for row in result.rows] == ["one-by-one", "batched"] * 2 + [
        "grpc-one-by-one", "grpc-batched",
    ] * 2  # fmt: skip
    assert all(row["tokens_per_s"] > 0 for row in result.rows)
