"""The options that name a cluster and its workers mean what they say, and contradictions are told before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from memory_service.cli.main import app
from memory_service.errors import InvalidArgument
from model_worker.cli.crew import address_of, crew_of, device_of, model_of, token_of
from model_worker.deployment.pool import Crew
from model_worker.deployment.runtime import Cluster

CLUSTER = Cluster("10.0.0.1:6379", ours=False, nodes=3, cpus=8.0, gpus=2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["ingest", ".", "--model", "reference", "--memory", ":memory:", "--ray"],
            "cannot share the memory ':memory:'",
        ),
        (["ingest", ".", "--model", "reference", "--memory", "./data", "--ray"], "cannot share the memory './data'"),
        (["ingest", ".", "--model", "reference", "--workers", "2"], "--workers is about workers on a cluster"),
        (["passkey", "--tokens", "2000", "--memory", "./data", "--ray"], "cannot share the memory './data'"),
        (["passkey", "--address", "10.0.0.1:6379"], "--address is about workers on a cluster"),
        (["eval", "lookup", "--memory", "./data", "--ray"], "cannot share the memory './data'"),
        (["eval", "lookup", "--cpus-per-worker", "2"], "--cpus-per-worker is about workers on a cluster"),
        (["train", "any.toml", "--workers", "2"], "--workers is about workers on a cluster"),
    ],
)
def test_contradictions_are_told_before_any_work(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, InvalidArgument) and message in done.exception.message


def test_workers_are_a_number_or_two_and_by_default_what_the_cluster_holds() -> None:
    assert crew_of("4", None, None, CLUSTER) == Crew(4, 4)
    assert crew_of("2-6", 2.0, 0.5, CLUSTER) == Crew(2, 6, 2.0, 0.5)
    assert crew_of(None, None, None, CLUSTER) == Crew(1, 8)
    assert crew_of(None, 2.0, 1.0, CLUSTER) == Crew(1, 2, 2.0, 1.0)  # As many as it has GPUs.
    assert crew_of(None, None, None, CLUSTER, tasks=3) == Crew(1, 3)
    for wrong in ("", "-2", "2-", "two", "2-1"):
        with pytest.raises(InvalidArgument):
            crew_of(wrong, None, None, CLUSTER)


def test_who_names_a_memory_on_a_cluster_means_that_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert address_of(None, "ray://main") == "auto"
    assert address_of("10.0.0.1:6379", "ray://main") == "10.0.0.1:6379"
    assert address_of(None, "grpc://10.0.0.1:7070") is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert address_of(None, "ray://main") is None  # Which Ray reads itself.


def test_a_worker_with_a_gpu_uses_it_unless_told_otherwise() -> None:
    assert device_of(None, 0.5) == "cuda"
    assert device_of("cpu", 0.5) == "cpu"
    assert device_of(None, None) is None


def test_what_other_nodes_lack_is_sent_or_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "config.json").write_text("{}")
    assert token_of(tmp_path / "token") == "secret"
    with pytest.raises(InvalidArgument, match="cannot be read"):
        token_of(tmp_path / "absent")
    assert model_of("reference") == "reference"
    monkeypatch.chdir(tmp_path.parent)
    assert model_of(tmp_path.name) == str(tmp_path.resolve())
