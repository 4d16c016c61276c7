"""`ray://name` as a target: the overseer of that cluster tells where its shards are; clients dial those directly."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib.util import find_spec

from memory_service.cluster.directory import Directory, Note, members_of
from memory_service.cluster.opening import Reach
from memory_service.cluster.options import ClusterOptions, cut_target
from memory_service.cluster.place import Lines
from memory_service.errors import FailedPrecondition, InvalidArgument, Unavailable
from memory_service.shards import Member, ShardMap


def open_directory(rest: str, reach: Reach, lines: Lines) -> tuple[Directory, ClusterOptions]:
    """The directory of "name" or "name?on_missing=degrade". Raises InvalidArgument, FailedPrecondition without Ray."""
    names, options = cut_target(rest)
    if len(names) != 1:
        raise InvalidArgument(f"{reach.target} names several clusters; write 'ray://name'")
    if find_spec("ray") is None:
        raise FailedPrecondition(f"{reach.target} needs Ray: pip install 'fot-memory[ray]'", reason="EXTRA_MISSING")
    return RayDirectory(names[0], reach, lines), options


class RayDirectory:
    """Asks the overseer; while that is away, the services it named last. Thread-safe."""

    def __init__(self, name: str, reach: Reach, lines: Lines):
        self.target = reach.target
        self._name = name
        self._reach = reach
        self._lines = lines
        self._lock = threading.Lock()
        self._map: ShardMap | None = None

    def find(self, above: int) -> ShardMap:
        """The newest map. Raises FailedPrecondition without Ray, NotFound without such a cluster, else Unavailable."""
        # Ray takes a while to load, and only who opens such a target needs it.
        from model_worker.deployment import connection

        with self._lock:
            if self._map is not None and self._map.epoch > above:
                return self._map
            connection.connect()
            try:
                overseer = connection.overseer(self._name)
                if self._map is None:
                    self._check(*connection.ask(overseer.security.remote()))
                found = connection.ask(overseer.map.remote(above))
            except Unavailable:
                if self._map is None:
                    raise
                found = self._ask_services(self._map)
            if self._map is None or found.epoch > self._map.epoch:
                self._map = found
            return self._map

    def notes(self) -> Mapping[str, Note]:
        """The node of every service by address, and what the overseer says of those that do not run."""
        from model_worker.deployment import connection

        connection.connect()
        state = connection.ask(connection.overseer(self._name).state.remote())
        known = self.find(0)
        shards = {shard.id: shard.addresses for shard in (*known.also, *known.shards)}
        notes = {}
        for one in state.copies:
            mapped = shards.get(one.copy.shard_id, ())
            here = mapped[one.copy.replica] if one.copy.replica < len(mapped) else ""
            address = one.report.address if one.report and one.report.address else here
            notes[address] = Note(one.report.node_name if one.report else "", one.problem)
        return notes

    def _check(self, tls: bool, tokens: bool) -> None:
        if tls and self._reach.tls is None:
            raise InvalidArgument(
                f"the services of {self.target} speak TLS: say whom to trust (--ca, or tls=Tls(ca=…))"
            )
        if not tls and self._reach.tls is not None:
            raise InvalidArgument(f"the services of {self.target} do not speak TLS; leave tls out")
        if tokens and self._reach.token is None:
            raise InvalidArgument(f"the services of {self.target} ask for a token")

    def _ask_services(self, known: ShardMap) -> ShardMap:
        found = members_of(known.addresses, self._lines.place).values()
        maps = [one.map for one in found if isinstance(one, Member) and one.map is not None]
        return max([known, *maps], key=lambda one: one.epoch)
