"""Every verb's way through a cluster. A call routed by an old shard map is repeated by the new one, unseen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from memory_service.cluster import attending, documents, memories, sessions, snapshots
from memory_service.cluster.health import Health
from memory_service.cluster.known import Known
from memory_service.cluster.options import ClusterOptions
from memory_service.cluster.route import Route, Stamp
from memory_service.cluster.steps import Budget, Flow, NewMap, Pause
from memory_service.errors import InvalidArgument, StaleMap, Unavailable
from memory_service.shards import ShardMap, Stamps
from memory_service.verbs import (
    AppendSessions,
    Attend,
    CancelOperation,
    CloseSession,
    CreateMemory,
    CreateSnapshot,
    DeleteDocument,
    DeleteMemory,
    DeleteSnapshot,
    Fetch,
    GetDocument,
    GetMemory,
    GetOperation,
    GetSnapshot,
    GetStats,
    ListDocuments,
    ListMemories,
    ListOperations,
    ListSnapshots,
    OpenSession,
    PutDocument,
    RenewSession,
    RestoreSnapshot,
    Search,
    StartOperation,
    Verb,
)

Answer = TypeVar("Answer")

_MAPS = 8  # New maps that one call may meet.
_STALE_PAUSE_S = 0.05
_LOOK_S = 5.0
_FIND_PAUSE_S = 0.2


def _fetch(route: Route, verb: Fetch) -> Flow[object]:
    return sessions.fetch(route, verb) if verb.source.startswith(sessions.PREFIX) else documents.fetch(route, verb)


_WAYS: Mapping[type[Verb[Any]], Callable[[Route, Any], Flow[Any]]] = {
    CreateMemory: memories.create,
    GetMemory: memories.get,
    ListMemories: memories.list_memories,
    DeleteMemory: memories.delete,
    PutDocument: documents.put,
    GetDocument: documents.get,
    ListDocuments: memories.list_documents,
    DeleteDocument: documents.delete,
    OpenSession: sessions.open_session,
    AppendSessions: sessions.append,
    RenewSession: sessions.renew,
    CloseSession: sessions.close,
    Attend: attending.attend,
    Search: attending.search,
    Fetch: _fetch,
    GetStats: memories.stats,
    StartOperation: memories.start,
    GetOperation: snapshots.operation,
    ListOperations: memories.list_operations,
    CancelOperation: snapshots.operation,
    CreateSnapshot: snapshots.create,
    GetSnapshot: snapshots.get,
    ListSnapshots: snapshots.list_snapshots,
    DeleteSnapshot: snapshots.delete,
    RestoreSnapshot: snapshots.restore,
}


class Router:
    """Routes the calls of one client; what it learnt of the cluster on the way is kept here."""

    def __init__(self, options: ClusterOptions):
        self.options = options
        self.map: ShardMap | None = None
        self.health = Health()
        self.known = Known()
        self.stamps = Stamps()
        self._again = 0.0

    def flow(self, verb: Verb[Answer], timeout_s: float) -> Flow[Answer]:
        """The steps that answer a verb within `timeout_s`."""
        way = _WAYS.get(type(verb))
        if way is None:
            raise InvalidArgument(f"{type(verb).__name__} is for one process; ask that, not the cluster")
        budget = Budget(timeout_s)
        stamp = Stamp()
        maps = 0
        while True:
            if self.map is None or (self.map.epoch == 0 and budget.now() > self._again):
                # By a mere list of addresses nobody tells this client that documents move: it must look.
                self.map = yield from self._find(budget)
                self._again = budget.now() + _LOOK_S
            route = Route(self.map, budget, self.options, self.health, self.known, self.stamps, stamp)
            try:
                return (yield from way(route, verb))  # type: ignore[no-any-return]  # a verb's way gives its answer
            except StaleMap:
                maps += 1
                if maps > _MAPS:
                    raise
            if maps > 1:
                yield Pause(_STALE_PAUSE_S * maps)
            found = yield NewMap(route.map.epoch)
            if self.map is None or found.epoch > self.map.epoch:
                self.map = found

    def _find(self, budget: Budget) -> Flow[ShardMap]:
        """The map, from processes that may just be starting."""
        until = min(budget.until, budget.now() + self.options.patience_s)
        while True:
            try:
                return (yield NewMap(0))  # type: ignore[no-any-return]  # the step's answer
            except Unavailable:
                if budget.now() + _FIND_PAUSE_S >= until:
                    raise
            yield Pause(_FIND_PAUSE_S)
