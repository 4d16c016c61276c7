"""A memory under Ray that grows while it is read."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from memory_service import Unavailable
from memory_service.cluster.caretaker import Caretaker
from model_worker.deployment import memory_cluster
from tests.deployment.nodes import RayNodes
from tests.deployment.traffic import opened, plan, put, running, same_as_one, traffic, until, until_ready

pytestmark = pytest.mark.timeout(300)  # Processes that import torch, on however busy a machine.
NAMES = [f"document-{number}" for number in range(60)]


def test_1_2_and_4_shards_answer_as_one_memory_and_growing_moves_no_more_than_it_must_under_a_reader(
    ray_cluster: RayNodes, tmp_path: Path
) -> None:
    one = plan("growing", tmp_path, shards=1, replicas=1)
    with running(one), opened("growing") as memory, Caretaker.open("ray://growing") as caretaker:
        put(memory, NAMES)
        same_as_one(memory, NAMES)
        with traffic("growing", NAMES, writes=False) as met:
            for shards in (2, 4):
                before = _places(caretaker)
                memory_cluster.bring_up(replace(one, shards=shards))
                until_ready("growing")
                after = _places(caretaker)
                assert len(set(after.values())) == shards
                moved = [name for name in NAMES if after[name] != before[name]]
                # What moved went to new shards alone: half of all documents, give or take chance.
                assert {after[name] for name in moved}.isdisjoint(before.values())
                assert 0.25 * len(NAMES) < len(moved) < 0.75 * len(NAMES)
                same_as_one(memory, NAMES)
                _kill_overseer()
                assert memory_cluster.state_of("growing").shards == shards  # It remembers what was wanted.
            met.more(written=0)
        assert [shard.replicas[0].documents for shard in caretaker.status().shards] == [
            list(after.values()).count(shard.addresses[0]) for shard in caretaker.map.shards
        ]


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
