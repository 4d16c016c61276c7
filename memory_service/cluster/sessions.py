"""Sessions in a cluster: each lives in one shard, in all its replicas, and is read from one of them.

A session's id is its shard's, a dot, and chance; so every client knows where it is, and all replicas know it by one id.
A replica that was down knows it no more, or not all of it, and is not asked for it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from memory_service.cluster.route import Patience, Route, lost_shard, missing
from memory_service.cluster.steps import Flow, Pause, Together, outcomes
from memory_service.errors import FotError, InvalidArgument, SessionExpired, Unavailable
from memory_service.shards import Shard, ranked
from memory_service.types.sessions import SessionAppend, SessionInfo
from memory_service.types.specs import MemorySpec
from memory_service.verbs import AppendSessions, CloseSession, Fetch, GetMemory, OpenSession, RenewSession

PREFIX = "session:"


def layer_of(route: Route, memory: str, layer: int) -> Flow[int]:
    """Index of a layer. Raises NotFound, or InvalidArgument if the memory does not have it."""
    try:
        return (yield from _spec_of(route, memory)).layer_index(layer)
    except InvalidArgument:
        # Another memory may have the name by now.
        return (yield from _spec_of(route, memory, anew=True)).layer_index(layer)


def _spec_of(route: Route, memory: str, anew: bool = False) -> Flow[MemorySpec]:
    spec = None if anew else route.known.spec(memory)
    if spec is None:
        shard = min(route.map.shards, key=lambda one: sum(not route.health.well(a) for a in one.addresses))
        info = yield from route.ask(shard, GetMemory(memory))
        spec = info.spec
        route.known.learn_spec(memory, spec)
    return spec


def home_of(route: Route, session: str) -> Shard:
    """The shard of a session. Raises SessionExpired if the cluster has it no more."""
    name = session.partition(".")[0]
    for shard in (*route.map.shards, *route.map.also):
        if shard.id == name:
            return shard
    raise SessionExpired("no such session in this cluster; open another and append the prompt again")


def open_session(route: Route, verb: OpenSession) -> Flow[SessionInfo]:
    """Open a session in a shard drawn by chance, or in the next one that answers."""
    token = secrets.token_urlsafe(18)
    patience = Patience(route.budget, route.options.patience_s)
    while True:
        failures: list[FotError] = []
        for shard in ranked(route.map.shards, verb.memory, token):
            found = yield from route.everywhere(shard.addresses, replace(verb, session=f"{shard.id}.{token}"))
            opened = [one for one in found.values() if isinstance(one, SessionInfo)]
            errors = [one for one in found.values() if isinstance(one, FotError)]
            if opened:
                lost = [address for address, one in found.items() if isinstance(one, FotError)]
                route.known.learn_session(opened[0], lost)
                return opened[0]
            for error in errors:
                if not isinstance(error, Unavailable):
                    raise error
            failures += errors
        yield from route.look()
        pause = patience.pause_s()
        if pause is None:
            raise lost_shard(route.map.shards[0], failures)
        yield Pause(pause)


def append(route: Route, verb: AppendSessions) -> Flow[tuple[SessionInfo, ...]]:
    """Append to every replica of every session's shard; one that has it suffices."""
    homes: dict[str, tuple[Shard, list[int]]] = {}
    for number, one in enumerate(verb.appends):
        shard = home_of(route, one.session)
        homes.setdefault(shard.id, (shard, []))[1].append(number)
    flows = [
        _append_at(route, verb.memory, shard, [verb.appends[number] for number in numbers])
        for shard, numbers in homes.values()
    ]
    found = outcomes((yield Together(flows)))
    infos: dict[int, SessionInfo] = {}
    for (_, numbers), one in zip(homes.values(), found, strict=True):
        if missing(one):
            yield from route.look()
        if isinstance(one, FotError):
            raise one
        infos.update(zip(numbers, one, strict=True))
    return tuple(infos[number] for number in range(len(verb.appends)))


