"""Memories, figures and operations of a cluster: told to every process, and summed over one replica of every shard."""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from memory_service.cluster.attending import learn_shards
from memory_service.cluster.route import Route, lost_shard, missing
from memory_service.cluster.steps import Flow, Together, outcomes
from memory_service.errors import FotError, InvalidArgument, NotFound, Unavailable
from memory_service.paging import page_size
from memory_service.shards import Shard
from memory_service.types.documents import DocumentInfo
from memory_service.types.listings import Page
from memory_service.types.memories import MemoryInfo, Stats
from memory_service.types.operations import Operation, OperationState
from memory_service.verbs import (
    CreateMemory,
    DeleteMemory,
    GetMemory,
    GetStats,
    ListDocuments,
    ListMemories,
    ListOperations,
    StartOperation,
    Verb,
)

Item = TypeVar("Item", MemoryInfo, DocumentInfo)
_STATES = (OperationState.RUNNING, OperationState.FAILED, OperationState.CANCELLED, OperationState.DONE)


def create(route: Route, verb: CreateMemory) -> Flow[MemoryInfo]:
    """Create the memory in every process; each shard needs one that did."""
    verb = replace(verb, created_at=verb.created_at or time.time())
    found = yield from route.patiently(route.map.addresses, verb, each_shard=True)
    check_each_shard(route, found)
    infos = [one for one in found.values() if isinstance(one, MemoryInfo)]
    route.known.learn_spec(verb.name, infos[0].spec)
    for address, one in found.items():
        if isinstance(one, Unavailable):
            route.health.owe(address, route.stamps.next())
    return _summed([replace(one, documents=0, tokens=0, bytes=0) for one in infos])


def delete(route: Route, verb: DeleteMemory) -> Flow[None]:
    """Delete the memory in every process. NotFound if none had it."""
    found = yield from route.patiently(route.map.addresses, verb, each_shard=True)
    route.known.forget_memory(verb.name)
    errors = [one for one in found.values() if isinstance(one, FotError)]
    gone = [one for one in errors if isinstance(one, NotFound)]
    if len(gone) == len(found):
        raise gone[0]
    check_each_shard(route, {address: None if one in gone else one for address, one in found.items()})
    for address, one in found.items():
        if isinstance(one, Unavailable):
            route.health.owe(address, route.stamps.next())


def get(route: Route, verb: GetMemory) -> Flow[MemoryInfo]:
    """The memory, its figures summed. A degrading client is told of what is there, and learns what each shard holds."""
    flows = [route.ask(shard, replace(verb, placement=_placement(route, shard))) for shard in route.map.shards]
    found = outcomes((yield Together(flows)))
    lost = [one for one in found if missing(one)]
    if not route.degrades or len(lost) == len(found):
        route.check_missing(found)
    for one in found:
        if isinstance(one, FotError) and not missing(one):
            raise one
    infos = [one for one in found if isinstance(one, MemoryInfo)]
    route.known.learn_spec(verb.name, infos[0].spec)
    if route.degrades:
        there = [shard for shard, one in zip(route.map.shards, found, strict=True) if isinstance(one, MemoryInfo)]
        yield from learn_shards(route, verb.name, there)
    return _summed(infos)


def stats(route: Route, verb: GetStats) -> Flow[Stats]:
    """Figures summed over one replica of every shard."""
    flows = [route.ask(shard, replace(verb, placement=_placement(route, shard))) for shard in route.map.shards]
    found: Sequence[Any] = outcomes((yield Together(flows)))
    route.check_missing(found)
    for one in found:
        if isinstance(one, FotError):
            raise one
    names = [field.name for field in fields(Stats) if field.name != "memory"]
    return Stats(verb.memory, **{name: sum(getattr(one, name) for one in found) for name in names})


def _placement(route: Route, shard: Shard) -> Any:
    return None if len(route.map.shards) == 1 and not route.map.also else route.map.placement(shard)


def _summed(infos: Sequence[MemoryInfo]) -> MemoryInfo:
    return replace(
        infos[0],
        created_at=min(one.created_at for one in infos),
        documents=sum(one.documents for one in infos),
        tokens=sum(one.tokens for one in infos),
        bytes=sum(one.bytes for one in infos),
    )


def check_each_shard(route: Route, found: dict[str, Any]) -> None:
    """Raise unless one replica of every shard did what it was told; the first refusal, else Unavailable."""
    for one in found.values():
        if isinstance(one, FotError) and not isinstance(one, Unavailable):
            raise one
    lost = [shard for shard in route.map.shards if all(isinstance(found[a], FotError) for a in shard.addresses)]
    route.check_missing([lost_shard(shard, [found[a] for a in shard.addresses]) for shard in lost])


# --- Listings -------------------------------------------------------------------------------------------------------


def list_memories(route: Route, verb: ListMemories) -> Flow[Page[MemoryInfo]]:
    """Memories by name; figures of one name summed."""

    def ask(shard: Shard, token: str) -> Verb[Page[MemoryInfo]]:
        return replace(verb, page_token=token, placement=_placement(route, shard))

    items, rest = yield from _merged(route, ask, lambda _, one: one.name, verb.page_size, verb.page_token)
    return Page(tuple(_summed(alike) for alike in items), rest)


def list_documents(route: Route, verb: ListDocuments) -> Flow[Page[DocumentInfo]]:
    """Documents by id, of their owners alone."""

    def ask(shard: Shard, token: str) -> Verb[Page[DocumentInfo]]:
        return replace(verb, page_token=token)

    def owned(shard: Shard, one: DocumentInfo) -> str | None:
        return one.id if route.map.owner(verb.memory, one.id).id == shard.id else None

    items, rest = yield from _merged(route, ask, owned, verb.page_size, verb.page_token)
    return Page(tuple(alike[0] for alike in items), rest)


