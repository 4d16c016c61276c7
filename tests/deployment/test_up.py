"""`fot up`, `fot status` and `fot down`, as commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from memory_service import FotError, InvalidArgument, Memory, NotFound, Tls
from memory_service.server.auth import TokenFile
from memory_service.types.callers import Role
from model_worker.deployment import memory_cluster
from model_worker.deployment.connection import clusters
from model_worker.deployment.local_ray import LocalRay
from tests.command import Fot
from tests.deployment.nodes import RayNodes
from tests.deployment.traffic import plan
from tests.memory_service.clusters import SPEC
from tests.memory_service.test_tls import Authority

pytestmark = pytest.mark.timeout(900)  # Processes that import torch, on however busy a machine.


@pytest.fixture
def fot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fot:
    for name in ("FOT_DRAIN_GRACE_S", "FOT_ATTEND_THREADS"):
        monkeypatch.setenv(name, "1")
    return Fot(monkeypatch, capsys)


def test_a_cluster_with_tls_and_tokens_comes_up_tells_how_it_is_and_leaves_nothing_behind(
    ray_cluster: RayNodes, fot: Fot, tmp_path: Path
) -> None:
    host = ray.util.get_node_ip_address()
    authority = Authority("the cluster's")
    certificate, key = authority.issue(host)
    for name, content in (("ca.pem", authority.pem), ("cert.pem", certificate), ("key.pem", key)):
        (tmp_path / name).write_bytes(content)
    secret = TokenFile(tmp_path / "tokens.json").create("caretaker", "default", Role.ADMIN)
    (tmp_path / "admin").write_text(secret)
    there = ("--token-file", tmp_path / "admin", "--ca", tmp_path / "ca.pem")
    files = ("--tokens", tmp_path / "tokens.json", "--tls-certificate", tmp_path / "cert.pem", "--tls-key",
             tmp_path / "key.pem")  # fmt: skip
    data = f"{tmp_path}/{{node}}"
    up = ("up", "--ray", "--name", "told", "--shards", 1, "--replicas", 1, "--data", data)
    done = fot(*up, *files, *there, "--json")
    assert done.code == 0, done.err
    (copy,) = done.json["copies"]
    assert copy["report"]["address"].startswith(f"{host}:")

    with pytest.raises(InvalidArgument, match="speak TLS"):
        Memory.open("ray://told", "m", SPEC)
    with pytest.raises(InvalidArgument, match="ask for a token"):
        Memory.open("ray://told", "m", SPEC, tls=Tls(ca=tmp_path / "ca.pem"))
    done = fot("status", "--target", "ray://told", *there)
    assert done.code == 0, done.err
    assert f"{copy['report']['address']} on head" in done.out
    assert fot("memory", "ls", "--target", "ray://told", *there).code == 0

    assert fot(*up[:-4], "--replicas", 2).err.endswith("only the number of its shards can change\n")
    assert "called 'other' runs on this Ray; there is told" in fot("status", "--target", "ray://other").err

    assert not [one for one in _command_lines() if secret in one]
    assert not [path for path in ray_cluster.directory.rglob("*.log") if secret in path.read_text(errors="replace")]

    done = fot("down", "--name", "told", "--delete-data")
    assert done.out == "ray://told is down and deleted\n"
    assert clusters() == []
    assert not psutil.pid_exists(copy["report"]["pid"])
    assert not [path for path in tmp_path.glob("*/told/**/*") if path.is_file()]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "say who supervises"),
        (("--ray", "--name", "No!"), "a cluster's name is small letters"),
        (("--ray", "--replicas", 99), "a shard has 1 to 16 replicas"),
        (("--ray", "--tls-key", "key.pem"), "TLS needs both"),
        (("--ray", "--tokens", "tokens.json"), "give --token-file"),
        (("--ray", "--give-up", "one"), "--give-up takes a shard"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_starts_nothing(
    ray_cluster: RayNodes, fot: Fot, arguments: tuple[Any, ...], told: str
) -> None:
    done = fot("up", *arguments)
    assert done.code == 1
    assert told in done.err
    assert clusters() == []


def test_several_machines_without_tls_and_tokens_are_refused(
    ray_cluster: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [{"Alive": True, "NodeManagerAddress": host} for host in ("10.0.0.1", "10.0.0.2")]
    monkeypatch.setattr(ray, "nodes", lambda: two)  # The tests' nodes are one machine.
    with pytest.raises(InvalidArgument, match="several machines"):
        memory_cluster.bring_up(plan("open", tmp_path, 1, 1))


def test_a_cluster_that_is_not_there_is_not_found(ray_cluster: RayNodes) -> None:
    with pytest.raises(NotFound, match="no memory cluster called 'nobody'"):
        Memory.open("ray://nobody", "m", SPEC)
    with pytest.raises(FotError, match="names several clusters"):
        Memory.open("ray://one,two", "m", SPEC)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment without a Ray; one that is started in it ends with the test."""
    left_out = ("RAY_ADDRESS", "RAY_TMPDIR")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), "FOT_DRAIN_GRACE_S": "0.2"}
    yield environment
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path))
        if (left := LocalRay.running()) is not None:
            left.stop()
            pytest.fail("the Ray that fot up started still ran")


@pytest.mark.slow
def test_where_no_ray_is_fot_up_starts_one_and_fot_down_ends_it(home: dict[str, str], tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "memory_service.cli", *arguments]
        return subprocess.run(command, env=home, capture_output=True, text=True, check=False, timeout=200)

    assert "there is no Ray here" in run("status", "--target", "ray://fot").stderr
    done = run("up", "--ray", "--data", f"{tmp_path}/data")
    assert done.returncode == 0, done.stderr
    assert "ray://fot is up: 1 shard of 1 replica" in done.stdout
    found = json.loads((tmp_path / "fot" / "ray.json").read_text())
    pids = [found["pid"], *(child.pid for child in psutil.Process(found["pid"]).children(recursive=True))]
    done = run("status", "--target", "ray://fot", "--json")
    assert json.loads(done.stdout)["shards"][0]["replicas"][0]["up"]
    assert run("down").stdout == "ray://fot is down; Ray too\n"
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert not Path(found["directory"]).exists()
    assert (tmp_path / "data" / "fot" / "s0-0").is_dir()


def _command_lines() -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found
