"""The tally says where attention went as plain softmax over window and memory together would."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from memory_service import Attended, Coverage, DType, Fingerprint, Measured, Memory, MemorySpec, Partial, merge
from memory_service.errors import InvalidArgument
from model_worker.recall import tally as module
from model_worker.recall.passages import Passage, passage_at, passage_count
from model_worker.recall.tally import UNTOLD, WINDOW, Tally, is_session
from model_worker.settings import Read

LAYER, HEADS, KV_HEADS, DIM, PASSAGE = 2, 4, 2, 8, 4
LENGTHS = {"a": 9, "b": 4, "c": 13}
SPEC = MemorySpec(Fingerprint("tiny"), (LAYER,), KV_HEADS, DIM, DType.F32)


class Place:
    """A memory of three documents, and the same keys at hand for the plain definition."""

    def __init__(self, memory: Memory):
        self.memory = memory
        self.dice = torch.Generator().manual_seed(5)
        self.keys: dict[str, Tensor] = {}
        for name, length in LENGTHS.items():
            self.keys[name] = self.random(KV_HEADS, length, DIM)
            memory.put(name, self.keys[name][None], self.keys[name][None])
        self.window = self.random(KV_HEADS, 6, DIM)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.dice)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[H, n, S] of queries [H, n, D] and keys [K, S, D]."""
        return queries @ keys.repeat_interleave(HEADS // KV_HEADS, 0).mT * DIM**-0.5

    def read(self, queries: Tensor, first_token: int = 0, layer: int = LAYER, row: int = 0, **options: object) -> Read:
        """What a model would tell of these queries [H, n, D], which also see the window."""
        attended = self.memory.attend(LAYER, queries, **options)  # type: ignore[arg-type]
        near = self.scores(queries, self.window).logsumexp(-1)
        return Read(layer, row, first_token, attended, torch.sigmoid(attended.lse - near))

    def plain(self, queries: Tensor) -> dict[str, Tensor]:
        """Softmax over window and memory together: mass of every token, mean over heads, [n, S] by source."""
        parts = {WINDOW: self.window, **self.keys}
        together = torch.cat([self.scores(queries, keys) for keys in parts.values()], -1).softmax(-1).mean(0)
        split = together.split([keys.shape[1] for keys in parts.values()], -1)
        return dict(zip(parts, split, strict=True))


@pytest.fixture
def place() -> Iterator[Place]:
    with Memory.open(":memory:", spec=SPEC) as memory:
        yield Place(memory)


def share(mass: Tensor) -> object:
    """A mean over tokens [n, S], to be compared with."""
    return pytest.approx(mass.sum(-1).mean().item(), abs=1e-6)


def test_the_mass_of_documents_and_passages_is_that_of_one_softmax_over_window_and_memory(place: Place) -> None:
    queries = place.random(HEADS, 5, DIM)
    tally = Tally(PASSAGE)
    tally(place.read(queries, top_k=100, tokens=True))
    masses, plain = tally.masses(), place.plain(queries)
    assert masses.by_source() == {name: share(mass) for name, mass in plain.items()}
    assert masses.by_passage("c") == {number: share(mass) for number, mass in enumerate(plain["c"].split(PASSAGE, -1))}
    assert masses.by_passage("unknown") == {}


def test_dense_attribution_is_exact_for_one_query_and_head(place: Place) -> None:
    query, window = place.random(1, 1, DIM), place.window[:1]
    with Memory.open(":memory:", spec=replace(SPEC, kv_heads=1)) as memory:
        for name, keys in place.keys.items():
            memory.put(name, keys[None, :1], keys[None, :1])
        attended = memory.attend(LAYER, query, attribution=True)
    tally = Tally(PASSAGE)
    tally(Read(LAYER, 0, 0, attended, torch.sigmoid(attended.lse - (query @ window.mT * DIM**-0.5).logsumexp(-1))))
    every = torch.cat([window[0], *(keys[0] for keys in place.keys.values())])
    parts = (query[0] @ every.T * DIM**-0.5).softmax(-1).split([len(window[0]), *LENGTHS.values()], -1)
    assert tally.masses().by_source() == {n: share(mass) for n, mass in zip((WINDOW, *LENGTHS), parts, strict=True)}
    assert tally.masses().by_passage("a") == {}


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"top_k": 3, "tokens": True}, {"attribution": True}, {"top_k": 2, "attribution": True}, {"top_k": 3}, {}],
)
def test_the_masses_of_every_layer_and_query_sum_to_one(
    place: Place, options: dict[str, object], by_token: bool
) -> None:
    tally = Tally(PASSAGE, by_token=by_token)
    for layer in (2, 5):
        tally(place.read(place.random(HEADS, 7, DIM), layer=layer, **options))
        tally(place.read(place.random(HEADS, 1, DIM), layer=layer, first_token=7, **options))
    for layer in (2, 5):
        masses = tally.masses(layer)
        assert masses.queries == 8 and masses.mass.min() >= 0
        assert sum(masses.by_source().values()) == pytest.approx(1, abs=1e-6)
        told = np.bincount(masses.token, masses.mass)
        assert told == pytest.approx(np.ones(8) if by_token else [8], abs=1e-5)
    assert tally.masses().queries == 16 and tally.layers == (2, 5)
    assert (tally.masses().by_source().get(UNTOLD, 0) > 0.1) == (options in ({}, {"top_k": 3}))


