"""Snapshots of a cluster's memories: one part a shard, under one id.

All parts are of one moment: every shard holds its writers from its own moment on until all have theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from memory_service.cluster import memories
from memory_service.cluster.memories import check_each_shard, one_operation, operation_parts
from memory_service.cluster.route import BEHIND, Route, lost_shard
from memory_service.cluster.steps import Flow, Pause, Together, answers, outcomes
from memory_service.errors import AlreadyExists, FailedPrecondition, FotError, NotFound, Unavailable
from memory_service.paging import page_of
from memory_service.shards import OTHER_NAME, Shard, stamp_at
from memory_service.types.documents import counted
from memory_service.types.listings import MAX_PAGE_SIZE, Page
from memory_service.types.operations import Operation, OperationKind, OperationState
from memory_service.types.snapshots import Snapshot, check_snapshot_id
from memory_service.verbs import (
    CancelOperation,
    CreateSnapshot,
    DeleteSnapshot,
    GetMemory,
    GetOperation,
    GetSnapshot,
    ListSnapshots,
    MarkBehind,
    ReleaseHold,
    RestoreSnapshot,
)

HOLD_S = 10.0  # A shard that takes longer to note what it has fails the snapshot.
_LOOKS, _LOOK_S = 40, 0.05


def create(route: Route, verb: CreateSnapshot) -> Flow[Operation]:
    """Take a part of every shard, of one replica that lacks nothing, all at one moment.

    The same id again is the same snapshot; FailedPrecondition if only some shards have it. Writers wait for one
    exchange with every shard, and if this client dies meanwhile for HOLD_S.
    """
    if not verb.snapshot:
        raise FailedPrecondition("a cluster's snapshot needs an id, so that its shards give it the same")
    _check_settled(route)
    listed = yield from _listed(route, verb.memory, each_shard=True)
    having = {
        address
        for address, mine in listed.items()
        if not isinstance(mine, FotError) and any(one.id == verb.snapshot for one in mine)
    }
    if len(route.map.shards) > 1:
        verb = replace(verb, hold_s=HOLD_S)
    found = yield Together([_one_of(route, shard, verb, having) for shard in route.map.shards])
    begun: dict[str, Operation] = dict(one for one in found if not isinstance(one, FotError))
    held = [address for address, one in begun.items() if one.held_until]
    try:
        route.check_missing(outcomes(found))
        answers(found)
        if held and len(held) < len(begun):
            raise FailedPrecondition(
                f"some shards have snapshot {verb.snapshot!r} already, of another moment; delete it and take it again, "
                "or choose another id",
                reason="SNAPSHOT_INCOMPLETE",
            )
        # Nobody writes anywhere now.
        answers((yield Together([route.at(address, ReleaseHold(begun[address].id)) for address in held])))
    except FotError:
        yield from _give_up(route, {address: begun[address] for address in held})
        raise
    return replace(one_operation(begun), held_until=0.0)


def _give_up(route: Route, begun: dict[str, Operation]) -> Flow[None]:
    """Cancel work, and wait a little for its end: until then the snapshot cannot be deleted."""
    yield Together([route.at(address, CancelOperation(one.id)) for address, one in begun.items()])
    for _ in range(_LOOKS):
        found = yield Together([route.at(address, GetOperation(one.id)) for address, one in begun.items()])
        if not any(isinstance(one, Operation) and one.state is OperationState.RUNNING for one in found):
            return
        yield Pause(_LOOK_S)


def _one_of(route: Route, shard: Shard, verb: CreateSnapshot, having: Collection[str]) -> Flow[tuple[str, Operation]]:
    """Ask one replica of a shard, and the next if it is away or may lack writes: (who, its operation).

    Who has the snapshot comes first, then the same for all clients: two replicas' parts would be of two moments.
    """
    failures: list[FotError] = []
    for address in sorted(shard.addresses, key=lambda one: (one not in having, not route.health.well(one))):
        try:
            operation = yield from route.at(address, verb)
            return address, operation
        except Unavailable as error:
            failures.append(error)
    raise lost_shard(shard, failures)


def list_snapshots(route: Route, verb: ListSnapshots) -> Flow[Page[Snapshot]]:
    """Snapshots by id, the parts of one together; each says which shards' parts were not found."""
    parts = yield from _parts(route, verb.memory)
    names, rest = page_of(sorted(parts), verb.page_size, verb.page_token)
    return Page(tuple(_joined(list(parts[name].values())) for name in names), rest)


