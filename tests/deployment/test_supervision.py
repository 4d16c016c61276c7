"""The parts under the actors: where copies go, what an overseer remembers, who ends with whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from memory_service.cluster.place import Lines
from memory_service.errors import DataLoss, Unavailable
from memory_service.places.targets import Address
from memory_service.shards import Shard, ShardMap
from model_worker.deployment.heartbeat import Heartbeat
from model_worker.deployment.memory_cluster import settings_of
from model_worker.deployment.placement import Node, home, seat
from model_worker.deployment.plan import Copy
from model_worker.deployment.registry import Registry, map_in
from model_worker.deployment.service_process import ServiceProcess, environment_of
from tests.deployment.nodes import ROOT
from tests.deployment.traffic import until

MAP = ShardMap(3, (Shard("s0", ("127.0.0.1:1",)),), (Shard("s1", ("127.0.0.1:2",)),), switched=True)


def node(name: str, **kept: int) -> Node:
    """A node whose disk holds copies, by name -> epoch."""
    return Node(name, name, {Copy(*map(int, copy[1:].split("_"))): epoch for copy, epoch in kept.items()})


def test_copies_of_a_shard_are_on_different_nodes_and_all_nodes_have_as_many() -> None:
    nodes = [node("a"), node("b"), node("c")]
    seats: dict[Copy, str] = {}
    for shard in range(3):
        for replica in range(2):
            seats[Copy(shard, replica)] = seat(Copy(shard, replica), nodes, seats).id
    assert sorted(seats.values()) == ["a", "a", "b", "b", "c", "c"]
    assert all(seats[Copy(shard, 0)] != seats[Copy(shard, 1)] for shard in range(3))


def test_with_fewer_nodes_than_replicas_copies_share_one() -> None:
    assert seat(Copy(0, 1), [node("a")], {Copy(0, 0): "a"}).id == "a"


def test_a_copy_goes_where_its_newest_data_lie() -> None:
    nodes = [node("a", s0_0=2), node("b", s0_0=5), node("c")]
    found = home(Copy(0, 0), nodes, {Copy(1, 0): "b", Copy(2, 0): "b"})
    assert found is not None and found.id == "b"
    assert home(Copy(0, 1), nodes, {}) is None


def test_where_nodes_share_a_disk_copies_of_a_shard_still_part() -> None:
    nodes = [node("a", s0_0=2, s0_1=2), node("b", s0_0=2, s0_1=2)]
    found = home(Copy(0, 1), nodes, {Copy(0, 0): "a"})
    assert found is not None and found.id == "b"


def registry(file: Path) -> Registry:
    lines = Lines(lambda authority: Address(authority, authority, None, None))
    return Registry("ray://fot", file, lines.place)


def test_an_overseer_that_comes_back_knows_the_map_and_the_shards_that_were_wanted(tmp_path: Path) -> None:
    file = tmp_path / "fot" / "overseer.json"
    first = registry(file)
    with pytest.raises(Unavailable, match="no shard map yet"):
        first.find(0)
    first.want(4)
    first.learn(MAP)
    again = registry(file)
    assert (again.wanted, again.known, again.find(2)) == (4, MAP, MAP)
    again.learn(ShardMap(2, MAP.shards))
    assert again.known == MAP  # An older map changes nothing.


def test_a_damaged_file_is_said_to_be_and_not_guessed_at(tmp_path: Path) -> None:
    file = tmp_path / "overseer.json"
    file.write_text('{"wanted": 2')
    with pytest.raises(DataLoss, match="remove it"):
        registry(file)


def test_a_service_that_was_told_no_map_keeps_none() -> None:
    assert map_in("") is None
    assert map_in('{"map": null, "shard": "", "behind": false, "whole": 0}') is None


def test_services_take_settings_from_the_environment_and_never_a_token() -> None:
    given = {
        "FOT_TOKEN": "secret",
        "FOT_QUEUE": "9",
        "FOT_LISTEN": "0.0.0.0:1",
        "HOME": "/",
        "FOT_STORE__DEVICE": "cpu",
    }
    assert settings_of(given) == (("FOT_QUEUE", "9"), ("FOT_STORE__DEVICE", "cpu"))


def test_what_is_on_a_leash_ends_with_its_parent_however_that_ends() -> None:
    sleeper = "import sys, time; print('there', flush=True); time.sleep(60)"
    starter = (
        "import subprocess, sys, time; from model_worker.deployment.leash import leashed; "
        f"p = subprocess.Popen(leashed([sys.executable, '-c', {sleeper!r}]), stdout=subprocess.PIPE, text=True); "
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as lines:
        child = psutil.Process(int(lines.readline()))
        assert child.is_running()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 10.0)


BEATING = (
    "import os, socket, sys, time; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); "
    "beats, rest = int(sys.argv[1]), float(sys.argv[2]); "
    "[(s.sendto(b'WATCHDOG=1', os.environ['NOTIFY_SOCKET']), time.sleep(0.1)) for _ in range(beats)]; time.sleep(rest)"
)


@pytest.mark.parametrize(
    ("beats", "rest_s", "hangs"),
    [(3, 60, True), (20, 0, False), (0, 2, False)],
    ids=["beats and falls silent", "beats to its end", "is still starting"],
)
def test_a_process_that_falls_silent_is_ended_and_no_other(beats: int, rest_s: float, hangs: bool) -> None:
    with Heartbeat(1.0) as heartbeat:
        command = [sys.executable, "-c", BEATING, str(beats), str(rest_s)]
        process = subprocess.Popen(command, env=os.environ | heartbeat.environment, text=True)
        assert heartbeat.watch(process) is hangs
    assert process.returncode == (-signal.SIGKILL if hangs else 0)


def test_a_service_that_hangs_is_started_again_at_its_address(tmp_path: Path) -> None:
    environment = environment_of({"FOT_DRAIN_GRACE_S": "0.2"}) | {"PYTHONPATH": str(ROOT)}
    service = ServiceProcess(tmp_path / "data", "127.0.0.1", (), environment, hung_after_s=3.0)
    try:
        until(lambda: bool(service.address))
        before = (service.address, service.pid)
        os.kill(service.pid, signal.SIGSTOP)
        until(lambda: "it was silent for 3 s" in service.problem or service.starts == 2)
        until(lambda: bool(service.address))
        assert service.address == before[0] and service.pid != before[1]
    finally:
        service.stop(10.0)
    assert not psutil.pid_exists(before[1])