def _append_at(route: Route, memory: str, shard: Shard, appends: Sequence[SessionAppend]) -> Flow[list[SessionInfo]]:
    # A replica is asked only for sessions it has all of: what it lacks it would refuse, and the others with it.
    asked = {address: [n for n, one in enumerate(appends) if address not in _lost(route, one.session)]
             for address in shard.addresses}  # fmt: skip
    flows = [_append_to(route, memory, shard, at, [appends[n] for n in asked[at]]) for at in shard.addresses]
    found = outcomes((yield Together(flows)))
    infos: list[SessionInfo] = []
    for number in range(len(appends)):
        told: dict[str, SessionInfo | FotError] = {}
        for address, one in zip(shard.addresses, found, strict=True):
            if number in asked[address]:
                told[address] = one if isinstance(one, FotError) else one[asked[address].index(number)]
        infos.append(_agreed(route, shard, told))
    return infos


def _append_to(
    route: Route, memory: str, shard: Shard, address: str, appends: Sequence[SessionAppend]
) -> Flow[list[SessionInfo | FotError]]:
    """What one replica answers to every append; if it lacks one session, the others are sent by themselves."""
    if not appends:
        return []
    try:
        return list((yield from route.tell(shard, address, AppendSessions(memory, tuple(appends)))))
    except (SessionExpired, InvalidArgument) as error:
        if len(appends) == 1:
            return [error]
    flows = [route.at(address, AppendSessions(memory, (one,))) for one in appends]
    return list(outcomes((yield Together(flows))))


def _agreed(route: Route, shard: Shard, told: dict[str, SessionInfo | FotError]) -> SessionInfo:
    """What the replicas that did it answered; those that did not have the session no more."""
    done = [one for one in told.values() if isinstance(one, SessionInfo)]
    errors = [one for one in told.values() if isinstance(one, FotError)]
    if done:
        route.known.learn_session(done[0], [address for address, one in told.items() if isinstance(one, FotError)])
        return done[0]
    for kind in (SessionExpired, FotError):
        for error in errors:
            if isinstance(error, kind) and not isinstance(error, Unavailable):
                raise error
    if not errors:
        raise SessionExpired("no replica has all of this session; open another and append the prompt again")
    raise lost_shard(shard, errors)


def renew(route: Route, verb: RenewSession) -> Flow[SessionInfo]:
    """Start the lease anew in all replicas."""
    shard = home_of(route, verb.session)
    found = yield from route.everywhere(shard.addresses, verb)
    told = [one for one in found.values() if isinstance(one, SessionInfo)]
    if told:
        longest = max(told, key=lambda one: sum(one.tokens))
        lost = [a for a, one in found.items() if isinstance(one, FotError) or one.tokens != longest.tokens]
        route.known.learn_session(longest, lost)
        return longest
    return _agreed(route, shard, found)


def close(route: Route, verb: CloseSession) -> Flow[None]:
    """Forget a session in all replicas; those that are away forgot it anyway, or will when its lease ends."""
    try:
        shard = home_of(route, verb.session)
    except SessionExpired:
        return
    found = yield from route.everywhere(shard.addresses, verb)
    route.known.forget_session(verb.session)
    errors = [one for one in found.values() if isinstance(one, FotError)]
    if len(errors) == len(found) and not isinstance(errors[0], Unavailable):
        raise errors[0]


def fetch(route: Route, verb: Fetch) -> Flow[object]:
    """Keys and values of a session, from a replica that has all of it."""
    session = verb.source.removeprefix(PREFIX)
    shard = home_of(route, session)
    yield from renew(route, RenewSession(verb.memory, session))
    return (yield from route.ask(shard, verb, _lost(route, session)))


def _lost(route: Route, session: str) -> frozenset[str]:
    known = route.known.session(session)
    return known.lost if known else frozenset()
