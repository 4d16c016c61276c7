"""Services and whole nodes that die under a memory that Ray keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from memory_service import Client, Coverage, Unavailable
from memory_service.cluster.caretaker import Caretaker
from model_worker.deployment import memory_cluster
from model_worker.deployment.plan import NAMESPACE, Copy, keeper_name
from tests.deployment.nodes import RayNodes
from tests.deployment.traffic import (
    kill,
    opened,
    plan,
    put,
    queries,
    reports,
    running,
    same_as_one,
    tokens,
    traffic,
    until,
    until_ready,
)
from tests.memory_service.clusters import LAYER

pytestmark = pytest.mark.timeout(900)  # Processes that import torch, on however busy a machine.
NAMES = [f"document-{number}" for number in range(30)]


@pytest.mark.slow
def test_with_two_replicas_a_killed_service_a_killed_keeper_and_a_lost_node_fail_no_call_and_lose_and_double_nothing(
    ray_cluster: RayNodes, tmp_path: Path
) -> None:
    wanted = plan("twice", tmp_path, shards=2, replicas=2)
    with ray_cluster.whole_again(), running(wanted) as state, opened("twice") as memory:
        for shard in range(2):
            homes = {one.report.node for one in state.copies if one.copy.shard == shard and one.report}
            assert len(homes) == 2  # No node holds both copies of a shard.
        put(memory, NAMES)
        with traffic("twice", NAMES) as met:
            met.more()
            victim = next(one.report for one in state.copies if one.report and one.report.node_name == "head")
            kill(victim)
            met.more()
            until(lambda: any(one.address == victim.address and one.pid != victim.pid for one in reports("twice")))
            until_ready("twice")
            keeper = ray.get_actor(keeper_name("twice", Copy(1, 0)), namespace=NAMESPACE)
            ray.kill(keeper, no_restart=False)
            met.more()
            until(lambda: not memory_cluster.state_of("twice").ready)
            until_ready("twice")
            ray_cluster.remove("node-1")
            met.more()
            until(lambda: all(one.node_name != "node-1" for one in reports("twice")))
            until(lambda: memory_cluster.state_of("twice").ready and len(reports("twice")) == 4)
            met.more()
        same_as_one(memory, [*NAMES, *met.written])
        with Caretaker.open("ray://twice") as caretaker:
            status = caretaker.status()
            assert status.whole
            assert status.documents == len(NAMES) + len(met.written)
            assert {one.node for shard in status.shards for one in shard.replicas} == {"head", "node-2"}


@pytest.mark.slow
def test_with_one_replica_a_lost_node_is_an_error_or_exact_coverage_until_its_disk_is_back(
    ray_cluster: RayNodes, tmp_path: Path
) -> None:
    wanted = plan("once", tmp_path, shards=2, replicas=1)
    with ray_cluster.whole_again(), running(wanted) as state, opened("once") as memory:
        put(memory, NAMES)
        with Caretaker.open("ray://once") as caretaker:
            shards = caretaker.map
        lost = next(one for one in state.copies if one.report and one.report.node_name == "node-1")
        gone = [name for name in NAMES if shards.owner("m", name).id == lost.copy.shard_id]
        left = [name for name in NAMES if name not in gone]
        with opened("once", "?on_missing=degrade") as degrading:
            same_as_one(degrading, NAMES)
            ray_cluster.remove("node-1")
            until(lambda: "no node has its data" in memory_cluster.told(memory_cluster.state_of("once")))
            with Caretaker.open("ray://once") as caretaker:
                problems = [one.problem for shard in caretaker.status().shards for one in shard.replicas]
            assert [
                one for one in problems if f"only copy of shard {lost.copy.shard_id} was on nodes that are gone" in one
            ]
            answer = degrading.attend(LAYER, queries())
            assert answer.coverage == Coverage(tokens(left), tokens(NAMES), (lost.copy.shard_id,))
        with pytest.raises(Unavailable, match=f"no replica of shard {lost.copy.shard_id} answers"):
            memory.attend(LAYER, queries(), timeout_s=2.0)
        same_as_one(memory, left, scope=left)
        ray_cluster.add("node-1")
        until_ready("once")
        same_as_one(memory, NAMES)


@pytest.mark.slow
def test_a_shard_that_is_given_up_begins_with_its_newest_snapshot(ray_cluster: RayNodes, tmp_path: Path) -> None:
    wanted = plan("kept", tmp_path, shards=2, replicas=1, snapshots=str(tmp_path / "snapshots"))
    with ray_cluster.whole_again(), running(wanted) as state, opened("kept") as memory:
        put(memory, NAMES[:20])
        with Client.open("ray://kept") as client:
            client.wait(memory.snapshot("monday"))
        put(memory, NAMES[20:])
        lost = next(one.copy for one in state.copies if one.report and one.report.node_name == "node-1")
        with Caretaker.open("ray://kept") as caretaker:
            gone = [name for name in NAMES[20:] if caretaker.map.owner("m", name).id == lost.shard_id]
        assert gone
        ray_cluster.remove("node-1")
        until(lambda: "give what no snapshot has up" in memory_cluster.told(memory_cluster.state_of("kept")))
        memory_cluster.bring_up(wanted, give_up=[lost.shard])
        until(lambda: len(reports("kept")) == 2)
        until_ready("kept")
        same_as_one(memory, [name for name in NAMES if name not in gone])
        put(memory, gone)
        same_as_one(memory, NAMES)
