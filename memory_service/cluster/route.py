"""One try of a call by one shard map: asking a shard means asking its replicas until one answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from memory_service.cluster.health import Health
from memory_service.cluster.known import Known
from memory_service.cluster.options import ClusterOptions, OnMissing
from memory_service.cluster.steps import Ask, Budget, First, Flow, NewMap, Pause, Together, outcomes
from memory_service.errors import (
    DataLoss,
    DeadlineExceeded,
    FotError,
    PermissionDenied,
    ResourceExhausted,
    SessionExpired,
    StaleMap,
    Unavailable,
)
from memory_service.shards import Shard, ShardMap, Stamps
from memory_service.verbs import GetShardMap, MarkBehind, Verb

Answer = TypeVar("Answer")

MISSING = "SHARD_MISSING"  # Reason of an Unavailable: no replica of the shards it names can answer.
BEHIND = "BEHIND"  # Reason of an Unavailable: the replica is there, but may lack writes.
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 1.0
MARK_S = 5.0


def missing(error: object) -> bool:
    """Whether an error says that whole shards cannot be asked."""
    return isinstance(error, Unavailable) and error.code == MISSING


@dataclass(slots=True)
class Stamp:
    """The generation of a call's write: one for all replicas, however often the call is routed anew."""

    generation: int = 0  # 0: none yet.


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """What a try of a call needs."""

    map: ShardMap
    budget: Budget
    options: ClusterOptions
    health: Health
    known: Known
    stamps: Stamps
    stamp: Stamp

    @property
    def degrades(self) -> bool:
        return self.options.on_missing is OnMissing.DEGRADE

    def at(self, address: str, verb: Verb[Answer]) -> Flow[Answer]:
        """Ask one process, and remember whether it answered."""
        try:
            if missed := self.health.owed(address):
                yield from self._pay(address, missed)
            answer: Answer = yield Ask(address, verb, self.budget.left_s, self.map.epoch)
        except (Unavailable, DeadlineExceeded):
            self.health.failed(address)
            raise
        except FotError:
            self.health.up(address)
            raise
        self.health.up(address)
        return answer

    def ask(
        self, shard: Shard, verb: Verb[Answer], avoid: frozenset[str] = frozenset(), patient: bool = True
    ) -> Flow[Answer]:
        """Ask a shard: one replica, and the next if that cannot answer.

        `avoid` are replicas asked last. Raises Unavailable with the reason MISSING if none answers.
        """
        patience = Patience(self.budget, self.options.patience_s if patient and not self.degrades else 0.0)
        lost: Unavailable | None = None
        while True:
            order = self.health.order(shard.addresses)
            order.sort(key=lambda address: address in avoid)
            try:
                if self.options.hedge_s is not None and len(order) > 1:
                    later = self._in_turn(shard, order[1:], verb)
                    answer: Answer = yield First(self._in_turn(shard, order[:1], verb), later, self.options.hedge_s)
                    return answer
                return (yield from self._in_turn(shard, order, verb))
            except DeadlineExceeded as error:
                raise lost or error from None  # Whose absence took the time tells more than that it passed.
            except Unavailable as error:
                if not missing(error):
                    raise
                lost = error
                yield from self.look()
                pause = patience.pause_s()
                if pause is None:
                    raise
            yield Pause(pause)

    def look(self) -> Flow[None]:
        """Raise StaleMap if there is a newer map: a shard that does not answer may be elsewhere by now."""
        if self.degrades and not self.health.may_look():
            return
        try:
            found: ShardMap = yield NewMap(self.map.epoch)
        except FotError:
            return
        if found.epoch > self.map.epoch:
            raise StaleMap("the shard map has changed", epoch=str(found.epoch))

    def ask_shards(self, shards: Iterable[Shard], verb: Verb[Answer]) -> Flow[list[Answer]]:
        """Ask every shard. Raises Unavailable naming all that cannot answer, else the first error."""
        found = outcomes((yield Together([self.ask(shard, verb) for shard in shards])))
        self.check_missing(found)
        for one in found:
            if isinstance(one, FotError):
                raise one
        return list(found)

    def tell(self, shard: Shard, address: str, verb: Verb[Answer]) -> Flow[Answer]:
        """Ask one replica, patiently where there is no other."""
        return self.at(address, verb) if len(shard.addresses) > 1 else self.ask(shard, verb)

    def everywhere(self, addresses: Iterable[str], verb: Verb[Answer]) -> Flow[dict[str, Answer | FotError]]:
        """Ask these processes, all of them: what each answered, errors as values."""
        listed = list(addresses)
        found = outcomes((yield Together([self.at(address, verb) for address in listed])))
        return dict(zip(listed, found, strict=True))

    def patiently(
        self, addresses: Sequence[str], verb: Verb[Answer], each_shard: bool = False
    ) -> Flow[dict[str, Answer | FotError]]:
        """Ask these processes, and again those that are away, as long as patience lasts: errors as values.

        With `each_shard` it is enough that one replica of every shard is there.
        """
        if not verb.repeatable:
            # It cannot be sent twice, so first make sure that they listen.
            heard = yield from self.patiently(addresses, GetShardMap(), each_shard)
            away = {address: one for address, one in heard.items() if isinstance(one, FotError) and _is_away(one)}
            told = yield from self.everywhere([address for address in heard if address not in away], verb)
            return {address: away[address] if address in away else told[address] for address in heard}
        found: dict[str, Any] = {}
        waiting = list(addresses)
        patience = Patience(self.budget, self.options.patience_s)
        while True:
            for address, one in (yield from self.everywhere(waiting, verb)).items():
                if not (isinstance(one, DeadlineExceeded) and _is_away(found.get(address))):
                    found[address] = one  # Else why the time passed is known already.
            waiting = [address for address, one in found.items() if _is_away(one)]
            needed = [shard.addresses for shard in self.map.shards] if each_shard else [(a,) for a in found]
            if not any(all(address in waiting for address in some) for some in needed):
                return found
            yield from self.look()
            pause = patience.pause_s()
            if pause is None:
                return found
            yield Pause(pause)

    def wait_for(self, address: str, verb: Verb[Answer]) -> Flow[Answer]:
        """Ask one process, patiently."""
        found = (yield from self.patiently([address], verb))[address]
        if isinstance(found, FotError):
            raise found
        return found

    def check_missing(self, found: Sequence[object]) -> None:
        """Raise one Unavailable that names every shard that is missing."""
        lost = [one for one in found if isinstance(one, FotError) and missing(one)]
        if len(lost) == 1:
            raise lost[0]
        if lost:
            names = ",".join(one.metadata.get("shards", "") for one in lost)
            raise Unavailable("; ".join(one.message for one in lost), reason=MISSING, shards=names)

    def _in_turn(self, shard: Shard, addresses: Sequence[str], verb: Verb[Answer]) -> Flow[Answer]:
        failures: list[FotError] = []
        expired: list[str] = []
        for address in addresses:
            try:
                answer = yield from self.at(address, verb)
                self.known.lose_sessions(verb, expired)
                return answer
            except (Unavailable, DataLoss, SessionExpired, ResourceExhausted) as error:
                failures.append(error)
                if isinstance(error, SessionExpired):
                    expired.append(address)
        # What a replica said of itself tells more than that another was not there.
        for kind in (SessionExpired, DataLoss, ResourceExhausted):
            for failure in failures:
                if isinstance(failure, kind):
                    raise failure
        raise lost_shard(shard, failures)

    def _pay(self, address: str, missed: int) -> Flow[None]:
        """Tell a replica that it missed a change, before it is asked anything."""
        try:
            yield Ask(address, MarkBehind(missed), min(MARK_S, self.budget.left_s), 0)
        except PermissionDenied:
            return
        self.health.paid(address, missed)


def _is_away(found: object) -> bool:
    """Whether a process did not answer; one that may lack writes did."""
    return isinstance(found, Unavailable) and found.code != BEHIND


def lost_shard(shard: Shard, failures: Sequence[FotError]) -> Unavailable:
    """The error of a shard none of whose replicas answers."""
    addresses = ", ".join(shard.addresses)
    away = [error for error in failures if error.code != BEHIND]
    why = away[0].message if away else "no answer"
    if len(away) < len(failures):
        told = f"the replicas of shard {shard.id} that answer may lack writes; heal the cluster ({addresses})"
        told += f"; another does not: {why}" if away else ""
    else:
        told = f"no replica of shard {shard.id} answers ({addresses}): {why}"
    return Unavailable(told, reason=MISSING, shards=shard.id)


class Patience:
    """How long a shard is tried."""

    def __init__(self, budget: Budget, patience_s: float):
        self._budget = budget
        self._until = min(budget.until, budget.now() + patience_s)
        self._attempts = 0

    def pause_s(self) -> float | None:
        """Seconds until the next attempt; None if it is enough."""
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self._attempts)
        self._attempts += 1
        return pause if self._budget.now() + pause < self._until else None