def test_tokens_are_told_apart_where_asked(place: Place) -> None:
    queries = place.random(HEADS, 3, DIM)
    tally = Tally(PASSAGE, by_token=True)
    tally(place.read(queries, first_token=10, top_k=100, tokens=True))
    masses, plain = tally.masses(), place.plain(queries)
    for number, token in enumerate((10, 11, 12)):
        for source, name in enumerate(masses.names):
            here = (masses.token == token) & (masses.source == source)
            want = plain[name][number].sum().item() if name in plain else 0.0
            assert masses.mass[here].sum() == pytest.approx(want, abs=1e-6)


def test_queries_before_the_first_token_are_left_out(place: Place) -> None:
    queries = place.random(HEADS, 6, DIM)
    late, whole = Tally(PASSAGE, first_token=14), Tally(PASSAGE)
    late(place.read(queries, first_token=10, top_k=4, tokens=True))
    late(place.read(queries[:, :2], first_token=3, top_k=4, tokens=True))
    whole(place.read(queries[:, 4:], first_token=14, top_k=4, tokens=True))
    assert late.masses().queries == 2
    assert late.masses().by_source() == pytest.approx(whole.masses().by_source())
    assert late.masses().by_passage("c") == pytest.approx(whole.masses().by_passage("c"))


def test_rows_and_layers_can_be_looked_at_alone(place: Place) -> None:
    tally, parts = Tally(PASSAGE), {}
    for layer, row in ((2, 0), (2, 1), (5, 0)):
        read = place.read(place.random(HEADS, 2, DIM), layer=layer, row=row, top_k=4, tokens=True)
        parts[layer, row] = Tally(PASSAGE)
        for one in (tally, parts[layer, row]):
            one(read)
    for (layer, row), part in parts.items():
        assert tally.masses(layer, row).by_source() == pytest.approx(part.masses().by_source())
    assert tally.masses(row=0).queries == 4
    window = np.mean([part.masses().by_source()[WINDOW] for part in parts.values()])
    assert tally.masses().by_source()[WINDOW] == pytest.approx(window)


def test_a_scope_with_nothing_in_it_leaves_all_mass_to_the_window(place: Place) -> None:
    tally = Tally(PASSAGE)
    tally(place.read(place.random(HEADS, 2, DIM), scope=(), top_k=4, tokens=True))
    tally(place.read(place.random(HEADS, 2, DIM), scope=(), attribution=True))
    assert tally.masses().by_source() == {WINDOW: 1.0}
    assert tally.coverage == Coverage(0, 0)