def get(route: Route, verb: GetSnapshot) -> Flow[Snapshot]:
    """One snapshot. NotFound if no process has a part of it."""
    check_snapshot_id(verb.snapshot)
    parts = yield from _parts(route, "")
    if verb.snapshot not in parts:
        raise NotFound(f"no snapshot {verb.snapshot!r}")
    return _joined(list(parts[verb.snapshot].values()))


def delete(route: Route, verb: DeleteSnapshot) -> Flow[None]:
    """Delete the parts in every process. NotFound if none had one."""
    found = yield from route.patiently(route.map.addresses, verb)
    gone = [one for one in found.values() if isinstance(one, NotFound)]
    if len(gone) == len(found):
        raise gone[0]
    for one in found.values():
        if isinstance(one, FotError) and not isinstance(one, NotFound):
            raise one


def restore(route: Route, verb: RestoreSnapshot) -> Flow[Operation]:
    """Restore in every process that has its shard's part; those that have not are behind until they are healed.

    Everybody must be there: who is away may come back with an older memory of the same name.
    """
    check_snapshot_id(verb.snapshot)
    _check_settled(route)
    held = yield from _held(route, verb.snapshot)
    parts = [one for mine in held.values() for one in mine]
    if not parts:
        raise NotFound(f"no snapshot {verb.snapshot!r}")
    told = _joined(parts)
    if told.missing:
        raise FailedPrecondition(
            f"snapshot {verb.snapshot!r} lacks its parts of shards {', '.join(told.missing)}; bring them to the "
            "snapshots' directories of these shards, then restore",
            reason="SNAPSHOT_INCOMPLETE",
        )
    if told.problem:
        raise FailedPrecondition(f"snapshot {verb.snapshot!r}: {told.problem}", reason="SNAPSHOT_INCOMPLETE")
    if sorted(told.shards) != sorted(route.map.ids) and max(len(told.shards), len(route.map.ids)) > 1:
        was = f"shards {', '.join(told.shards)}" if told.shards else "one service"
        raise FailedPrecondition(
            f"snapshot {verb.snapshot!r} is of {was}, this cluster has {', '.join(route.map.ids)}; restore it into a "
            "cluster of the same shards, then let that grow or shrink",
            reason="OTHER_SHARDS",
        )
    if len(route.map.ids) > 1 and verb.memory not in ("", told.memory):
        raise FailedPrecondition(OTHER_NAME.format(told.memory), reason="OTHER_NAME")
    holders, lacking = _holders(route, held)
    yield from _check_free(route, verb.memory or told.memory)
    for address in lacking:
        yield from route.at(address, MarkBehind(route.stamps.next()))
    found = outcomes((yield Together([route.at(address, verb) for address in holders])))
    begun = {address: one for address, one in zip(holders, found, strict=True) if isinstance(one, Operation)}
    if len(begun) < len(found):
        yield from _give_up(route, begun)
    answers(found)
    return one_operation(begun, lacking)


def operation(route: Route, verb: GetOperation | CancelOperation) -> Flow[Operation]:
    """How far the work has come in all processes where it was started.

    Once a restore is done, processes without the snapshot lack its memory since then: they are told.
    """
    parts = operation_parts(verb.operation)
    if not parts.keys() <= set(route.map.addresses):
        raise NotFound("no such operation")
    asked = {address: name for address, name in parts.items() if name}
    lacking = [address for address, name in parts.items() if not name]
    flows = [route.wait_for(address, replace(verb, operation=name)) for address, name in asked.items()]
    found = dict(zip(asked, answers((yield Together(flows))), strict=True))
    told = one_operation(found, lacking)
    if told.state is OperationState.DONE and len(found) > 1:
        told = yield from _told_as_one(route, told)
    if told.kind is not OperationKind.RESTORE or told.state is OperationState.RUNNING:
        return told
    done = [one for one in found.values() if one.state is OperationState.DONE]
    if len(done) == len(found) and lacking:
        missed = stamp_at(told.updated_at)
        yield Together([route.at(address, MarkBehind(missed)) for address in lacking])
        told = replace(told, message=f"{told.message}; {', '.join(lacking)} will have it when the cluster is healed")
    elif done and len(done) < len(found):
        hint = f"delete memory {told.memory}, which other shards have already, and restore again"
        told = replace(told, message=f"{told.message}; {hint}")
    return told


def _told_as_one(route: Route, done: Operation) -> Flow[Operation]:
    """What came of all shards together, instead of each for itself."""
    try:
        if done.kind is OperationKind.SNAPSHOT:
            kept = yield from get(route, GetSnapshot(done.snapshot))
            held = f"{counted(kept.documents)} of {len(kept.shards)} shards, {kept.bytes:,} bytes"
            return replace(done, message=f"snapshot {kept.id} holds {held}")
        if done.kind is OperationKind.RESTORE:
            info = yield from memories.get(route, GetMemory(done.memory))
            return replace(
                done, message=f"memory {info.name} holds {counted(info.documents)} again, {info.tokens:,} tokens"
            )
    except FotError:
        pass  # It is done all the same; somebody just went away.
    return done


