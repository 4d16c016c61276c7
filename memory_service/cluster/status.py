"""How a cluster is: its processes, what they hold, and how much each replica lacks that another has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memory_service.cluster.copying import holding, memories_at
from memory_service.cluster.directory import Note, members_of
from memory_service.cluster.healing import differences as differences_of
from memory_service.cluster.place import Lines
from memory_service.errors import FotError
from memory_service.shards import Member, Shard, ShardMap
from memory_service.types.memories import Stats
from memory_service.verbs import GetStats

_CALL_S = 60.0


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One process."""

    address: str
    up: bool
    behind: bool  # It may lack writes, and answers no reads.
    epoch: int  # Of the map it knows; 0: none.
    documents: int
    tokens: int
    bytes: int
    lag: int  # Changes of documents it lacks that another replica has.
    problem: str = ""  # Why it does not answer.
    node: str = ""  # Where it runs; empty if the directory does not know.


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """One shard."""

    id: str
    replicas: tuple[ReplicaStatus, ...]

    @property
    def answers(self) -> bool:
        return any(one.up and not one.behind for one in self.replicas)

    @property
    def whole(self) -> bool:
        """Whether all replicas are there and hold the same."""
        return all(one.up and not one.behind and not one.lag for one in self.replicas)


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """A cluster. Figures count what the caretaker's tokens may see, each document once."""

    epoch: int
    moving: bool
    shards: tuple[ShardStatus, ...]
    documents: int
    tokens: int
    bytes: int

    @property
    def whole(self) -> bool:
        return all(shard.whole for shard in self.shards)


def status_of(
    shards: ShardMap, tenants: Sequence[Lines], notes: Mapping[str, Note], differences: bool
) -> ClusterStatus:
    """How the processes of a map are. Comparing replicas (`differences`) lists all their documents."""
    members = members_of(shards.addresses, tenants[0].place)
    listed: list[ShardStatus] = []
    totals = [0, 0, 0]
    for shard in shards.everyone:
        there = [address for address in shard.addresses if isinstance(members[address], Member)]
        lags = _lags(shards, shard, there, tenants) if differences and len(shard.addresses) > 1 else {}
        replicas = []
        for address in shard.addresses:
            member, note = members[address], notes.get(address, Note())
            if isinstance(member, FotError):
                problem = note.problem or member.message
                replicas.append(ReplicaStatus(address, False, False, 0, 0, 0, 0, 0, problem, note.node))
                continue
            found = _stats(address, shards, shard, tenants)
            epoch = member.map.epoch if member.map else 0
            figures = (found.documents, found.tokens, found.bytes)
            lag = lags.get(address, 0)
            replicas.append(ReplicaStatus(address, True, member.behind, epoch, *figures, lag, node=note.node))
        listed.append(ShardStatus(shard.id, tuple(replicas)))
        if shard in shards.shards and there:
            best = max(replicas, key=lambda one: (one.up and not one.behind, one.documents))
            totals = [a + b for a, b in zip(totals, (best.documents, best.tokens, best.bytes), strict=True)]
    return ClusterStatus(shards.epoch, bool(shards.also), tuple(listed), *totals)


def _stats(address: str, shards: ShardMap, shard: Shard, tenants: Sequence[Lines]) -> Stats:
    layout = shards.shards if shard in shards.shards else shards.also
    placement = ShardMap(1, layout).placement(shard)
    found = [lines.place(address).run(GetStats("", placement), _CALL_S) for lines in tenants]
    names = [name for name in Stats.__dataclass_fields__ if name != "memory"]
    return Stats("", **{name: sum(getattr(one, name) for one in found) for name in names})


def _lags(shards: ShardMap, shard: Shard, addresses: Sequence[str], tenants: Sequence[Lines]) -> dict[str, int]:
    """How many changes each replica lacks that another has."""
    lags = dict.fromkeys(addresses, 0)
    for lines in tenants:
        infos = {name: one for a in addresses for name, one in memories_at(lines.place(a)).items()}
        for memory in infos.values():
            held = {address: holding(lines.place(address), memory.name) for address in addresses}
            for one in differences_of(shards, shard, memory, held):
                for address in one.targets:
                    lags[address] += 1
    return lags