def test_nothing_is_told_before_anybody_asked() -> None:
    tally = Tally()
    assert tally.masses().by_source() == {} and tally.masses().queries == 0
    assert (tally.layers, tally.engines, tally.coverage, tally.measured) == ((), (), None, None)


def test_tokens_told_for_the_first_queries_only_leave_the_others_untold(place: Place) -> None:
    queries = place.random(HEADS, 4, DIM)
    first = place.read(queries[:, :1], top_k=4, tokens=True)
    whole = place.read(queries, top_k=4, tokens=True)
    tally = Tally(PASSAGE)
    tally(replace(whole, attended=replace(whole.attended, tokens=first.attended.tokens)))
    shares = tally.masses().by_source()
    assert sum(shares.values()) == pytest.approx(1, abs=1e-6)
    assert shares[UNTOLD] == pytest.approx(whole.share[:, 1:].sum().item() / HEADS / 4, abs=1e-6)


def test_sessions_are_sources_of_their_own(place: Place) -> None:
    with place.memory.session() as session:
        session.append(LAYER, place.random(KV_HEADS, 5, DIM), place.random(KV_HEADS, 5, DIM))
        tally = Tally(PASSAGE)
        tally(place.read(place.random(HEADS, 3, DIM), scope=session, top_k=8, tokens=True))
    shares = tally.masses().by_source()
    (own,) = [name for name in shares if is_session(name)]
    assert shares == {WINDOW: pytest.approx(1 - shares[own]), own: shares[own]}
    assert list(tally.masses().by_passage(own)) == [0, 1]


def test_adding_up_early_or_late_gives_the_same(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = [place.read(place.random(HEADS, 2, DIM), first_token=n, top_k=5, tokens=True) for n in range(0, 40, 2)]
    late = Tally(PASSAGE, by_token=True)
    for read in reads:
        late(read)
    monkeypatch.setattr(module, "_PENDING", 1)
    early = Tally(PASSAGE, by_token=True)
    for read in reads:
        early(read)
        early.masses()
    for one, other in zip(early.masses()[1:], late.masses()[1:], strict=True):
        assert one == pytest.approx(other)


def test_a_tally_can_be_looked_at_while_another_thread_adds_to_it(place: Place) -> None:
    read = place.read(place.random(HEADS, 1, DIM), top_k=5, tokens=True)
    tally = Tally(PASSAGE)
    writer = threading.Thread(target=lambda: [tally(read) for _ in range(300)])
    writer.start()
    while writer.is_alive():
        masses = tally.masses()
        assert masses.mass.sum() == pytest.approx(masses.queries, abs=1e-3)
    assert tally.masses().queries == 300


def test_engines_coverage_and_measurements_are_kept() -> None:
    partial = merge([Partial(torch.zeros(1, 2, 4), torch.zeros(1, 2))])
    tally = Tally()
    for searched, engine, recall in ((10, "exact", 1.0), (8, "index:Flat", 0.5), (9, "exact", 0.75)):
        attended = Attended(*partial, Coverage(searched, 10), engine, measured=Measured(recall, recall))
        tally(Read(0, 0, 0, attended, torch.full((1, 2), 0.5)))
    assert tally.engines == ("exact", "index:Flat")
    assert tally.coverage == Coverage(8, 10)
    assert tally.measured == Measured(0.75, 0.75)


def test_passages_are_runs_of_tokens_and_the_last_may_be_short() -> None:
    assert [passage_at(number, 9, 4) for number in range(passage_count(9, 4))] == [(0, 4), (4, 4), (8, 1)]
    assert passage_at(5, 9, 4) == (20, 0) and passage_count(0, 4) == 0
    assert Passage(8, 3).last_token == 10
    with pytest.raises(InvalidArgument, match="≥ 1 token"):
        Tally(0)
