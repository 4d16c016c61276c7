"""A process's place in a cluster: the shard map it was told last, over restarts, and whether it may lack writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memory_service.errors import DataLoss, FailedPrecondition, StaleMap, Unavailable
from memory_service.shards import Member, Shard, ShardMap
from memory_service.storage.vfs import Vfs, replace_file
from memory_service.verbs import SetShardMap

FILE = "cluster.json"
BEHIND = "BEHIND"  # Reason of an Unavailable: another replica can answer.
_LIMIT_BYTES = 16 << 20


class Membership:
    """What one process knows of its cluster. Thread-safe; without a directory it is forgotten with the process."""

    def __init__(self, directory: Path | None, vfs: Vfs):
        """Raises DataLoss if the file is damaged."""
        self._path = None if directory is None else directory / FILE
        self._vfs = vfs
        self._lock = threading.Lock()
        self._member = Member() if self._path is None else _load(self._path, vfs)
        self._missed = 0  # The last write it was told to have missed.

    @property
    def member(self) -> Member:
        return self._member

    def set(self, verb: SetShardMap) -> Member:
        """Take a map with a higher epoch, or the known one again; durable on return. Raises StaleMap."""
        verb.map.check()
        with self._lock:
            known = self._member
            if known.map is not None and verb.map != known.map and verb.map.epoch <= known.map.epoch:
                raise _stale(known.map.epoch)
            behind = known.behind if verb.behind is None else verb.behind
            whole = known.whole
            if verb.behind is False:
                # What was missed since the replicas were compared is still missing.
                behind, whole = self._missed > verb.whole, max(whole, verb.whole)
            self._keep(Member(verb.map, verb.shard, behind, whole))
            return self._member

    def mark_behind(self, missed: int) -> None:
        """Remember, over restarts too, that a write of this generation was missed."""
        with self._lock:
            known = self._member
            if missed < known.whole:
                return
            self._missed = max(self._missed, missed)
            behind = Member(known.map, known.shard, True, known.whole)
            self._member = behind  # First: who cannot write to its disk any more lacks writes all the more.
            self._keep(behind)

    @contextmanager
    def steady(self, known: Member) -> Iterator[None]:
        """While the block runs no other map is taken. FailedPrecondition if one was since `known`."""
        with self._lock:
            if (self._member.map, self._member.shard) != (known.map, known.shard):
                raise FailedPrecondition("the shard map changed meanwhile; begin again", reason="MOVING")
            yield

    def check(self, epoch: int, reads: bool) -> None:
        """Raise StaleMap if a call was routed by an older map, Unavailable if it reads what may lack writes."""
        member = self._member
        if member.map is None:
            raise Unavailable("this process was told no shard map yet; ask another replica", reason=BEHIND)
        if epoch < member.map.epoch:
            raise _stale(member.map.epoch)
        if reads and member.behind:
            raise Unavailable("this replica may lack writes; ask another until it is healed", reason=BEHIND)

    def _keep(self, member: Member) -> None:
        if self._path is not None:
            replace_file(self._vfs, self._path, json.dumps(asdict(member), indent=1).encode())
        self._member = member


def _stale(epoch: int) -> StaleMap:
    return StaleMap(f"the shard map has changed; the one of epoch {epoch} holds", epoch=str(epoch))


def _load(path: Path, vfs: Vfs) -> Member:
    """What was kept. A replica of several that was down may have missed writes."""
    try:
        found = json.loads(vfs.read_file(path, limit=_LIMIT_BYTES))
    except FileNotFoundError:
        return Member()
    except ValueError as error:
        raise DataLoss(f"{path} is damaged; remove it, and let the cluster tell this process its map again") from error
    shards = None if found["map"] is None else _map(found["map"])
    both = () if shards is None else (*shards.shards, *shards.also)
    alone = all(len(shard.addresses) == 1 for shard in both if shard.id == found["shard"])
    return Member(shards, found["shard"], found["behind"] or not alone, found["whole"])


def _map(found: dict[str, Any]) -> ShardMap:
    shards, also = (
        tuple(Shard(one["id"], tuple(one["addresses"])) for one in found[name]) for name in ("shards", "also")
    )
    return ShardMap(found["epoch"], shards, also, found["switched"])
