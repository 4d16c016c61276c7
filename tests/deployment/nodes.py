"""A Ray of several nodes on this machine, for tests: nodes come and go, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
NAMESPACE = "tests"
_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),  # Workers must find this checkout, whatever is installed.
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # As Ray will have it by default; it warns otherwise.
    # A node is gone when it was silent for a second and a half, not for fifteen.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
    # Serve asks another replica if one does not say in time how busy it is; on a busy machine 0.1 s is no time.
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "3",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "6",
    # Serve starts a proxy anew that is not ready in three times this; on a busy machine no proxy would ever be.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "FOT_DRAIN_GRACE_S": "0.2",
    "FOT_ATTEND_THREADS": "1",
}
_NODE = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}
_GONE_S = 20.0


@dataclass(slots=True)
class RayNodes:
    """A running Ray. The test process is a driver on the head, which stays."""

    cluster: Cluster
    directory: Path  # Of Ray's sockets and logs.
    nodes: dict[str, Any] = field(default_factory=dict)  # By name, without the head.

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, name: str, **given: Any) -> None:
        """Start a node of that name; given are Ray's own options, as num_cpus=1."""
        self.nodes[name] = self.cluster.add_node(node_name=name, **(_NODE | given))

    def remove(self, name: str) -> None:
        """Kill a node and everything that runs on it."""
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)

    @contextmanager
    def whole_again(self) -> Iterator[None]:
        """Nodes that are removed meanwhile are put back, under their names."""
        before = tuple(self.nodes)
        try:
            yield
        finally:
            for name in before:
                if name not in self.nodes:
                    self.add(name)

    @property
    def processes(self) -> list[psutil.Process]:
        """What runs because of this Ray: its own processes, its workers and theirs."""
        return [one for one in psutil.process_iter() if _environment(one).get("RAY_TMPDIR") == str(self.directory)]


@contextmanager
def ray_nodes(workers: int, **given: Any) -> Iterator[RayNodes]:
    """A head called "head" and workers called "node-1", "node-2", …; this process is connected to it meanwhile."""
    # Short: Unix sockets in it have paths of at most 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
    told = _ENVIRONMENT | {"RAY_TMPDIR": str(directory)}
    before = {name: os.environ.get(name) for name in (*told, "RAY_ADDRESS")}
    os.environ.update(told)
    (directory / "ray").mkdir()
    cluster = Cluster(
        initialize_head=True, head_node_args=_NODE | {"node_name": "head", "include_log_monitor": False} | given
    )
    nodes = RayNodes(cluster, directory)
    try:
        for number in range(workers):
            nodes.add(f"node-{number + 1}", **given)
        os.environ["RAY_ADDRESS"] = nodes.address
        ray.init(address=nodes.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        yield nodes
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        left = _left(nodes)
        for one in left:
            one.kill()
        shutil.rmtree(directory, ignore_errors=True)
    assert not left, f"left behind: {left}"


def _left(nodes: RayNodes) -> list[psutil.Process]:
    """What is still there after a while."""
    own = os.getpid()
    until = time.monotonic() + _GONE_S
    while left := [one for one in nodes.processes if one.pid != own]:
        if time.monotonic() > until:
            return left
        time.sleep(0.1)
    return []


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except (psutil.Error, OSError):
        return {}