def _holders(route: Route, held: dict[str, list[Snapshot]]) -> tuple[list[str], list[str]]:
    """Processes that have their own shard's part, and those that have not. FailedPrecondition if a shard has none."""
    holders: list[str] = []
    for shard in route.map.shards:
        alone = len(route.map.shards) == 1  # Then it does not matter what the shard is called.
        mine = [a for a in shard.addresses if any(alone or one.shard == shard.id for one in held[a])]
        if not mine:
            raise FailedPrecondition(
                f"no replica of shard {shard.id} has that shard's part of the snapshot; bring it to one of theirs",
                reason="SNAPSHOT_INCOMPLETE",
            )
        holders += mine
    return holders, [address for address in held if address not in holders]


def _check_free(route: Route, name: str) -> Flow[None]:
    """Raise unless every process lacks nothing but a memory of this name."""
    for address, found in (yield from route.everywhere(route.map.addresses, GetMemory(name))).items():
        if isinstance(found, Unavailable) and found.code == BEHIND:
            raise Unavailable(f"{address} may lack writes; heal the cluster, then restore", reason=BEHIND)
        if not isinstance(found, FotError):
            raise AlreadyExists(
                f"there is a memory {name!r} already; restore under another name, or delete that one first"
            )
        if not isinstance(found, NotFound):
            raise found


def _check_settled(route: Route) -> None:
    if route.map.also:
        raise FailedPrecondition("documents are moving between shards; wait until that is done", reason="MOVING")


def _parts(route: Route, memory: str) -> Flow[dict[str, dict[str, Snapshot]]]:
    """Snapshots by id, their parts by shard; of the processes that answer, of which every shard needs one."""
    found = yield from _listed(route, memory, each_shard=True)
    check_each_shard(route, found)
    parts: dict[str, dict[str, Snapshot]] = {}
    for mine in found.values():
        for one in mine if isinstance(mine, list) else []:
            known = parts.setdefault(one.id, {}).get(one.shard)
            if known is None or known.problem:
                parts[one.id][one.shard] = one
    return parts


def _held(route: Route, snapshot: str) -> Flow[dict[str, list[Snapshot]]]:
    """The parts of a snapshot that each process has; raises if one does not answer."""
    listed = yield from _listed(route, "")
    found = answers(list(listed.values()))
    return {address: [one for one in mine if one.id == snapshot] for address, mine in zip(listed, found, strict=True)}


def _listed(route: Route, memory: str, each_shard: bool = False) -> Flow[dict[str, list[Snapshot] | FotError]]:
    """What each process has, errors as values."""
    verb = ListSnapshots(memory, MAX_PAGE_SIZE)
    first = yield from route.patiently(route.map.addresses, verb, each_shard)
    flows = [_rest(route, address, verb, page) for address, page in first.items()]
    return dict(zip(first, outcomes((yield Together(flows))), strict=True))


def _rest(
    route: Route, address: str, verb: ListSnapshots, page: Page[Snapshot] | FotError
) -> Flow[list[Snapshot] | FotError]:
    """A process's listing, from its first page on."""
    if isinstance(page, FotError):
        return page
    found = list(page.items)
    while page.next:
        page = yield from route.at(address, replace(verb, page_token=page.next))
        found += page.items
    return found


def _joined(parts: Sequence[Snapshot]) -> Snapshot:
    """The parts of one snapshot as one, each shard's once."""
    by_shard = {one.shard: one for one in sorted(parts, key=lambda one: bool(one.problem), reverse=True)}
    mine = [by_shard[shard] for shard in sorted(by_shard)]
    if len(mine) == 1 and not mine[0].shard:
        return mine[0]
    told = next((one for one in mine if not one.problem), mine[0])
    here = {one.shard for one in mine if not one.problem}
    problems = [f"shard {one.shard}: {one.problem}" for one in mine if one.problem]
    if len({one.shards for one in mine if not one.problem}) > 1:
        problems.append("its parts are of different shard maps")
    return Snapshot(
        id=told.id,
        memory=told.memory,
        created_at=min(one.created_at for one in mine if one.problem == told.problem),
        documents=sum(one.documents for one in mine),
        tokens=sum(one.tokens for one in mine),
        bytes=sum(one.bytes for one in mine),
        shards=told.shards,
        missing=tuple(shard for shard in told.shards if shard not in here),
        problem="; ".join(problems),
    )
