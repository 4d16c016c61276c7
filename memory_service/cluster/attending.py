"""Attention over shards: each owner of a scope is asked, and the answers are joined as if one memory had given them.

A dense answer takes one round. A top k takes two where shards share it: in the first every shard names its own k best;
that settles how many of them are among the best of all, and in the second each answers for so many. Counts, not a
score below which keys are left out: equal scores could not make a top k longer than k, nor rounding shorter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from memory_service.cluster import merging
from memory_service.cluster.known import unknown_tokens
from memory_service.cluster.route import Route, missing
from memory_service.cluster.sessions import home_of, layer_of
from memory_service.cluster.steps import Flow, Together, answers, outcomes
from memory_service.errors import FotError
from memory_service.shards import Shard, ranked
from memory_service.types.answers import Attended, Coverage, TopTokens
from memory_service.types.documents import DocumentInfo
from memory_service.types.listings import Page
from memory_service.types.questions import AttendGroup, AttendOptions, Engine
from memory_service.types.scopes import Scope
from memory_service.types.specs import DType
from memory_service.verbs import Attend, ListDocuments, Search, Verb

_PAGE = 1000
Parts = dict[str, AttendGroup]  # Shard -> what is asked of it.


@dataclass(slots=True, eq=False)
class _Gap:
    """What an answer leaves out because shards are missing."""

    tokens: int = 0
    shards: tuple[str, ...] = ()


def attend(route: Route, verb: Attend) -> Flow[tuple[Attended, ...]]:
    """Answers of all groups, in order."""
    layer = yield from layer_of(route, verb.memory, verb.layer)
    split = [_parts(route, verb.memory, group, layer) for group in verb.groups]
    gaps = [_Gap() for _ in verb.groups]
    found: list[Attended | None] = [None] * len(verb.groups)
    alone = {number: parts for number, parts in enumerate(split) if len(parts) == 1}
    spread = {number: parts for number, parts in enumerate(split) if len(parts) > 1}
    whole = yield from _ask(route, verb, alone, verb.options, gaps, layer)
    for number in alone:
        found[number] = next(iter(whole[number].values()), None)
    if spread:
        both = yield from _spread(route, verb, spread, verb.options, gaps, layer)
        if verb.options.measure and verb.options.top_k:
            exact = replace(verb.options, engine=Engine.EXACT, tokens=True)
            truth = yield from _spread(route, verb, spread, exact, [_Gap() for _ in verb.groups], layer)
            both = {number: replace(one, measured=merging.measured(one, truth[number])) for number, one in both.items()}
        for number, one in both.items():
            found[number] = one if verb.options.tokens else replace(one, tokens=None)
    return tuple(
        _covered(one or merging.nothing(group.queries, verb.options), gap)
        for one, group, gap in zip(found, verb.groups, gaps, strict=True)
    )


def search(route: Route, verb: Search) -> Flow[tuple[TopTokens, ...]]:
    """The best tokens of all groups, in order."""
    layer = yield from layer_of(route, verb.memory, verb.layer)
    split = {number: _parts(route, verb.memory, group, layer) for number, group in enumerate(verb.groups)}
    gaps = [_Gap() for _ in verb.groups]
    found = yield from _ask(route, verb, split, verb.options, gaps, layer)
    empty = replace(verb.options, tokens=True)
    tops = []
    for number, group in enumerate(verb.groups):
        of_shards = list(found[number].values())
        if not of_shards:
            tops.append(merging.nothing(group.queries, empty).tokens)
        elif len(of_shards) == 1:
            tops.append(of_shards[0])
        else:
            best = merging.rank(of_shards, verb.options.top_k, verb.options.logit_gap)
            tops.append(merging.trimmed(merging.weighted(best.tokens)))
    return tuple(one for one in tops if one is not None)


def _covered(answer: Attended, gap: _Gap) -> Attended:
    if not gap.shards:
        return answer
    known = answer.coverage
    return replace(answer, coverage=Coverage(known.searched, known.in_scope + gap.tokens, gap.shards))


# --- Who is asked for what -------------------------------------------------------------------------------------------


def _parts(route: Route, memory: str, group: AttendGroup, layer: int) -> Parts:
    """A group's share for every shard that owns some of its scope; what sees nothing goes to one, to be checked."""
    scope = group.scope
    documents: dict[str, tuple[str, ...] | None] = {}
    if scope.documents is None:
        documents = dict.fromkeys(route.map.ids)
    else:
        for name in dict.fromkeys(scope.documents):
            owner = route.map.owner(memory, name).id
            documents[owner] = (*(documents.get(owner) or ()), name)
    sessions: dict[str, tuple[Any, ...]] = {}
    for one in scope.sessions:
        home = home_of(route, one.id).id
        known = route.known.session(one.id)
        length = known.tokens[layer] if known is not None and known.tokens else 0
        at_least = max(one.at_least, length if one.until is None else min(length, one.until))
        sessions[home] = (*sessions.get(home, ()), replace(one, at_least=at_least))
    names = dict.fromkeys([*documents, *sessions]) or {ranked(route.map.shards, memory, "")[0].id: None}
    return {
        name: replace(group, scope=Scope(documents.get(name, ()), scope.where, sessions.get(name, ())))
        for name in names
    }


