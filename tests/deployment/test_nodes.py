"""The Ray that the tests of this room share."""

from __future__ import annotations

import ray

from tests.deployment.nodes import RayNodes


def test_the_tests_run_on_a_ray_of_three_nodes_whose_workers_find_this_checkout(ray_cluster: RayNodes) -> None:
    @ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
    def where() -> tuple[str, str]:
        import memory_service.v1

        return ray.get_runtime_context().get_node_id(), str(memory_service.v1.__file__)

    nodes = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"]}
    assert sorted(nodes.values()) == ["head", "node-1", "node-2"]
    node, path = ray.get(where.remote())
    assert node in nodes
    import memory_service.v1

    assert path == memory_service.v1.__file__
