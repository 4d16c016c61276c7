"""Calls cut into messages and joined again are the calls they were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_service.errors import InvalidArgument
from memory_service.pieces import (
    Piece,
    cut_appends,
    cut_attend,
    join_appends,
    join_attended,
    join_top_tokens,
    plan,
)
from memory_service.places.payload import check_token_ids, missing_chunks, payload_bytes
from memory_service.types.answers import Attended, Attribution, Coverage, Measured, TopTokens
from memory_service.types.documents import Document
from memory_service.types.questions import AttendGroup, AttendOptions
from memory_service.types.scopes import Scope
from memory_service.types.sessions import SessionAppend, SessionInfo
from memory_service.types.uploads import Upload
from memory_service.verbs import AppendSessions, Attend, Search

HEADS, DIM, TOP_K = 2, 4, 3


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), min_size=1, max_size=6),
    st.integers(1, 64),
)
def test_a_plan_covers_every_unit_once_in_order_within_the_limit(items: list[tuple[int, int]], limit: int) -> None:
    lengths, units = zip(*items, strict=True)
    messages = plan(lengths, units, limit)
    covered = [(piece.item, unit) for pieces in messages for piece in pieces for unit in range(piece.first, piece.stop)]
    assert covered == [(item, unit) for item, length in enumerate(lengths) for unit in range(length)]
    assert {piece.item for pieces in messages for piece in pieces} == set(range(len(items)))
    for pieces in messages:
        used = sum(units[piece.item] * (piece.stop - piece.first) for piece in pieces)
        assert pieces
        assert used <= limit or sum(piece.stop - piece.first for piece in pieces) == 1


def answered(group: AttendGroup, options: AttendOptions) -> Attended:
    """An answer whose rows depend on their query alone, as attention's do."""
    marks = group.queries.sum(-1)  # [G, Q]
    names = sorted({f"doc-{int(mark) % 3}" for mark in marks.flatten()}, reverse=True)
    source = torch.tensor([[names.index(f"doc-{int(mark) % 3}") for mark in row] for row in marks], dtype=torch.int32)
    places = source[..., None].repeat(1, 1, TOP_K)
    places[..., -1] = -1
    rows = marks[..., None].expand(*marks.shape, TOP_K)
    top = TopTokens(tuple(names), places, rows.long(), rows.float(), rows.float() + 1)
    share = {name: float((source == index).float().mean()) for index, name in enumerate(names)}
    masses = tuple(Attribution(name, mass) for name, mass in sorted(share.items(), key=lambda pair: -pair[1]))
    mean = float(marks.mean())
    return Attended(
        group.queries * 2,
        marks,
        Coverage(5, 7),
        "exact",
        top if options.tokens else None,
        masses if options.attribution else None,
        Measured(mean, mean / 2) if options.measure else None,
    )


def readable(top: TopTokens | None) -> list[object]:
    """Top tokens with names for numbers, for the numbering is free."""
    assert top is not None
    names = [*top.sources, "padding"]
    return [
        [names[int(place)] for place in top.source.flatten()],
        *(t.tolist() for t in (top.offset, top.score, top.weight)),
    ]


@pytest.mark.parametrize("limit", [1, 100, 500, 10_000])
def test_an_attend_in_pieces_is_the_attend(limit: int) -> None:
    sizes = (5, 1, 7)
    groups = tuple(
        AttendGroup(Scope(documents=(str(size),)), torch.arange(HEADS * size * DIM).reshape(HEADS, size, DIM).float())
        for size in sizes
    )
    options = AttendOptions(top_k=TOP_K, tokens=True, attribution=True, measure=True)
    verb = Attend("m", 0, groups, options)
    messages, verbs = cut_attend(verb, limit)
    assert (len(verbs) == 1) == (limit == 10_000)
    joined = join_attended(messages, [tuple(answered(group, options) for group in one.groups) for one in verbs])
    assert len(joined) == len(groups)
    for got, expected in zip(joined, (answered(group, options) for group in groups), strict=True):
        assert torch.equal(got.output, expected.output)
        assert torch.equal(got.lse, expected.lse)
        assert (got.coverage, got.engine) == (expected.coverage, expected.engine)
        assert readable(got.tokens) == readable(expected.tokens)
        assert got.measured is not None
        assert expected.measured is not None
        assert got.measured.recall == pytest.approx(expected.measured.recall)
        assert got.measured.captured_mass == pytest.approx(expected.measured.captured_mass)
        assert {a.source: a.mass for a in got.attribution or ()} == pytest.approx(
            {a.source: a.mass for a in expected.attribution or ()}
        )


