"""What an overseer knows of its cluster's map: from the services, and over restarts from a file."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memory_service.cluster.directory import Note, members_of
from memory_service.errors import DataLoss, Unavailable
from memory_service.places.remote import RemotePlace
from memory_service.shards import Member, Shard, ShardMap


class Registry:
    """A cluster's directory for its own caretaker. Thread-safe.

    Unlike a list of addresses it never makes up a map: only the overseer knows that a cluster is new.
    """

    def __init__(self, target: str, file: Path, place: Callable[[str], RemotePlace]):
        """Raises DataLoss if the file is damaged."""
        self.target = target
        self._file = file
        self._place = place
        self._lock = threading.Lock()
        self._wanted, self._map = _load(file)
        self._addresses: tuple[str, ...] = ()

    @property
    def known(self) -> ShardMap | None:
        """The newest map heard of."""
        return self._map

    @property
    def wanted(self) -> int:
        """How many shards were wanted last; 0 if that is not known."""
        return self._wanted

    def want(self, shards: int) -> None:
        """Remember how many shards are wanted."""
        with self._lock:
            self._wanted = shards
            self._keep()

    def reach(self, addresses: Iterable[str], place: Callable[[str], RemotePlace]) -> None:
        """Where services are now, whatever the map says, and how to connect to them."""
        self._addresses, self._place = tuple(addresses), place

    def learn(self, found: ShardMap | None) -> None:
        """Take a map that holds if its epoch is above the known one's."""
        with self._lock:
            self._learn(found)

    def find(self, above: int) -> ShardMap:
        """The newest map any service knows. Raises Unavailable while there is none."""
        with self._lock:
            if self._map is not None and self._map.epoch > above:
                return self._map
            known = self._map.addresses if self._map is not None else ()
            for one in members_of(dict.fromkeys([*known, *self._addresses]), self._place).values():
                self._learn(one.map if isinstance(one, Member) else None)
            if self._map is None:
                raise Unavailable(f"the services of {self.target} are starting; there is no shard map yet")
            return self._map

    def notes(self) -> Mapping[str, Note]:
        """Nothing: who asks the overseer for its state knows more."""
        return {}

    def _learn(self, found: ShardMap | None) -> None:
        if found is not None and (self._map is None or found.epoch > self._map.epoch):
            self._map = found
            self._keep()

    def _keep(self) -> None:
        told = {"wanted": self._wanted, "map": None if self._map is None else asdict(self._map)}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        aside = self._file.with_suffix(".new")
        with open(aside, "w", encoding="utf-8") as file:
            json.dump(told, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self._file)


def map_in(text: str) -> ShardMap | None:
    """The map in what a service remembers of its cluster; None if there is none that can be read."""
    with suppress(ValueError, KeyError, TypeError):
        return _map(json.loads(text)["map"])
    return None


def _load(file: Path) -> tuple[int, ShardMap | None]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return int(found["wanted"]), _map(found["map"])
    except FileNotFoundError:
        return 0, None
    except (ValueError, KeyError, TypeError) as error:
        raise DataLoss(f"{file} is damaged; remove it: the services know their map too") from error


def _map(found: dict[str, Any] | None) -> ShardMap | None:
    if found is None:
        return None
    shards, also = (
        tuple(Shard(one["id"], tuple(one["addresses"])) for one in found[name]) for name in ("shards", "also")
    )
    return ShardMap(int(found["epoch"]), shards, also, bool(found["switched"]))
