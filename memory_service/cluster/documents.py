"""Documents in a cluster: written to every replica of their owner, read from one.

The client stamps a write with a generation, the same for all replicas. So the same writes end in the same state in
whatever order they arrive, and what a replica missed can be told by comparing generations.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from memory_service.cluster.route import FIRST_PAUSE_S, LONGEST_PAUSE_S, Route, lost_shard
from memory_service.cluster.steps import Flow, Pause, Together, outcomes
from memory_service.errors import (
    DeadlineExceeded,
    FotError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Superseded,
    Unavailable,
)
from memory_service.shards import Member, Shard
from memory_service.types.documents import Conflict, DocumentInfo
from memory_service.verbs import DeleteDocument, Fetch, GetDocument, GetShardMap, PutDocument, Verb

_TRIES = 5  # Of stamps, where clocks differ.
Told = dict[str, Any]  # Address -> what it answered, errors as values.


def get(route: Route, verb: GetDocument) -> Flow[DocumentInfo]:
    """Ask the owner."""
    return (yield from route.ask(route.map.owner(verb.memory, verb.document), verb))


def fetch(route: Route, verb: Fetch) -> Flow[object]:
    """Ask the owner."""
    return (yield from route.ask(route.map.owner(verb.memory, verb.source), verb))


def put(route: Route, verb: PutDocument) -> Flow[DocumentInfo]:
    """Store a document in every replica of its owner, and while it moves of the next owner too."""
    verb = replace(verb, request_id=verb.request_id or secrets.token_hex(16))
    shards = route.map.writers(verb.memory, verb.document.id)
    several = sum(len(shard.addresses) for shard in shards) > 1

    def deliver(generation: int) -> Flow[Told]:
        stamped = replace(verb, generation=generation)
        if verb.conflict is Conflict.FAIL and several:
            return _create(route, shards, stamped)
        return _replace(route, shards, stamped)

    told = yield from _written(route, shards, deliver, verb.generation)
    info = next(one for one in told.values() if isinstance(one, DocumentInfo))
    if route.degrades:
        route.known.learn_document(verb.memory, info)
    return info


def delete(route: Route, verb: DeleteDocument) -> Flow[None]:
    """Delete a document in every replica. NotFound if none had it."""
    verb = replace(verb, request_id=verb.request_id or secrets.token_hex(16))
    shards = route.map.writers(verb.memory, verb.document)

    def deliver(generation: int) -> Flow[Told]:
        told = yield from _replace(route, shards, replace(verb, generation=generation))
        if any(map(_accepted, told.values())):
            # Who did not have it will not take it any more either.
            told = {address: None if isinstance(one, NotFound) else one for address, one in told.items()}
        return told

    yield from _written(route, shards, deliver, verb.generation)
    route.known.forget_document(verb.memory, verb.document)


def _written(route: Route, shards: Sequence[Shard], deliver: Callable[[int], Flow[Told]], given: int) -> Flow[Told]:
    """Deliver a write until its owner has it. Raises what refused it, or Unavailable when patience ends."""
    stamp = route.stamp
    stamp.generation = stamp.generation or given or route.stamps.next()
    until = min(route.budget.until, route.budget.now() + route.options.patience_s)
    pause, tries = FIRST_PAUSE_S, 0
    lost: Unavailable | None = None
    while True:
        told = yield from deliver(stamp.generation)
        newer = [one for one in told.values() if isinstance(one, Superseded)]
        if newer and not given and not any(_accepted(one) for one in told.values()) and tries < _TRIES:
            # Nobody took it: a clock is ahead of ours. (If some did, another write came in between, and holds.)
            tries += 1
            for one in newer:
                route.stamps.see(int(one.metadata["generation"]))
            stamp.generation = route.stamps.next()
            continue
        # While a document moves its next owner needs it as much: it is read there as soon as the map says so.
        if all(_enough(route, shard, told) for shard in shards):
            _note_missed(route, told, stamp.generation)
            return told
        if not _enough(route, shards[0], told):
            refused = _refusal(shards[0], told)
            hearsay = isinstance(refused, NotFound) and (yield from _is_hearsay(route, shards[0], told))
            if isinstance(refused, DeadlineExceeded):
                raise lost or refused  # Whose absence took the time tells more than that it passed.
            if refused is not None and not hearsay:
                raise refused
        without = next(shard for shard in shards if not _enough(route, shard, told))
        lost = lost_shard(without, [told[a] for a in without.addresses if isinstance(told.get(a), FotError)])
        yield from route.look()
        if route.budget.now() + pause >= until:
            raise lost
        yield Pause(pause)
        pause = min(LONGEST_PAUSE_S, 2 * pause)


def _accepted(one: object) -> bool:
    return not isinstance(one, FotError)


def _holds(one: object) -> bool:
    """Whether the replica now holds the write, or a newer one."""
    return not isinstance(one, FotError) or isinstance(one, Superseded)


def _enough(route: Route, shard: Shard, told: Told) -> bool:
    """Whether a quorum of the shard has the write; it must have been news to one of all that were told."""
    have = sum(_holds(told[address]) for address in shard.addresses if address in told)
    return any(map(_accepted, told.values())) and have >= route.options.quorum(len(shard.addresses))


def _refusal(shard: Shard, told: Told) -> FotError | None:
    """Why the owner refuses the write, if that is final; None if its replicas were only away."""
    answered = [told[address] for address in shard.addresses if address in told]
    errors: list[FotError] = [one for one in answered if isinstance(one, FotError)]
    gone = [error for error in errors if isinstance(error, NotFound)]
    if gone:
        # Nothing to delete, or no memory to write to.
        return gone[0]
    final = [error for error in errors if not isinstance(error, Unavailable | Superseded)]
    if final:
        return final[0]
    return next((error for error in errors if isinstance(error, Superseded)), None)


def _is_hearsay(route: Route, shard: Shard, told: Told) -> Flow[bool]:
    """Whether only replicas that may lack writes say that there is nothing, while one is away that may know better."""
    if not any(isinstance(told.get(address), Unavailable) for address in shard.addresses):
        return False
    without = [address for address in shard.addresses if isinstance(told.get(address), NotFound)]
    members = yield from route.everywhere(without, GetShardMap())
    return not any(isinstance(one, Member) and not one.behind for one in members.values())


def _note_missed(route: Route, told: Told, generation: int) -> None:
    """Replicas that are to hear that they lack a write others have; also one that has no such memory yet."""
    for address, one in told.items():
        if isinstance(one, FotError) and not isinstance(one, Superseded | InvalidArgument):
            route.health.owe(address, generation)


def _replace(route: Route, shards: Sequence[Shard], verb: Verb[Any]) -> Flow[Told]:
    """Tell all replicas at the same time."""
    addresses = [address for shard in shards for address in shard.addresses]
    return (yield from route.everywhere(addresses, verb))


def _create(route: Route, shards: Sequence[Shard], verb: PutDocument) -> Flow[Told]:
    """Store a document that must not exist yet: one replica decides, the others follow.

    That is a replica that has the document, if there is one; else the first, so that of two clients one is refused.
    What the others hold of the document by then is older, or newer: their stamps tell.
    """
    owner = shards[0]
    asked = yield from route.everywhere(owner.addresses, GetDocument(verb.memory, verb.document.id))
    having = [address for address in owner.addresses if isinstance(asked[address], DocumentInfo)]
    reached = [address for address in owner.addresses if isinstance(asked[address], NotFound)]
    told: Told = {address: one for address, one in asked.items() if isinstance(one, Unavailable)}
    for first in [*having[:1], *reached]:
        try:
            info = yield from route.at(first, verb)
        except (Unavailable, ResourceExhausted, NotFound) as error:
            told[first] = error
            continue
        except FotError as error:
            return {first: error}
        told[first] = info
        others = [address for shard in shards for address in shard.addresses if not _accepted_at(told, address)]
        # Another request, for who decides and who follows are not asked the same.
        request_id = blake2b(verb.request_id.encode(), digest_size=16).hexdigest()
        follow = replace(verb, conflict=Conflict.REPLACE, generation=info.generation, request_id=request_id)
        flows = [route.at(address, follow) for address in others]
        told |= dict(zip(others, outcomes((yield Together(flows))), strict=True))
        return told
    return told


def _accepted_at(told: Told, address: str) -> bool:
    return address in told and _accepted(told[address])
