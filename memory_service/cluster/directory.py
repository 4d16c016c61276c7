"""Who knows where the shards are. Here: a list of addresses, and the map its processes were told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from memory_service.cluster.options import layout_of
from memory_service.errors import FotError, PermissionDenied, StaleMap, Unavailable
from memory_service.places.remote import RemotePlace
from memory_service.shards import Member, ShardMap
from memory_service.verbs import GetShardMap, SetShardMap

ASK_S = 5.0


class Note(NamedTuple):
    """What a directory knows of a process besides where it listens."""

    node: str = ""  # The machine it runs on.
    problem: str = ""  # Why it does not run.


class Directory(Protocol):
    """Tells where the shards of a cluster are. Blocking, and asked from any thread."""

    @property
    def target(self) -> str: ...

    def find(self, above: int) -> ShardMap:
        """A map of an epoch above this one, if there is one; else the newest known. Raises FotError if there is none.

        Epoch 0 stands for a layout that no process was told.
        """
        ...

    def notes(self) -> Mapping[str, Note]:
        """What is known of the processes besides, by address."""
        ...


class Seeds:
    """A list of addresses. Where none of them was told a map, they are told one that follows the list's order."""

    def __init__(self, target: str, authorities: Sequence[str], replicas: int, place: Callable[[str], RemotePlace]):
        """`place` gives the connection to an address."""
        self.target = target
        self._authorities = tuple(authorities)
        self._replicas = replicas
        self._place = place
        self._lock = threading.Lock()
        self._map: ShardMap | None = None
        self._looked = 0.0

    def find(self, above: int) -> ShardMap:
        """The newest map any process knows. Raises Unavailable if nobody answers, or not all who need a first map."""
        arrived = time.monotonic()
        with self._lock:
            # Of many callers one looks; what it found holds for all who were waiting when it began.
            if self._map is not None and (self._map.epoch > above or self._looked > arrived):
                return self._map
            self._looked = time.monotonic()
            known = self._map.addresses if self._map is not None else ()
            members = members_of(dict.fromkeys([*known, *self._authorities]), self._place)
            maps = [one.map for one in members.values() if isinstance(one, Member) and one.map is not None]
            if maps:
                self._map = max([*maps, *([self._map] if self._map else [])], key=lambda one: one.epoch)
            elif self._map is None:
                self._map = self._tell_first(members)
            return self._map

    def notes(self) -> Mapping[str, Note]:
        """Nothing: a list of addresses does not say."""
        return {}

    def _tell_first(self, members: dict[str, Member | FotError]) -> ShardMap:
        for one in members.values():
            if isinstance(one, FotError):
                raise one
        first = layout_of(self._authorities, self._replicas)
        try:
            tell(first, self._place)
        except PermissionDenied:
            # Whoever may not tell the processes routes by the list itself.
            return ShardMap(0, first.shards)
        except StaleMap:
            found = members_of(first.addresses, self._place).values()
            maps = [one.map for one in found if isinstance(one, Member) and one.map is not None]
            return max(maps, key=lambda one: one.epoch)
        return first


def members_of(addresses: Iterable[str], place: Callable[[str], RemotePlace]) -> dict[str, Member | FotError]:
    """What every process knows, errors as values."""

    def ask(address: str) -> Member | FotError:
        try:
            return place(address).run(GetShardMap(), ASK_S)
        except FotError as error:
            return error

    listed = list(addresses)
    with ThreadPoolExecutor(min(32, len(listed)) or 1, thread_name_prefix="fot-map") as pool:
        return dict(zip(listed, pool.map(ask, listed), strict=True))


def tell(
    found: ShardMap,
    place: Callable[[str], RemotePlace],
    addresses: Iterable[str] | None = None,
    behind: bool | None = None,
    whole: int = 0,
    timeout_s: float = 60.0,
) -> dict[str, Unavailable]:
    """Tell processes (all of the map's) their map. Gives those that cannot be reached; raises any other error."""
    away: dict[str, Unavailable] = {}
    for address in found.addresses if addresses is None else addresses:
        both = [*found.shards, *found.also]
        shard = next((one.id for one in both if address in one.addresses), "")
        try:
            place(address).run(SetShardMap(found, shard, behind, whole), timeout_s)
        except Unavailable as error:
            away[address] = error
    return away