def test_a_search_in_pieces_is_the_search() -> None:
    queries = torch.arange(HEADS * 6 * DIM).reshape(HEADS, 6, DIM).float()
    options = AttendOptions(top_k=TOP_K, tokens=True)
    messages, verbs = cut_attend(Search("m", 0, (AttendGroup(Scope(), queries),), options), 300)
    assert len(verbs) > 1
    found = [tuple(answered(group, options).tokens for group in one.groups) for one in verbs]
    (joined,) = join_top_tokens(messages, found)  # type: ignore[arg-type]
    assert readable(joined) == readable(answered(AttendGroup(Scope(), queries), options).tokens)


def test_answers_count_when_a_message_is_cut() -> None:
    queries = torch.zeros(1, 100, DIM)
    asked = Attend("m", 0, (AttendGroup(Scope(), queries),), AttendOptions(top_k=4096, tokens=True))
    assert len(cut_attend(asked, 1 << 20)[1]) > 4


def test_malformed_tensors_are_left_to_the_service() -> None:
    group = AttendGroup(Scope(), torch.zeros(3))
    assert cut_attend(Attend("m", 0, (group,)))[1][0].groups == (group,)
    append = SessionAppend("s", (0,), 0, torch.zeros(3), torch.zeros(3))
    assert cut_appends(AppendSessions("m", (append,)))[1][0].appends == (append,)


def test_an_append_is_cut_by_tokens_and_answered_by_its_last_piece() -> None:
    keys = torch.arange(2 * 10 * DIM).reshape(1, 2, 10, DIM).float()
    first = SessionAppend("a", (0,), 100, keys, keys + 1, torch.arange(10))
    second = replace(first, session="b", first_token=0, keys=keys[:, :, :3], values=keys[:, :, :3], token_ids=None)
    messages, verbs = cut_appends(AppendSessions("m", (first, second)), 400)
    pieces = [append for verb in verbs for append in verb.appends]
    of_first = [append for append in pieces if append.session == "a"]
    assert torch.equal(torch.cat([append.keys for append in of_first], 2), keys)
    assert [append.first_token for append in of_first] == [100, 105]
    assert torch.cat([append.token_ids for append in of_first if append.token_ids is not None]).tolist() == list(
        range(10)
    )
    length = {"a": 100, "b": 0}
    answers = []
    for verb in verbs:
        infos = []
        for append in verb.appends:
            length[append.session] += append.keys.shape[2]
            infos.append(SessionInfo(append.session, "m", 1.0, 2.0, (length[append.session],)))
        answers.append(tuple(infos))
    assert [(info.id, info.tokens) for info in join_appends(messages, answers)] == [("a", (110,)), ("b", (3,))]


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 40), st.booleans())
def test_the_chunks_of_a_document_are_its_parts_bytes(
    tokens: int, part_tokens: int, chunk_bytes: int, ids: bool
) -> None:
    keys, values = torch.randn(2, 2, 2, tokens, DIM, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    token_ids = torch.arange(tokens) + 2**32 - 10 if ids else None
    document = Document("d", keys, values, token_ids)
    expected = []
    for first in range(0, tokens, part_tokens):
        run = slice(first, first + part_tokens)
        stored = torch.zeros(tokens, dtype=torch.int64) if token_ids is None else token_ids
        expected.append(
            b"".join(tensor[:, :, run].contiguous().view(torch.int16).numpy().tobytes() for tensor in (keys, values))
            + b"".join(int(one).to_bytes(4, "little") for one in stored[run])
        )
    missing = tuple((part, 0, -(-len(payload) // chunk_bytes)) for part, payload in enumerate(expected))
    upload = Upload("u", part_tokens, len(expected), chunk_bytes, missing, 0.0)
    got = [b""] * len(expected)
    for chunk in missing_chunks(document, upload):
        assert chunk.offset == len(got[chunk.part])
        got[chunk.part] += chunk.data
    assert got == expected
    assert sum(map(len, got)) == payload_bytes(document)


def test_only_missing_chunks_are_sent() -> None:
    document = Document("d", torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4))
    upload = Upload("u", 4, 2, 16, ((0, 2, 1), (1, 0, 2), (1, 4, 1)), 0.0)
    assert [(c.part, c.offset) for c in missing_chunks(document, upload)] == [(0, 32), (1, 0), (1, 16), (1, 64)]


def test_a_piece_names_its_item_and_units() -> None:
    assert plan([3], [10], 20) == [[Piece(0, 0, 2)], [Piece(0, 2, 3)]]


@pytest.mark.parametrize("ids", [[-1], [2**32]])
def test_token_ids_fit_32_bits(ids: list[int]) -> None:
    with pytest.raises(InvalidArgument, match="token_ids"):
        check_token_ids(torch.tensor(ids))
