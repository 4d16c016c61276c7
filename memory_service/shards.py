"""Which shard owns a document: the shard map, rendezvous hashing over it, and the stamps that order writes.

A shard is a set of processes (replicas) that hold the same documents. Every document has one owner: the shard with the
highest weight, a hash of shard, memory and document. So a new shard takes about 1/N of the documents, from all others
alike, and nothing else moves.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from memory_service.errors import InvalidArgument

MAX_SHARDS = 1024
MAX_REPLICAS = 16
# Why a shard's part of a memory cannot go by another name.
OTHER_NAME = "over several shards documents lie where their memory's name puts them; restore it as {!r}"
_STAMP_BITS = 11  # Below the microsecond: what tells two writers of the same one apart.


@dataclass(frozen=True, slots=True)
class Shard:
    """Processes that hold the same documents, by address ("host:port")."""

    id: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShardMap:
    """Where documents are. Of two maps the one with the higher epoch holds.

    While documents move, `also` is the other layout: what is written goes to the owners in both, what is read comes
    from `shards` alone. First `also` is where the documents go; once they are there the two change places (`switched`)
    and `also` is where they came from, until nobody reads by the old map any more.
    """

    epoch: int
    shards: tuple[Shard, ...]
    also: tuple[Shard, ...] = ()
    switched: bool = False

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(shard.id for shard in self.shards)

    @property
    def replicas(self) -> int:
        """Processes of the largest shard."""
        return max(len(shard.addresses) for shard in self.shards)

    @property
    def everyone(self) -> tuple[Shard, ...]:
        """The shards of both layouts, each once."""
        return tuple({shard.id: shard for shard in (*self.also, *self.shards)}.values())

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every process, of both layouts, once."""
        both = (*self.shards, *self.also)
        return tuple(dict.fromkeys(address for shard in both for address in shard.addresses))

    def owner(self, memory: str, document: str) -> Shard:
        """Whose document this is, to read from."""
        return _owner(self.shards, memory, document)

    def writers(self, memory: str, document: str) -> tuple[Shard, ...]:
        """Who must hear of a change of this document: its owner, and while it moves the other one."""
        owner = self.owner(memory, document)
        other = _owner(self.also, memory, document) if self.also else owner
        return (owner,) if other.id == owner.id else (owner, other)

    def shard(self, name: str) -> Shard | None:
        """The shard of that id, in the layout that is read."""
        return next((shard for shard in self.shards if shard.id == name), None)

    def placement(self, shard: Shard) -> Placement:
        """What a process of the shard is asked for."""
        return Placement(shard.id, self.ids)

    def check(self) -> None:
        """Raise InvalidArgument unless it is a map that can be used."""
        if self.epoch < 1:
            raise InvalidArgument(f"a shard map's epoch is ≥ 1, got {self.epoch}")
        if not self.shards:
            raise InvalidArgument("a shard map needs at least one shard")
        for layout in (self.shards, self.also):
            _check_layout(layout)


def _check_layout(layout: Sequence[Shard]) -> None:
    if len(layout) > MAX_SHARDS:
        raise InvalidArgument(f"a cluster may have {MAX_SHARDS} shards, got {len(layout)}")
    if len({shard.id for shard in layout}) != len(layout):
        raise InvalidArgument("two shards of a map have the same id")
    addresses = [address for shard in layout for address in shard.addresses]
    if len(set(addresses)) != len(addresses):
        raise InvalidArgument("an address stands twice in the map; a process is one replica of one shard")
    for shard in layout:
        if not shard.id or len(shard.id) > 63 or not shard.id.isalnum():
            raise InvalidArgument(f"a shard's id is 1 to 63 letters and digits, got {shard.id!r}")
        if not 1 <= len(shard.addresses) <= MAX_REPLICAS or not all(shard.addresses):
            raise InvalidArgument(f"shard {shard.id} needs 1 to {MAX_REPLICAS} addresses")


@dataclass(frozen=True, slots=True)
class Placement:
    """Which documents count in an answer: those that `shard` owns among `shards`.

    While documents move, a process may hold some that it does not own, not yet or no more.
    """

    shard: str
    shards: tuple[str, ...]

    def owns(self, memory: str, document: str) -> bool:
        return max(self.shards, key=lambda one: weight(one, memory, document)) == self.shard


@dataclass(frozen=True, slots=True)
class Member:
    """What a process knows of its cluster."""

    map: ShardMap | None = None  # None: it was told none.
    shard: str = ""  # Which one it is a replica of.
    behind: bool = False  # It may have missed writes, so that it answers no reads until it is healed.
    whole: int = 0  # The last time it was healed: it has all writes stamped before.


@lru_cache(maxsize=1 << 16)
def weight(shard: str, memory: str, document: str) -> tuple[bytes, str]:
    """How much a shard draws a document; the highest owns it."""
    text = f"{shard}\0{memory}\0{document}".encode("utf-8", "surrogatepass")
    return blake2b(text, digest_size=8).digest(), shard


def ranked(shards: Sequence[Shard], memory: str, name: str) -> list[Shard]:
    """Shards by weight, the owner first."""
    return sorted(shards, key=lambda shard: weight(shard.id, memory, name), reverse=True)


def _owner(shards: Sequence[Shard], memory: str, document: str) -> Shard:
    return max(shards, key=lambda shard: weight(shard.id, memory, document))


# --- Stamps ---------------------------------------------------------------------------------------------------------


def stamp_at(seconds: float) -> int:
    """The least stamp of a moment, in seconds since the epoch."""
    return int(seconds * 1e6) << _STAMP_BITS


class Stamps:
    """Generations that whoever writes gives to documents, so that all replicas order the same writes alike.

    Time in microseconds, never going back, and never below what was seen of others'.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        """A stamp above all before."""
        with self._lock:
            self._last = max(stamp_at(time.time()) | random.getrandbits(_STAMP_BITS), self._last + 1)
            return self._last

    def see(self, stamp: int) -> None:
        """Stay above this one from now on."""
        with self._lock:
            self._last = max(self._last, stamp)
