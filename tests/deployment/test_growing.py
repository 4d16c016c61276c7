"""A memory under Ray that grows while it is read."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from memory_service import Memory, Unavailable
from memory_service.cluster.caretaker import Caretaker
from model_worker.deployment import memory_cluster
from model_worker.deployment.plan import Plan
from tests.deployment.nodes import RayNodes
from tests.deployment.traffic import opened, plan, put, reports, running, same_as_one, traffic, until, until_ready

pytestmark = pytest.mark.timeout(300)  # Processes that import torch, on however busy a machine.
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
