"""Documents on their way from one layout of shards to another, while they are read and written.

Four maps, each told to all processes before the next: the old layout; the old one, with writes going to the new
owners too; the new one, with writes going to the old owners too; the new one. So whoever reads by one map sees all that
anybody writes by the map before or after, and no answer is wrong or lacks a document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from memory_service.cluster.copying import CALL_S, Holding, copy, delete, holding, memories_at
from memory_service.errors import FotError, NotFound, Unavailable
from memory_service.places.remote import RemotePlace
from memory_service.shards import Shard, ShardMap
from memory_service.types.memories import MemoryInfo
from memory_service.verbs import CreateMemory, DeleteMemory

Places = Mapping[str, RemotePlace]


@dataclass(slots=True)
class Moved:
    """What moving did."""

    copied: int = 0  # Documents, to every replica of their new owners.
    deleted: int = 0  # Documents their old owners hold no more.
    bytes: int = 0  # Of keys and values copied.


def carry(shards: ShardMap, places: Places, done: Moved, advance: Callable[[int, int], None]) -> int:
    """Bring the new owners (`also`) what they lack; how many changes that took. 0: nothing was missing.

    `places` are the processes that answer, and hold all writes of their shard.
    """
    changes = 0
    for memory in shared_memories(shards, places):
        for shard in shards.shards:
            source = _reader(shard, places)
            held = holding(places[source], memory.name)
            changes += _carry_from(shards, shard, source, held, memory, places, done, advance)
    return changes


def _carry_from(
    shards: ShardMap,
    shard: Shard,
    source: str,
    held: Holding,
    memory: MemoryInfo,
    places: Places,
    done: Moved,
    advance: Callable[[int, int], None],
) -> int:
    leaving = [
        (name, owners[1])
        for name in sorted({*held.alive, *held.dead})
        if (owners := shards.writers(memory.name, name))[0].id == shard.id and len(owners) > 1
    ]
    there = {
        address: holding(places[address], memory.name)
        for address in {address for _, owner in leaving for address in owner.addresses}
        if address in places
    }
    changes = 0
    for number, (name, owner) in enumerate(leaving):
        for address in owner.addresses:
            if address not in there or address == source:
                continue
            alive = held.alive.get(name)
            if alive is not None and there[address].newest(name) < alive.generation:
                # One above: the generation itself may lie in a grave of the last time the document left this shard.
                nbytes = copy(places[source], places[address], memory.name, memory.spec, alive, alive.generation + 1)
                done.copied += nbytes > 0
                done.bytes += nbytes
                changes += 1
            elif alive is None and name in there[address].alive:
                dead = held.dead[name]
                if there[address].alive[name].generation <= dead:
                    delete(places[address], memory.name, name, dead)
                    changes += 1
        advance(number + 1, len(leaving))
    return changes


def clear(before: tuple[Shard, ...], shards: ShardMap, places: Places, done: Moved) -> None:
    """Delete what processes hold and do not own any more; those that belong to no shard any more hold nothing."""
    staying = set(shards.addresses)
    for shard in before:
        for address in shard.addresses:
            if address not in places:
                continue
            place = places[address]
            for memory in memories_at(place):
                if address not in staying:
                    done.deleted += len(holding(place, memory).alive)
                    _drop(place, memory)
                    continue
                for one in holding(place, memory).alive.values():
                    if shards.owner(memory, one.id).id != shard.id:
                        done.deleted += delete(place, memory, one.id, one.generation)


def shared_memories(shards: ShardMap, places: Places) -> list[MemoryInfo]:
    """The memories of the old layout; the new owners now have them too."""
    known: dict[str, MemoryInfo] = {}
    for shard in shards.shards:
        known |= memories_at(places[_reader(shard, places)])
    for shard in shards.also:
        for address in shard.addresses:
            if address in places:
                for name in known.keys() - memories_at(places[address]).keys():
                    places[address].run(CreateMemory(name, known[name].spec, known[name].created_at), CALL_S)
    return list(known.values())


def _reader(shard: Shard, places: Places) -> str:
    for address in shard.addresses:
        if address in places:
            return address
    raise Unavailable(f"no replica of shard {shard.id} that lacks nothing answers; heal the cluster, then move on")


def _drop(place: RemotePlace, memory: str) -> None:
    try:
        place.run(DeleteMemory(memory), CALL_S)
    except NotFound:
        return
    except FotError:
        # It belongs to nobody any more; what it keeps costs only its disk.
        return
