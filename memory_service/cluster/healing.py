"""Replicas of a shard made equal: each gets the newest state of every document that any of them has."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from memory_service.cluster.copying import CALL_S, Holding, copy, delete, holding, memories_at, owned, predates
from memory_service.errors import NotFound
from memory_service.places.remote import RemotePlace
from memory_service.shards import Shard, ShardMap
from memory_service.types.documents import DocumentInfo
from memory_service.types.memories import MemoryInfo
from memory_service.verbs import CreateMemory, DeleteMemory


@dataclass(slots=True)
class Healed:
    """What healing did."""

    copied: int = 0  # Documents.
    deleted: int = 0  # Documents.
    bytes: int = 0  # Of keys and values copied.

    @property
    def changed(self) -> bool:
        return bool(self.copied or self.deleted)


@dataclass(frozen=True, slots=True)
class Difference:
    """A document that some replicas do not have in its newest state."""

    memory: str
    document: str
    newest: DocumentInfo | None  # None: it is deleted.
    generation: int  # Of the newest state, or of the deletion.
    source: str  # Who has the newest state.
    targets: tuple[str, ...]


Places = Mapping[str, RemotePlace]
SETTLE_S = 0.5  # What is told to all replicas has reached all of them by then.


def differences(shards: ShardMap, shard: Shard, memory: MemoryInfo, held: Mapping[str, Holding]) -> list[Difference]:
    """What the replicas of a shard lack of one memory."""
    found: list[Difference] = []
    for name in sorted({name for one in held.values() for name in (*one.alive, *one.dead)}):
        if not owned(shards, shard.id, memory.name, name):
            continue
        alive = {address: one.alive[name] for address, one in held.items() if name in one.alive}
        old = [one.generation for one in alive.values() if predates(one, memory)]
        dead = max([*(one.dead.get(name, 0) for one in held.values()), *old])
        source = max(alive, key=lambda address: alive[address].generation, default="")
        if source and alive[source].generation > dead:
            newest = alive[source]
            targets = tuple(a for a, one in held.items() if one.newest(name) < newest.generation)
            if targets:
                found.append(Difference(memory.name, name, newest, newest.generation, source, targets))
        elif targets := tuple(a for a, one in held.items() if one.dead.get(name, 0) < dead):
            found.append(Difference(memory.name, name, None, dead, "", targets))
    return found


def heal_shard(
    shards: ShardMap,
    shard: Shard,
    places: Places,
    current: Collection[str],
    done: Healed,
    advance: Callable[[int, int], None],
) -> None:
    """Make the replicas that are there equal, for the memories the places' token sees.

    `current` are those that lack nothing but what is on its way to them. Safe while writes go on; run again if cut off.
    """
    for memory in _agreed_memories(places, current):
        held = {address: holding(place, memory.name) for address, place in places.items()}
        lacking = differences(shards, shard, memory, held)
        for number, one in enumerate(lacking):
            for target in one.targets:
                if one.newest is None:
                    done.deleted += delete(places[target], one.memory, one.document, one.generation)
                else:
                    source = places[one.source]
                    nbytes = copy(source, places[target], one.memory, memory.spec, one.newest, one.generation)
                    done.copied += nbytes > 0
                    done.bytes += nbytes
            advance(number + 1, len(lacking))


def _agreed_memories(places: Places, current: Collection[str]) -> list[MemoryInfo]:
    """The memories that are to be in all replicas, and now are.

    One that only replicas have which may lack writes was deleted while they were away.
    """
    judges = [address for address in places if address in current] or list(places)
    known = _memories(places, judges)
    if len({frozenset(known[address]) for address in judges}) > 1:
        # It may just be created, or deleted: whoever does that tells all replicas at the same time.
        time.sleep(SETTLE_S)
        known = _memories(places, judges)
    agreed: list[MemoryInfo] = []
    for name in sorted({name for found in known.values() for name in found}):
        infos = [known[address][name] for address in judges if name in known[address]]
        if not infos:
            for address in known:
                if name in known[address]:
                    _drop(places[address], name)
            continue
        born = min(one.created_at for one in infos)
        agreed.append(replace(infos[0], created_at=born))
        for address in known:
            if name not in known[address]:
                places[address].run(CreateMemory(name, infos[0].spec, born), CALL_S)
    return agreed


def _memories(places: Places, judges: Collection[str]) -> dict[str, dict[str, MemoryInfo]]:
    """The memories of every replica. The judges are asked last, so that none counts as deleted that is being made."""
    return {address: memories_at(places[address]) for address in sorted(places, key=lambda one: one in judges)}


def _drop(place: RemotePlace, memory: str) -> None:
    try:
        place.run(DeleteMemory(memory), CALL_S)
    except NotFound:
        return
