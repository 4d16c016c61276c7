"""A memory over shards answers what one memory answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_service import (
    ALL_DOCUMENTS,
    AlreadyExists,
    AsyncMemory,
    Attended,
    AttendGroup,
    AttendOptions,
    Client,
    InvalidArgument,
    Memory,
    NotFound,
    SessionExpired,
    TopTokens,
    Unavailable,
    scope_of,
)
from memory_service.shards import Shard, ShardMap
from memory_service.verbs import Attend, ListDocuments
from tests.memory_service.clusters import LAYER, SPEC, drawn, services, target

IDS = [f"doc-{number}" for number in range(12)]
# Keys that stand in several documents: equal scores, with equal values.
TWINS = ("twin-1", "twin-2", "twin-3")


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[str]]:
    with services(4) as found:
        yield found


@pytest.fixture(scope="module", params=[1, 2, 4])
def both(request: pytest.FixtureRequest, addresses: list[str]) -> Iterator[tuple[Memory, Memory]]:
    """One memory, and the same over shards."""
    with ExitStack() as closing:
        if request.param == 4:
            mine = addresses
        else:  # A process belongs to one cluster.
            mine = closing.enter_context(services(request.param))
        one = closing.enter_context(Memory.open(":memory:", "m", SPEC))
        many = closing.enter_context(Memory.open(target(mine), "m", SPEC))
        for memory in (one, many):
            for number, name in enumerate(IDS):
                keys, values = drawn(number, 3 + number)
                memory.put(name, keys, values, metadata={"even": number % 2 == 0, "number": number})
            for name in TWINS:
                memory.put(name, *drawn(99, 4), metadata={"number": 99})
        yield one, many


def queries(heads: int = 4, count: int = 5, seed: int = 7) -> Tensor:
    return torch.randn(heads, count, SPEC.head_dim, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def same_tokens(a: TopTokens, b: TopTokens) -> None:
    """Equal scores and weights, best first; which of several equal keys took part is not determined."""
    assert close(a.score, b.score)
    assert close(a.weight, b.weight)
    assert torch.equal(a.source >= 0, b.source >= 0)


def alike(a: Attended, b: Attended) -> None:
    assert close(a.output, b.output)
    assert close(a.lse, b.lse)
    assert (a.coverage, a.engine) == (b.coverage, b.engine)
    assert (a.tokens is None, a.attribution is None, a.measured) == (
        b.tokens is None,
        b.attribution is None,
        b.measured,
    )
    if a.tokens is not None and b.tokens is not None:
        same_tokens(a.tokens, b.tokens)
    if a.attribution is not None and b.attribution is not None:
        masses = [{one.source: one.mass for one in found} for found in (a.attribution, b.attribution)]
        # Among twins the mass may lie with any.
        for twin in TWINS:
            for found in masses:
                found["twins"] = found.get("twins", 0.0) + found.pop(twin, 0.0)
        assert masses[0].keys() == masses[1].keys()
        assert all(abs(masses[0][source] - masses[1][source]) < 1e-5 for source in masses[0])


SCOPES: list[dict[str, Any]] = [
    {},
    {"where": "even = true"},
    {"where": "number >= 99"},
    {"scope": IDS[:5]},
    {"scope": IDS[0]},
    {"scope": [IDS[1], *TWINS]},
    {"scope": IDS[:6], "where": "number > 2"},
    {"where": "number = 1000"},
]


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("top_k", [0, 1, 4, 7, 200])
def test_every_number_of_shards_gives_one_memorys_answer(
    both: tuple[Memory, Memory], scope: dict[str, Any], top_k: int
) -> None:
    wanted = {"top_k": top_k, "tokens": top_k > 0, "attribution": True, "measure": top_k > 0}
    one, many = (memory.attend(LAYER, queries(), **scope, **wanted) for memory in both)
    alike(one, many)


def test_a_top_k_holds_k_keys_however_many_score_alike(both: tuple[Memory, Memory]) -> None:
    _, many = both
    keys, _ = drawn(99, 4)
    found = many.attend(LAYER, keys[1, :, :1], top_k=2, tokens=True, scope=list(TWINS))
    assert found.tokens is not None
    assert (found.tokens.score > -torch.inf).sum(2).tolist() == [[2], [2]]
    assert torch.allclose(found.tokens.weight.sum(2), torch.ones(2, 1))


def test_the_gap_is_measured_from_the_best_of_all_shards(both: tuple[Memory, Memory]) -> None:
    for gap in (0.01, 0.3, 2.0):  # At 0 it would be left to the last bit of equal keys.
        one, many = (m.attend(LAYER, queries(), top_k=9, logit_gap=gap, tokens=True) for m in both)
        alike(one, many)


def test_scale_dtype_and_engine_are_the_callers(both: tuple[Memory, Memory]) -> None:
    one, many = (
        m.attend(LAYER, queries(), top_k=9, scale=0.7, engine="exact", output_dtype="bf16", attribution=True)
        for m in both
    )
    assert many.output.dtype is torch.bfloat16
    assert torch.allclose(one.output.float(), many.output.float(), atol=0.02)
    assert close(one.lse, many.lse)


def test_sessions_and_documents_share_one_softmax(both: tuple[Memory, Memory]) -> None:
    keys, values = drawn(5, 20)
    answers = []
    for memory in both:
        with memory.session() as session:
            session.append([1, 3], keys, values)
            found = [
                session.attend(LAYER, queries(), top_k=k, until=until, documents=documents, tokens=k > 0)
                for k in (0, 6)
                for until in (None, 7)
                for documents in (None, ALL_DOCUMENTS, IDS[:4])
            ]
            assert torch.equal(session.fetch(LAYER, 3, 4).keys, keys[1, :, 3:7])
            answers.append(found)
    for one, many in zip(*answers, strict=True):
        if one.tokens is not None:
            same_tokens(one.tokens, many.tokens)
        assert close(one.output, many.output)
        assert close(one.lse, many.lse)
        assert one.coverage == many.coverage


def test_many_groups_come_back_in_order(both: tuple[Memory, Memory]) -> None:
    groups = [
        AttendGroup(
            scope_of(IDS[number]) if number % 3 else scope_of(where=f"number > {number}"), queries(2, 3, number)
        )
        for number in range(9)
    ]
    groups.append(AttendGroup(scope_of([]), queries(2, 3)))
    for options in (AttendOptions(attribution=True), AttendOptions(top_k=5, tokens=True, attribution=True)):
        for one, many in zip(*(memory.attend_groups(LAYER, groups, options) for memory in both), strict=True):
            alike(one, many)


def test_search_names_the_same_tokens(both: tuple[Memory, Memory]) -> None:
    for scope in SCOPES:
        one, many = (memory.search(LAYER, queries(), top_k=6, **scope) for memory in both)
        same_tokens(one, many)


def test_what_a_memory_refuses_a_cluster_refuses(both: tuple[Memory, Memory]) -> None:
    for memory in both:
        with pytest.raises(NotFound):
            memory.attend(LAYER, queries(), scope=["doc-0", "never-there"])
        with pytest.raises(InvalidArgument):
            memory.attend(2, queries())
        with pytest.raises(InvalidArgument):
            memory.attend(LAYER, queries()[:, :, :3], scope=[])
        with pytest.raises(NotFound):
            memory.get("never-there")
        with pytest.raises(NotFound):
            memory.delete("never-there")
        with pytest.raises(AlreadyExists):
            memory.put("doc-1", *drawn(1, 4))
        with pytest.raises(SessionExpired):
            memory.resume_session("s0.never-opened-here")


def test_documents_listings_and_figures_are_those_of_one_memory(both: tuple[Memory, Memory]) -> None:
    one, many = both
    for where in (None, "even = true", "number = 1000"):
        listed = [[(d.id, d.tokens, dict(d.metadata)) for d in memory.documents(where)] for memory in both]
        assert listed[0] == listed[1]
    assert (one.info().documents, one.info().tokens) == (many.info().documents, many.info().tokens)
    assert (one.stats().documents, one.stats().bytes) == (many.stats().documents, many.stats().bytes)
    assert torch.equal(one.fetch("doc-7", LAYER, 2, 5).keys, many.fetch("doc-7", LAYER, 2, 5).keys)
    done = many.wait(many.start("verify"), 30.0)
    assert done.state == "done"
    assert many.operation(done.id).id == done.id


def test_a_listing_comes_in_pages_that_fit_together(both: tuple[Memory, Memory]) -> None:
    _, many = both
    seen: list[str] = []
    token = ""
    while True:
        page = many.connection.run(ListDocuments("m", None, 4, token))
        assert len(page.items) <= 4
        seen += [one.id for one in page.items]
        token = page.next
        if not token:
            break
    assert seen == sorted([*IDS, *TWINS])
    with pytest.raises(InvalidArgument):
        many.connection.run(ListDocuments("m", None, 4, "no token of ours"))


def test_documents_are_replaced_and_deleted_where_they_are(addresses: list[str]) -> None:
    with Client.open(target(addresses)) as client:
        memory = client.memory("changing", SPEC)
        first = memory.put("d", *drawn(1, 4), request_id="once")
        assert memory.put("d", *drawn(1, 4), request_id="once") == first
        second = memory.put("d", *drawn(2, 6), replace=True)
        assert second.generation > first.generation
        assert memory.info().tokens == 6
        memory.delete("d", request_id="gone")
        memory.delete("d", request_id="gone")
        memory.put("d", *drawn(3, 2))
        assert memory.get("d").tokens == 2
        assert "changing" in [one.name for one in client.memories()]
        client.delete("changing")
        with pytest.raises(NotFound):
            client.memory("changing")


def test_a_memory_made_anew_with_other_layers_is_asked_for_its_own(addresses: list[str]) -> None:
    other = replace(SPEC, layers=(5,))
    with Client.open(target(addresses)) as stays, Client.open(target(addresses)) as changes:
        stays.memory("anew", SPEC).attend(LAYER, queries())
        changes.delete("anew")
        changes.memory("anew", other)
        (found,) = stays.connection.run(Attend("anew", 5, (AttendGroup(scope_of(), queries()),)))
        assert found.coverage.in_scope == 0
        changes.delete("anew")


def test_calls_to_a_cluster_cross_a_network(both: tuple[Memory, Memory]) -> None:
    assert [memory.connection.remote for memory in both] == [False, True]


def test_large_documents_are_uploaded_to_their_owner(addresses: list[str]) -> None:
    with Memory.open(target(addresses), "large", SPEC) as memory:
        keys, values = drawn(4, 12_000)
        memory.put("big", keys, values, token_ids=range(12_000))
        found = memory.fetch("big", LAYER, 11_990, 10)
        assert torch.equal(found.keys, keys[1, :, 11_990:])
        assert found.token_ids.tolist() == list(range(11_990, 12_000))


def test_the_async_client_is_routed_alike(addresses: list[str]) -> None:
    async def ask() -> tuple[Attended, list[str]]:
        async with AsyncMemory.open(target(addresses), "worn", SPEC) as memory:
            for number in range(6):
                await memory.put(f"d{number}", *drawn(number, 5))
            async with await memory.session() as session:
                await session.append(LAYER, drawn(9, 3)[0][1], drawn(9, 3)[1][1])
                found = await session.attend(LAYER, queries(), top_k=7, documents=ALL_DOCUMENTS, tokens=True)
            return found, [one.id async for one in memory.documents()]

    found, listed = asyncio.run(ask())
    with Memory.open(":memory:", "worn", SPEC) as one:
        for number in range(6):
            one.put(f"d{number}", *drawn(number, 5))
        with one.session() as session:
            session.append(LAYER, drawn(9, 3)[0][1], drawn(9, 3)[1][1])
            alike(session.attend(LAYER, queries(), top_k=7, documents=ALL_DOCUMENTS, tokens=True), found)
    assert listed == [f"d{number}" for number in range(6)]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("grpc://a:1,,b:2", "missing"),
        ("grpc://a:1,a:1", "twice"),
        ("grpc://a:1,b:2,c:3?replicas=2", "shards of 2"),
        ("grpc://a:1,b:2?replicas=0", "replicas must be"),
        ("grpc://a:1,b:2?replicas=2&write_quorum=3", "write_quorum"),
        ("grpc://a:1,b:2?colour=red", "no option"),
        ("grpc://a:1,b:2?on_missing=maybe", "fail or degrade"),
        ("redis://nobody", "cannot open"),
    ],
)
def test_a_wrong_target_is_told_at_once(wrong: str, told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        Memory.open(wrong, "m", SPEC)


def test_a_cluster_that_nobody_serves_says_so() -> None:
    with pytest.raises(Unavailable):
        Memory.open("grpc://127.0.0.1:1,127.0.0.1:2", "m", SPEC, timeout_s=3.0)


# --- Owners ----------------------------------------------------------------------------------------------------------


def layout(count: int) -> ShardMap:
    return ShardMap(1, tuple(Shard(f"s{number}", (f"h:{number}",)) for number in range(count)))


def test_owners_are_spread_evenly_and_few_move() -> None:
    documents = [f"document {number}" for number in range(4000)]
    before = {one: layout(4).owner("m", one).id for one in documents}
    after = {one: layout(5).owner("m", one).id for one in documents}
    counts = [list(before.values()).count(f"s{number}") for number in range(4)]
    assert all(850 < count < 1150 for count in counts)
    moved = [one for one in documents if before[one] != after[one]]
    assert 650 < len(moved) < 950
    assert {after[one] for one in moved} == {"s4"}
    # What owns a document is part of the format: another answer would lose every document of a cluster.
    assert [layout(4).owner("m", one).id for one in ("a", "b", "c", "d")] == ["s0", "s2", "s2", "s0"]