def _ask(
    route: Route,
    verb: Attend | Search,
    asked: Mapping[int, Parts],
    options: AttendOptions,
    gaps: Sequence[_Gap],
    layer: int,
) -> Flow[dict[int, dict[str, Any]]]:
    """Every shard's answers to these groups, one call a shard. A missing shard leaves a gap, if that is wanted."""
    numbers: dict[str, list[int]] = {}
    for number, parts in asked.items():
        for name in parts:
            numbers.setdefault(name, []).append(number)
    shards = {shard.id: shard for shard in (*route.map.shards, *route.map.also) if shard.id in numbers}
    flows = [_ask_one(route, verb, shard, [asked[n][name] for n in numbers[name]], options)
             for name, shard in shards.items()]  # fmt: skip
    found = outcomes((yield Together(flows)))
    answered: dict[int, dict[str, Any]] = {number: {} for number in asked}
    if not route.degrades:
        route.check_missing(found)
    stale: list[Shard] = []
    for shard, one in zip(shards.values(), found, strict=True):
        if missing(one):
            for number in numbers[shard.id]:
                _leave_out(route, verb.memory, shard, asked[number][shard.id], gaps[number], layer)
            continue
        if isinstance(one, FotError):
            raise one
        for number, answer in zip(numbers[shard.id], one, strict=True):
            answered[number][shard.id] = answer
        if route.degrades and isinstance(verb, Attend) and route.known.may_list(verb.memory, shard.id):
            groups = [asked[number][shard.id] for number in numbers[shard.id]]
            if not all(_as_known(route, verb.memory, shard, *pair, layer) for pair in zip(groups, one, strict=True)):
                stale.append(shard)
    if stale:
        yield from learn_shards(route, verb.memory, stale)
    return answered


def _ask_one(
    route: Route, verb: Attend | Search, shard: Shard, groups: Sequence[AttendGroup], options: AttendOptions
) -> Flow[Any]:
    alone = len(route.map.shards) == 1 and not route.map.also
    placement = None if alone else route.map.placement(shard)
    lost: set[str] = set()
    for group in groups:
        for one in group.scope.sessions:
            known = route.known.session(one.id)
            lost |= known.lost if known else set()
    asked: Verb[Any] = replace(verb, groups=tuple(groups), options=options, placement=placement)
    return (yield from route.ask(shard, asked, frozenset(lost)))


# --- Two rounds -----------------------------------------------------------------------------------------------------


def _spread(
    route: Route,
    verb: Attend,
    spread: Mapping[int, Parts],
    options: AttendOptions,
    gaps: Sequence[_Gap],
    layer: int,
) -> Flow[dict[int, Attended]]:
    """Answers to groups that several shards share."""
    first = replace(options, tokens=options.top_k > 0, attribution=False, measure=False, output_dtype=DType.F32)
    while True:
        before = [gap.shards for gap in gaps]
        found = yield from _ask(route, verb, spread, first, gaps, layer)
        if options.top_k:
            joined = yield from _top_k(route, verb, spread, found, options, first, gaps, layer)
        else:
            joined = yield from _dense(route, verb, spread, found, options, first, gaps, layer)
        # A shard that went missing between the rounds left its tokens in the first: without it, from the start.
        if joined is not None:
            return joined
        for gap, shards in zip(gaps, before, strict=True):
            gap.tokens, gap.shards = (gap.tokens, gap.shards) if gap.shards == shards else (0, ())


def _top_k(
    route: Route,
    verb: Attend,
    spread: Mapping[int, Parts],
    found: dict[int, dict[str, Attended]],
    options: AttendOptions,
    first: AttendOptions,
    gaps: Sequence[_Gap],
    layer: int,
) -> Flow[dict[int, Attended] | None]:
    shares: dict[int, dict[str, Attended]] = {}
    best: dict[int, TopTokens] = {}
    again: dict[int, Parts] = {}
    for number, of_shards in found.items():
        rankings = merging.rank(_tops(of_shards.values()), options.top_k, options.logit_gap) if of_shards else None
        shares[number] = {}
        if rankings is None:
            continue
        best[number] = rankings.tokens
        for (name, answer), counts in zip(of_shards.items(), rankings.counts(len(of_shards)), strict=True):
            mine = merging.share(answer, counts)
            if mine is None:
                again.setdefault(number, {})[name] = replace(spread[number][name], counts=counts)
            else:
                shares[number][name] = mine
    if again:
        second = replace(first, logit_gap=None, tokens=True)
        rest = yield from _ask(route, verb, again, second, gaps, layer)
        for number, parts in again.items():
            if rest[number].keys() != parts.keys():
                return None
            shares[number] |= rest[number]
    joined = {}
    for number, of_shards in shares.items():
        if not of_shards:
            joined[number] = merging.nothing(verb.groups[number].queries, options)
            continue
        if number in again:
            # What the second round found: a document may have come or gone between the two.
            kept = [_masked(one) for one in of_shards.values()]
            best[number] = merging.rank(kept, options.top_k).tokens
        wanted = replace(options, tokens=options.tokens or options.measure)
        joined[number] = merging.joined(list(of_shards.values()), best[number], wanted)
    return joined


