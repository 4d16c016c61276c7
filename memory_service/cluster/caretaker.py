"""Keeps a cluster whole: says how it is, makes replicas equal, moves documents to new shards. Driven by whoever
supervises the processes: a command, a thread, a Ray actor."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from memory_service.cluster import moving
from memory_service.cluster.directory import Directory, members_of, tell
from memory_service.cluster.healing import Healed, heal_shard
from memory_service.cluster.moving import Moved
from memory_service.cluster.opening import Reach, directory_of
from memory_service.cluster.place import IMPATIENT, Lines
from memory_service.cluster.status import ClusterStatus, status_of
from memory_service.errors import FailedPrecondition, FotError, InvalidArgument, Unavailable
from memory_service.places.remote import RemotePlace
from memory_service.places.targets import ClusterTarget, Tls, cluster_target
from memory_service.shards import Member, Shard, ShardMap, stamp_at

Progress = Callable[[str, int, int], None]  # What is done, units done, units in all.
_CALL_S = 60.0
_LINE = replace(IMPATIENT, patience_s=1.5)  # A process that does not answer may just be coming back.
_SETTLE_S = 0.3  # Clients need a moment to notice that a process is back; what they write until then, it misses.
_SETTLES = 5
_PASSES = 100  # Of copying, each of which needs less than the one before unless writers are faster.


@dataclass(frozen=True, slots=True)
class HealReport:
    """What healing did, and what it could not."""

    copied: int
    deleted: int
    bytes: int
    away: tuple[str, ...]  # Processes that could not be reached.
    behind: tuple[str, ...]  # Processes that may still lack writes: nobody was there who surely has them.


class Caretaker:
    """Not for several threads at once, nor several caretakers of a cluster at once: moves would cross."""

    def __init__(self, directory: Directory, tenants: Sequence[Lines]):
        """`tenants` are connections with one token each: what a token does not see is not healed. The first is an
        admin's."""
        self._directory = directory
        self._tenants = tuple(tenants)

    @classmethod
    def open(
        cls,
        target: str,
        *,
        tokens: Sequence[str | Path | None] = (None,),
        tls: Tls | None = None,
        insecure: bool = False,
    ) -> Self:
        """Of a cluster's target; `tokens` are admin tokens of the tenants whose memories are to be kept whole."""
        found = [cluster_target(target, token, tls, insecure) for token in tokens]
        directories = [directory_of(*_parts(one), line=_LINE) for one in found]
        return cls(directories[0][0], [lines for _, lines, _ in directories])

    def close(self) -> None:
        """Close the connections. Harmless twice."""
        for lines in self._tenants:
            lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def map(self) -> ShardMap:
        """The map that holds now. Raises Unavailable if nobody answers."""
        known = self._directory.find(0)
        return self._directory.find(known.epoch)

    # --- Looking ---

    def status(self, differences: bool = True) -> ClusterStatus:
        """How the cluster is. Comparing replicas (`differences`) lists all their documents."""
        return status_of(self.map, self._tenants, self._directory.notes(), differences)

    def _members(self, shards: ShardMap) -> dict[str, Member | FotError]:
        return members_of(shards.addresses, self._tenants[0].place)

    # --- Healing ---

    def heal(self, progress: Progress | None = None, *, force: bool = False) -> HealReport:
        """Make the replicas of every shard equal, and let those that were behind answer reads again.

        Safe while writes go on, and harmless to repeat. A replica stays behind if neither a replica that surely has
        everything nor every replica of its shard was there; with `force` what is there counts as everything, for when
        the others are gone for good.
        """
        shards = self.map
        members = self._members(shards)
        self._tell_strays(shards, members)
        members = self._members(shards)
        done = Healed()
        away = tuple(address for address, one in members.items() if isinstance(one, FotError))
        left: list[str] = []
        for shard in shards.everyone:
            there = [address for address in shard.addresses if isinstance(members[address], Member)]
            current = [address for address in there if not _behind(members[address])]
            began = stamp_at(time.time())
            complete = bool(current) or force or len(there) == len(shard.addresses)
            behind = [address for address in there if address not in current]
            self._equal(shards, shard, there, current, done, progress)
            if not complete:
                left += behind
            elif behind:
                tell(shards, self._tenants[0].place, behind, behind=False, whole=began)
                self._settle(shards, shard, there, behind, done, progress)
        return HealReport(done.copied, done.deleted, done.bytes, away, tuple(left))

    def _settle(
        self,
        shards: ShardMap,
        shard: Shard,
        there: Sequence[str],
        healed: Sequence[str],
        done: Healed,
        progress: Progress | None,
    ) -> None:
        """Bring replicas what they still missed between the comparison and the moment every writer reached them."""
        for _ in range(_SETTLES if len(there) > 1 else 0):
            time.sleep(_SETTLE_S)
            before, began = (done.copied, done.deleted), stamp_at(time.time())
            self._equal(shards, shard, there, there, done, progress)
            tell(shards, self._tenants[0].place, healed, behind=False, whole=began)
            if (done.copied, done.deleted) == before:
                return

    def _equal(
        self,
        shards: ShardMap,
        shard: Shard,
        there: Sequence[str],
        current: Sequence[str],
        done: Healed,
        progress: Progress | None,
    ) -> None:
        if len(there) < 2:
            return

        def advance(part: int, whole: int) -> None:
            if progress is not None:
                progress(f"healing shard {shard.id}", part, whole)

        for lines in self._tenants:
            heal_shard(shards, shard, {a: lines.place(a) for a in there}, current, done, advance)

    def _tell_strays(self, shards: ShardMap, members: dict[str, Member | FotError]) -> None:
        """Tell the map to processes that know an older one, or lost theirs with all they had."""
        for address, one in members.items():
            if isinstance(one, Member) and one.map != shards and shards.epoch:
                alone = any(shard.addresses == (address,) for shard in shards.everyone)
                lost = one.map is None and not alone
                tell(shards, self._tenants[0].place, [address], behind=True if lost else None)

    # --- Changing ---

    def publish(self, shards: Sequence[Shard], empty: Collection[str] = ()) -> ShardMap:
        """Tell new addresses of the same shards; `empty` are those that begin without data, to be healed first.

        While documents move, the shards are those of both layouts; the move goes on by the new map when it is called
        again. Raises FailedPrecondition if the shards themselves are others: their documents must move.
        """
        known = self.map
        given = {shard.id: shard for shard in shards}
        if given.keys() != {shard.id for shard in known.everyone}:
            raise FailedPrecondition("these are other shards; their documents must move: use `move`")
        layout, also = (tuple(given[shard.id] for shard in one) for one in (known.shards, known.also))
        single = {shard.addresses[0] for shard in shards if len(shard.addresses) == 1}
        if known.switched and single.intersection(empty):
            # What moved there is lost, but where it came from still has it: read there, and carry it once more.
            new = ShardMap(known.epoch + 1, also, layout)
        else:
            new = ShardMap(known.epoch + 1, layout, also, known.switched)
        new.check()
        fresh = [address for address in new.addresses if address in empty and address not in single]
        self._tell_all(new, [address for address in new.addresses if address not in fresh])
        tell(new, self._tenants[0].place, fresh, behind=True)
        gone = [address for address in known.addresses if address not in new.addresses]
        tell(new, self._tenants[0].place, gone)
        return self._directory.find(known.epoch)

    def replace(self, old: str, new: str, progress: Progress | None = None) -> HealReport:
        """Put an empty process in the place of one that is gone, and bring it what its shard holds."""
        shards = tuple(
            Shard(shard.id, tuple(new if address == old else address for address in shard.addresses))
            for shard in self.map.everyone
        )
        self.publish(shards, empty=[new])
        return self.heal(progress)

    def move(self, shards: Sequence[Shard], progress: Progress | None = None) -> Moved:
        """Change to other shards while the cluster is read and written; about 1/N of the documents move.

        Cut off at any point, it goes on where it was if it is called again with the same shards.
        """
        target = tuple(shards)
        known = self.map
        if known.epoch == 0:
            raise FailedPrecondition("the processes were told no map; open the cluster with an admin's token first")
        if known.also and target not in (known.also, known.shards):
            raise FailedPrecondition("another move is under way; finish it with its own shards first")
        if not known.also:
            _check_names(known.shards, target)
        done = Moved()
        if not known.also and known.shards == target:
            moving.clear(target, known, self._places(0, known), done)
            return done
        if not known.also:
            before = known.shards
            known = ShardMap(known.epoch + 1, known.shards, target)
            known.check()
            for tenant in range(len(self._tenants)):
                # Before anybody writes there.
                moving.shared_memories(known, self._places(tenant, known))
            self._tell_all(known)
        elif known.switched:
            before = known.also
        else:
            before = known.shards
            self._tell_all(known)
        if not known.switched:
            self._carry(known, done, progress)
            known = ShardMap(known.epoch + 1, target, before, switched=True)
        self._tell_all(known)
        both = known.addresses
        settled = ShardMap(known.epoch + 1, target)
        self._tell_all(settled, both)
        self._directory.find(settled.epoch - 1)
        for tenant in range(len(self._tenants)):
            places = self._places(tenant, known)
            moving.clear(before, settled, places, done)
        return done

    def _carry(self, shards: ShardMap, done: Moved, progress: Progress | None) -> None:
        def advance(part: int, whole: int) -> None:
            if progress is not None:
                progress("moving documents", part, whole)

        for _ in range(_PASSES):
            self.heal()
            changes = sum(
                moving.carry(shards, self._places(tenant, shards), done, advance)
                for tenant in range(len(self._tenants))
            )
            if not changes and self._current_everywhere(shards):
                return
        raise Unavailable("documents change faster than they can be moved; move again when there is less to do")

    def _current_everywhere(self, shards: ShardMap) -> bool:
        """Whether every shard of both layouts has a replica that lacks nothing."""
        members = self._members(shards)
        return all(
            any(isinstance(members[a], Member) and not _behind(members[a]) for a in shard.addresses)
            for shard in shards.everyone
        )

    def _places(self, tenant: int, shards: ShardMap) -> dict[str, RemotePlace]:
        """Connections to the processes that answer and lack nothing."""
        members = self._members(shards)
        return {
            address: self._tenants[tenant].place(address)
            for address, one in members.items()
            if isinstance(one, Member) and not one.behind
        }

    def _tell_all(self, shards: ShardMap, addresses: Collection[str] | None = None) -> None:
        """Tell a map; every shard needs a replica that heard it. The others are behind when they come back."""
        away = tell(shards, self._tenants[0].place, addresses)
        for shard in shards.everyone:
            if all(address in away for address in shard.addresses):
                raise Unavailable(f"no replica of shard {shard.id} answers ({', '.join(shard.addresses)}); nothing is "
                                  "lost: try again when one is back")  # fmt: skip


def _check_names(before: Sequence[Shard], after: Sequence[Shard]) -> None:
    """Raise InvalidArgument if a name would stand for other processes, or a process for another name, than before.

    Owners are found by name: a document whose owner keeps its name is not moved.
    """
    names = {address: shard.id for shard in before for address in shard.addresses}
    runs = {shard.id: set(shard.addresses) for shard in before}
    for shard in after:
        renamed = [one for one in shard.addresses if names.get(one, shard.id) != shard.id]
        if renamed:
            raise InvalidArgument(
                f"{renamed[0]} is a replica of {names[renamed[0]]}; it cannot become one of {shard.id}"
            )
        if runs.get(shard.id, set(shard.addresses)) != set(shard.addresses):
            raise InvalidArgument(f"shard {shard.id} has other addresses; change those with `publish`, then move")


def _behind(member: Member | FotError) -> bool:
    return isinstance(member, FotError) or member.behind or member.map is None


def _parts(found: ClusterTarget) -> tuple[str, str, Reach]:
    return found.scheme, found.rest, Reach(found.target, found.tls, found.token)
