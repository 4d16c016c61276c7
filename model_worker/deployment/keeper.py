"""The actor that keeps one service: Ray restarts the actor on its node, the actor restarts the process."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from model_worker.deployment.plan import NAMESPACE, Copy, Plan, Report, Start, keeper_name
from model_worker.deployment.service_process import ServiceProcess, environment_of

MEMBERSHIP = "cluster.json"  # What a service remembers of its cluster, in its directory.
_LOOPBACK = "127.0.0.1"
_DRAIN_S = 30.0


class Keeper:
    """Keeps one copy of a shard on the node it runs on."""

    def __init__(self, plan: Plan, copy: Copy, start: Start):
        node = _own_node()
        security = plan.security
        host = node["NodeManagerAddress"] if security.network else _LOOPBACK
        given = {
            "--tokens": security.tokens,
            "--tls-certificate": security.tls_certificate,
            "--tls-key": security.tls_key,
            "--tls-client-ca": security.tls_client_ca,
            "--snapshots": plan.snapshots,
        }
        arguments = [part for name, value in given.items() if value is not None for part in (name, value)]
        if security.insecure:
            arguments.append("--insecure")
        if start is Start.SNAPSHOTS:
            arguments += ["--begin-from-snapshots", "--begin-from-shard", copy.shard_id]
        self._node = node
        directory = plan.directory(node["NodeName"]) / str(copy)
        environment = environment_of(dict(plan.settings))
        self._service = ServiceProcess(directory, _bracketed(host), arguments, environment, plan.hung_after_s)

    def report(self) -> Report:
        """How the service is now."""
        service = self._service
        return Report(
            node=self._node["NodeID"],
            node_name=self._node["NodeName"],
            directory=str(service.directory),
            address=service.address,
            pid=service.pid,
            starts=service.starts,
            problem=service.problem,
        )

    def stop(self, delete_data: bool) -> None:
        """Let calls under way finish and end the service; with `delete_data` nothing of it stays on the node."""
        self._service.stop(_DRAIN_S)
        if delete_data:
            directory = self._service.directory
            shutil.rmtree(directory, ignore_errors=True)
            directory.with_name(directory.name + ".port").unlink(missing_ok=True)
            with suppress(OSError):
                directory.parent.rmdir()  # If it was the last.


def hire(plan: Plan, copy: Copy, node: str, start: Start = Start.EMPTY) -> Any:
    """Start the keeper of a copy on a node (by id), or find the one there is. Gives the actor's handle.

    `start` says how its service begins if there are no data of it on the node.

    Without the node there is no keeper: the data lies on its disk, and where else it could be is not Ray's to know.
    """
    return (
        ray.remote(Keeper)
        .options(
            name=keeper_name(plan.name, copy),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            num_gpus=plan.gpus,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=4,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(plan, copy, start)
    )


def survey(plan: Plan, nodes: list[str]) -> dict[str, dict[str, str]]:
    """What lies on the disks of nodes (by id): copy -> what its service remembers of its cluster; "" if nothing.

    Nodes that do not answer in time are left out.
    """
    look = ray.remote(num_cpus=0, max_retries=0)(_kept)
    asked = {
        node: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(plan)
        for node in nodes
    }
    found = {}
    for node, answer in asked.items():
        with suppress(ray.exceptions.RayError):
            found[node] = ray.get(answer, timeout=30.0)
    return found


def _kept(plan: Plan) -> dict[str, str]:
    directory = plan.directory(_own_node()["NodeName"])
    return {one.name: _text(one / MEMBERSHIP) for one in directory.glob("s*-*") if one.is_dir()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _own_node() -> dict[str, Any]:
    own = ray.get_runtime_context().get_node_id()
    return next(node for node in ray.nodes() if node["NodeID"] == own)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
