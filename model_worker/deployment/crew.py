"""The keepers of a cluster: hired where they belong, asked how they are, replaced when their node is gone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from model_worker.deployment.keeper import hire, survey
from model_worker.deployment.placement import Node, home, seat
from model_worker.deployment.plan import NAMESPACE, Copy, Plan, Report, Start, keeper_name
from model_worker.deployment.registry import Registry, map_in

_REPORT_S = 5.0
_STOP_S = 60.0


class Crew:
    """Not for several threads at once; what it found may be read from any."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._handles: dict[Copy, Any] = {}
        self._lost: dict[Copy, float] = {}  # Since when a keeper is gone with its node.
        self._kept: dict[str, dict[Copy, int]] = {}  # Node -> what lies on its disk -> the epoch its service knew.
        self.wanted: tuple[Copy, ...] = ()
        self.reports: dict[Copy, Report] = {}
        self.problems: dict[Copy, str] = {}

    def want(self, copies: Iterable[Copy]) -> None:
        """Which copies there are to be, besides those that are there."""
        self.wanted = tuple(sorted({*copies, *self._handles}))

    def look(self, registry: Registry, start_of: Callable[[Copy], Start]) -> None:
        """Ask every keeper, and hire those that are missing."""
        for copy in self.wanted:
            if copy not in self._handles:
                with suppress(ValueError):
                    self._handles[copy] = ray.get_actor(keeper_name(self._plan.name, copy), namespace=NAMESPACE)
        asked = {copy: handle.report.remote() for copy, handle in self._handles.items()}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=_REPORT_S) if asked else None
        reports: dict[Copy, Report] = {}
        problems: dict[Copy, str] = {}
        for copy, answer in asked.items():
            try:
                reports[copy] = ray.get(answer, timeout=0.1)
                self._lost.pop(copy, None)
            except (ActorUnavailableError, GetTimeoutError):
                problems[copy] = "its keeper does not answer"
            except RayError:
                del self._handles[copy]
                self._lost.setdefault(copy, time.monotonic())
        self.reports, self.problems = reports, problems
        if len(self._handles) < len(self.wanted):
            self._hire(registry, start_of)

    def _hire(self, registry: Registry, start_of: Callable[[Copy], Start]) -> None:
        nodes = self._nodes(registry)
        seats = {copy: report.node for copy, report in self.reports.items()}
        for copy in self.wanted:
            if copy in self._handles:
                continue
            node = home(copy, nodes, seats)
            start = Start.EMPTY if node is not None else start_of(copy)
            if start is Start.NOT:
                self.problems[copy] = self._gone(copy)
                continue
            if node is None and time.monotonic() < self._lost.get(copy, -math.inf) + self._plan.replace_after_s:
                self.problems[copy] = "its node is gone; another takes its place unless it comes back soon"
                continue
            node = node or seat(copy, nodes, seats)
            self._handles[copy] = hire(self._plan, copy, node.id, start)
            self.problems[copy] = "its keeper is starting"
            self._kept.pop(node.id, None)  # It changes from now on.
            seats[copy] = node.id

    def _gone(self, copy: Copy) -> str:
        copies = "its only copy" if self._plan.replicas == 1 else "every copy"
        left = "what no snapshot has" if self._plan.snapshots else "the documents"
        return (
            f"no node has its data: {copies} of shard {copy.shard_id} was on nodes that are gone. Bring one back, or "
            f"give {left} up with `fot up --ray --give-up {copy.shard_id}`"
        )

    def _nodes(self, registry: Registry) -> list[Node]:
        """Living nodes whose services others can reach, and what lies on their disks."""
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        if not self._plan.security.network:
            own = alive[ray.get_runtime_context().get_node_id()]["NodeManagerAddress"]
            alive = {name: node for name, node in alive.items() if node["NodeManagerAddress"] == own}
        self._survey([name for name in alive if name not in self._kept], registry)
        return [Node(name, node["NodeName"], self._kept.get(name, {})) for name, node in alive.items()]

    def _survey(self, nodes: list[str], registry: Registry) -> None:
        for node, kept in survey(self._plan, nodes).items():
            maps = {_copy(name): map_in(text) for name, text in kept.items()}
            for one in maps.values():
                registry.learn(one)
            self._kept[node] = {copy: one.epoch for copy, one in maps.items() if one is not None}

    def dismiss(self, copies: Sequence[Copy], delete_data: bool) -> None:
        """Stop these keepers and their services; those that do not answer are killed."""
        handles = {copy: self._handles.pop(copy) for copy in copies if copy in self._handles}
        stopping = [handle.stop.remote(delete_data) for handle in handles.values()]
        ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_S) if stopping else None
        for handle in handles.values():
            ray.kill(handle, no_restart=True)
        for copy in copies:
            self.reports.pop(copy, None)
            self._lost.pop(copy, None)
        self.wanted = tuple(copy for copy in self.wanted if copy not in copies)


def _copy(name: str) -> Copy:
    shard, _, replica = name.removeprefix("s").partition("-")
    return Copy(int(shard), int(replica))