def _tops(found: Iterable[Attended]) -> list[TopTokens]:
    return [one.tokens for one in found if one.tokens is not None]


def _masked(answer: Attended) -> TopTokens:
    """The tokens of a share: none in rows where the shard takes no part."""
    assert answer.tokens is not None
    none = (answer.lse == float("-inf"))[..., None]
    tokens = answer.tokens
    return replace(tokens, source=tokens.source.masked_fill(none, -1), offset=tokens.offset.masked_fill(none, -1),
                   score=tokens.score.masked_fill(none, float("-inf")))  # fmt: skip


def _dense(
    route: Route,
    verb: Attend,
    spread: Mapping[int, Parts],
    found: dict[int, dict[str, Attended]],
    options: AttendOptions,
    first: AttendOptions,
    gaps: Sequence[_Gap],
    layer: int,
) -> Flow[dict[int, Attended] | None]:
    joined = {
        number: merging.joined(list(of_shards.values()), None, options)
        if of_shards
        else merging.nothing(verb.groups[number].queries, options)
        for number, of_shards in found.items()
    }
    if not options.attribution:
        return joined
    # A mean over rows of a part's own masses says nothing of the whole: each part is weighed against the whole's sum.
    asked = {
        number: {name: _with_lse(spread[number][name], joined[number].lse) for name in of_shards}
        for number, of_shards in found.items()
        if of_shards
    }
    masses = yield from _ask(route, verb, asked, replace(first, attribution=True), gaps, layer)
    for number, parts in asked.items():
        if masses[number].keys() != parts.keys():
            return None
        attributions = [one.attribution or () for one in masses[number].values()]
        attribution = merging.together(attributions, joined[number].lse)
        joined[number] = replace(joined[number], attribution=attribution)
    return joined


def _with_lse(group: AttendGroup, lse: Tensor) -> AttendGroup:
    return replace(group, lse=lse)


# --- What is left out -------------------------------------------------------------------------------------------------


def _leave_out(route: Route, memory: str, shard: Shard, part: AttendGroup, gap: _Gap, layer: int) -> None:
    """Count the tokens a missing shard would have shown. Raises Unavailable if they are not known."""
    if shard.id in gap.shards:
        return
    documents = 0
    if part.scope.documents != ():
        known = route.known.tokens(route.map, memory, shard.id, part.scope)
        if known is None:
            raise unknown_tokens(shard.id)
        documents = known
    sessions = route.known.session_tokens(part.scope, layer)
    if sessions is None:
        raise unknown_tokens(shard.id)
    gap.tokens += documents + sessions
    gap.shards += (shard.id,)


def _as_known(route: Route, memory: str, shard: Shard, part: AttendGroup, answer: Attended, layer: int) -> bool:
    """Whether a shard looked at as many tokens as this client believes it holds."""
    if part.scope.documents == ():
        return True
    documents = route.known.tokens(route.map, memory, shard.id, part.scope)
    sessions = route.known.session_tokens(part.scope, layer)
    return documents is not None and sessions is not None and documents + sessions == answer.coverage.in_scope


def learn_shards(route: Route, memory: str, shards: Iterable[Shard]) -> Flow[None]:
    """Learn what these shards hold, so that it can be told what is left out when one is missing."""
    listed = list(shards)
    found = outcomes((yield Together([_list_shard(route, memory, shard) for shard in listed])))
    for shard, one in zip(listed, found, strict=True):
        if not isinstance(one, FotError):
            route.known.learn_shard(route.map, memory, shard.id, one)
        elif not missing(one):
            answers([one])


def _list_shard(route: Route, memory: str, shard: Shard) -> Flow[list[DocumentInfo]]:
    found: list[DocumentInfo] = []
    token = ""
    while True:
        page: Page[DocumentInfo] = yield from route.ask(shard, ListDocuments(memory, None, _PAGE, token), patient=False)
        found += [one for one in page.items if route.map.owner(memory, one.id).id == shard.id]
        token = page.next
        if not token:
            return found
