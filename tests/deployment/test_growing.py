"""A memory under Ray that grows while it is read."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from memory_service import Client, Memory, Unavailable
from memory_service.cluster.caretaker import Caretaker
from memory_service.verbs import GetShardMap
from model_worker.deployment import memory_cluster
from model_worker.deployment.plan import Plan
from tests.deployment.nodes import RayNodes
from tests.deployment.traffic import kill, opened, plan, put, reports, running, same_as_one, traffic, until, until_ready

pytestmark = pytest.mark.timeout(900)  # Processes that import torch, on however busy a machine.
NAMES = [f"document-{number}" for number in range(60)]


@pytest.mark.slow
def test_1_2_and_4_shards_answer_as_one_memory_while_it_grows_and_shrinks_under_a_reader(
    ray_cluster: RayNodes, tmp_path: Path
) -> None:
    one = plan("growing", tmp_path, shards=1, replicas=1)
    with running(one), opened("growing") as memory, Caretaker.open("ray://growing") as caretaker:
        put(memory, NAMES)
        same_as_one(memory, NAMES)
        with traffic("growing", NAMES, writes=False) as met:
            _grow(replace(one, shards=2), memory, caretaker)
            _kill_overseer()
            assert memory_cluster.state_of("growing").shards == 2  # It remembers what was wanted.
            _grow(replace(one, shards=4), memory, caretaker)
            places = list(_places(caretaker).values())
            held = {shard.replicas[0].address: shard.replicas[0].documents for shard in caretaker.status().shards}
            assert held == {address: places.count(address) for address in held}
            met.more(written=0)
            memory_cluster.bring_up(one)
            until_ready("growing")
            until(lambda: len(reports("growing")) == 1)
            met.more(written=0)
        same_as_one(memory, NAMES)


@pytest.mark.slow
def test_a_service_that_comes_back_elsewhere_while_documents_move_is_found_and_they_go_on(
    ray_cluster: RayNodes, tmp_path: Path
) -> None:
    one = plan("restless", tmp_path, shards=1, replicas=1)
    names = [f"document-{number}" for number in range(1500)]
    with running(one) as state, opened("restless") as memory, Caretaker.open("ray://restless") as caretaker:
        put(memory, names)
        (first,) = (copy.report for copy in state.copies if copy.report)
        memory_cluster.bring_up(replace(one, shards=2))
        until(lambda: memory_cluster.state_of("restless").doing.startswith("moving documents: "))
        for port in tmp_path.rglob("*.port"):
            if port.read_text() == first.address.rpartition(":")[2]:
                port.unlink()  # Without it the service comes back at another port.
        kill(first)
        (other,) = {report.address for report in reports("restless")} - {first.address}
        with Client.open(f"grpc://{other}") as client:
            told = client.connection.run(GetShardMap()).map
            assert told is not None
            assert told.also, "the documents had moved before the service was killed"
        until_ready("restless")
        assert first.address not in caretaker.map.addresses
        assert not caretaker.map.also
        same_as_one(memory, names)


def _grow(wanted: Plan, memory: Memory, caretaker: Caretaker) -> None:
    """To twice as many shards: half of all documents move, give or take chance, and to the new shards alone."""
    before = _places(caretaker)
    memory_cluster.bring_up(wanted)
    until_ready(wanted.name)
    after = _places(caretaker)
    assert set(after.values()) == set(caretaker.map.addresses)
    assert len(caretaker.map.shards) == wanted.shards
    moved = [name for name in NAMES if after[name] != before[name]]
    assert {after[name] for name in moved}.isdisjoint(before.values())
    assert 0.25 * len(NAMES) < len(moved) < 0.75 * len(NAMES)
    same_as_one(memory, NAMES)


def _kill_overseer() -> None:
    """kill -9; returns when Ray has brought it back."""
    killed = memory_cluster.state_of("growing").pid
    os.kill(killed, signal.SIGKILL)
    until(lambda: _overseer_pid() not in (0, killed))


def _overseer_pid() -> int:
    try:
        return memory_cluster.state_of("growing").pid
    except Unavailable:
        return 0


def _places(caretaker: Caretaker) -> dict[str, str]:
    """The service that owns each document, by address."""
    return {name: caretaker.map.owner("m", name).addresses[0] for name in NAMES}
