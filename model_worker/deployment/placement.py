"""On which node a copy is to be: where its data lies, and away from the shard's other copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model_worker.deployment.plan import Copy


@dataclass(frozen=True, slots=True)
class Node:
    """A living node of the Ray cluster."""

    id: str
    name: str
    kept: Mapping[Copy, int]  # What lies on its disk: the epoch of the map that the copy's service knew last.


def home(copy: Copy, nodes: Sequence[Node], seats: Mapping[Copy, str]) -> Node | None:
    """The node that has the copy's data as of the newest map; None if none has.

    `seats` are where the other copies are, by node id: they decide where nodes share a disk.
    """
    newest = max((node.kept.get(copy, 0) for node in nodes), default=0)
    return seat(copy, [node for node in nodes if node.kept.get(copy, 0) == newest], seats) if newest else None


def seat(copy: Copy, nodes: Sequence[Node], seats: Mapping[Copy, str]) -> Node:
    """A node without another copy of the shard if there is one, and with few copies of any."""
    siblings = {node for other, node in seats.items() if other.shard == copy.shard}
    load = list(seats.values())
    return min(nodes, key=lambda node: (node.id in siblings, load.count(node.id), node.name, node.id))
