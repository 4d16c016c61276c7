"""The benchmarks measure what they say: fair turns, right answers, the promised figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from memory_service.attention.exact import attend as oracle
from memory_service.bench import attend, harness, ingest, wire
from memory_service.bench.synthetic import Workload

ATTEND_FIGURES = {
    "exact_vs_flatip_q32", "exact_vs_flatip_q512", "grpc_vs_inprocess_q512", "grpc_added_ms_q1", "ivf_vs_exact_q512",
    "ivf_recall32", "ivf_mass", "session_vs_document", "dense_vs_sdpa_q512",
}  # fmt: skip


def quiet(_: str) -> None:
    pass


def test_contenders_take_turns_and_nobody_always_follows_the_same_neighbour() -> None:
    order: list[str] = []
    seconds = harness.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(taken) for taken in seconds.values()] == [3, 3]


def test_preparation_is_done_before_every_call_and_not_timed() -> None:
    prepared: list[int] = []
    harness.interleave({"a": lambda: None}, rounds=2, before=lambda: prepared.append(1))
    assert len(prepared) == 3


def test_a_ratio_is_of_medians() -> None:
    assert harness.ratio([9.0, 4.0, 100.0], [3.0, 1.0, 3.0]) == 3.0


def test_a_row_keeps_every_sample_in_milliseconds() -> None:
    assert harness.row("x", [0.001, 0.003, 0.002], keys=5) == {
        "contender": "x", "keys": 5, "median_ms": 2.0, "p25_ms": 1.0, "p75_ms": 3.0, "samples_ms": [1.0, 3.0, 2.0],
    }  # fmt: skip


def test_a_result_carries_its_environment_and_is_json() -> None:
    result = json.loads(harness.Result("x", {"ratio": 2.0}, [], {}).to_json())
    assert result["figures"] == {"ratio": 2.0}
    assert {"cpu", "flags", "versions", "threads", "revision", "date", "load"} <= set(result["environment"])
    assert result["environment"]["versions"]["torch"] == torch.__version__


def test_threads_come_back_after_a_single_threaded_run() -> None:
    torch.set_num_threads(2)
    with harness.single_threaded():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_a_workload_is_the_same_for_the_same_seed_and_anisotropic() -> None:
    one, two = (Workload.draw(heads=2, tokens=4096, dim=16, queries=3, seed=7) for _ in range(2))
    assert torch.equal(one.keys, two.keys)
    assert torch.equal(one.queries, two.queries)
    assert one.keys.shape == one.values.shape == (1, 2, 4096, 16)
    deviations = torch.linalg.svdvals((one.keys[0, 0].float() - one.keys[0, 0].float().mean(0)) / 4096**0.5)
    assert deviations[0] > 2 * deviations[-1]


def test_the_faiss_baseline_is_softmax_over_the_top_k() -> None:
    work = Workload.draw(heads=2, tokens=300, dim=attend.DIM, queries=3)
    keys, values = work.keys[0].float(), work.values[0].float()
    scores = work.queries @ keys.mT
    visible = scores >= scores.topk(5).values[..., -1:]
    want = oracle(work.queries * attend.SCALE, keys, values, visible)
    have = attend.FlatIP(keys, values).attend(work.queries, 5)
    torch.testing.assert_close(have.output, want.output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(have.lse, want.lse, atol=1e-5, rtol=1e-5)


def test_pushdown_fits_the_bar_and_shipping_does_not() -> None:
    figures = wire.run(progress=quiet).figures
    queries_and_outputs = 3 * 2 * 32 * 100 * 2
    keys_and_values = 3 * 2 * 32 * 128 * 100 * 2
    assert queries_and_outputs < figures["pushdown_bytes_per_token"] <= 50_000
    assert keys_and_values < figures["ship_bytes_per_token"] < 1.001 * keys_and_values


def test_the_file_system_under_a_path_is_named(tmp_path: Path) -> None:
    assert " on " in harness.file_system(tmp_path)


def test_a_service_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a directory")
    with pytest.raises(harness.Unavailable, match="did not start"), harness.served(tmp_path / "data"):
        pass


@pytest.mark.slow
def test_attend_measures_every_promised_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = attend.run(quick=True, directory=tmp_path, progress=quiet)
    assert set(result.figures) >= ATTEND_FIGURES
    assert 0 < result.figures["ivf_recall32"] <= 1
    assert result.environment["threads"] == 1
    attend.render(result)
    assert "exact_vs_flatip_q512" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_ingest_measures_every_promised_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = ingest.run(quick=True, directory=tmp_path, progress=quiet)
    assert set(result.figures) >= {"grpc_vs_disk", "inprocess_vs_disk", "commits_per_s"}
    assert min(result.figures.values()) > 0
    ingest.render(result)
    assert "commits_per_s" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