def _merged(
    route: Route,
    ask: Callable[[Shard, str], Verb[Page[Any]]],
    key: Callable[[Shard, Any], str | None],
    size: int,
    token: str,
) -> Flow[tuple[list[list[Any]], str]]:
    """A page of several sorted listings: items of equal keys together, and the token of the next page.

    The token is the last key given out, and for every shard the page of its own listing that holds what follows; such
    a page may be read again, for a shard's tokens lead only from one of its pages to the next.
    """
    size = page_size(size)
    after, tokens = _opened(route, token)
    pages: dict[str, Page[Any]] = {}
    while True:
        waiting = [shard for shard in route.map.shards if shard.id not in pages and tokens[shard.id] is not None]
        if not waiting:
            break
        asked = [_one_page(route, shard, ask, tokens[shard.id] or "") for shard in waiting]
        found = outcomes((yield Together(asked)))
        route.check_missing(found)
        for shard, one in zip(waiting, found, strict=True):
            if isinstance(one, FotError):
                raise one
            fresh = [item for item in one.items if (name := key(shard, item)) is not None and name > after]
            if fresh or not one.next:
                pages[shard.id] = Page(tuple(fresh), one.next)
            else:
                tokens[shard.id] = one.next
    by_key: dict[str, list[Any]] = {}
    bound: str | None = None  # Beyond it a shard may have more than its page shows.
    for shard in route.map.shards:
        page = pages.get(shard.id, Page(()))
        for item in page.items:
            by_key.setdefault(str(key(shard, item)), []).append(item)
        if page.next:
            last = str(key(shard, page.items[-1]))
            bound = last if bound is None else min(bound, last)
    names = sorted(name for name in by_key if bound is None or name <= bound)[:size]
    left = len(names) < len(by_key) or any(page.next for page in pages.values())
    rest = _sealed(route, names[-1], tokens) if left and names else ""
    return [by_key[name] for name in names], rest


def _one_page(route: Route, shard: Shard, ask: Callable[[Shard, str], Verb[Page[Any]]], token: str) -> Flow[Page[Any]]:
    """A page of a shard's listing; its first one where the replica that gave the token answers no more."""
    try:
        return (yield from route.ask(shard, ask(shard, token)))
    except InvalidArgument:
        # Replicas may read only tokens of their own.
        if not token:
            raise
    return (yield from route.ask(shard, ask(shard, "")))


def _sealed(route: Route, after: str, tokens: dict[str, str | None]) -> str:
    text = json.dumps([route.map.epoch, after, tokens])
    return base64.urlsafe_b64encode(text.encode("utf-8", "surrogatepass")).decode()


def _opened(route: Route, token: str) -> tuple[str, dict[str, str | None]]:
    """The last key given out, and each shard's page token. By another map the shards' listings begin anew."""
    fresh: dict[str, str | None] = dict.fromkeys(route.map.ids, "")
    if not token:
        return "", fresh
    try:
        raw = base64.b64decode(token, altchars=b"-_", validate=True)
        epoch, after, tokens = json.loads(raw.decode("utf-8", "surrogatepass"))
        if not isinstance(after, str) or not isinstance(tokens, dict):
            raise ValueError
    except (binascii.Error, ValueError, UnicodeDecodeError):
        raise InvalidArgument("this page token belongs to no page of this listing; start again without one") from None
    return after, tokens if epoch == route.map.epoch and tokens.keys() == fresh.keys() else fresh


# --- Operations -----------------------------------------------------------------------------------------------------


def start(route: Route, verb: StartOperation) -> Flow[Operation]:
    """Start the work in every process."""
    found = yield from route.patiently(route.map.addresses, verb, each_shard=True)
    check_each_shard(route, found)
    return one_operation({address: one for address, one in found.items() if isinstance(one, Operation)})


def list_operations(route: Route, verb: ListOperations) -> Flow[Page[Operation]]:
    """The newest operations of every process, each by itself; one page."""
    asked = replace(verb, page_token="")
    found = yield from route.everywhere(route.map.addresses, asked)
    alone = [
        one_operation({address: one})
        for address, page in found.items()
        if not isinstance(page, FotError)
        for one in page.items
    ]
    alone.sort(key=lambda one: -one.created_at)
    return Page(tuple(alone[: page_size(verb.page_size)]))


def one_operation(parts: dict[str, Operation], lacking: Sequence[str] = ()) -> Operation:
    """Work of several processes as one; `lacking` are others that it concerns, where none was begun."""
    first = next(iter(parts.values()))
    names = {address: one.id for address, one in parts.items()} | dict.fromkeys(lacking, "")
    told = json.dumps(names).encode()
    state = next(state for state in _STATES if any(one.state is state for one in parts.values()))
    messages = dict.fromkeys(one.message for one in parts.values() if one.state is state)
    return replace(
        first,
        id=base64.urlsafe_b64encode(told).decode(),
        state=state,
        done=sum(one.done for one in parts.values()),
        total=sum(one.total for one in parts.values()),
        message="; ".join(message for message in messages if message),
        created_at=min(one.created_at for one in parts.values()),
        updated_at=max(one.updated_at for one in parts.values()),
    )


def operation_parts(name: str) -> dict[str, str]:
    """Operations by process; empty where none was begun. Raises NotFound for what `one_operation` did not make."""
    try:
        parts = json.loads(base64.b64decode(name, altchars=b"-_", validate=True))
        if isinstance(parts, dict) and any(parts.values()) and all(isinstance(one, str) for one in parts.values()):
            return parts
    except (binascii.Error, ValueError):
        pass
    raise NotFound("no such operation")
