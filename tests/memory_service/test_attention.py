"""The exact engine equals plain float32 attention, whatever the sizes, the storage and the arithmetic of the scan."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memory_service import verbs
from memory_service.attention import exact, scan
from memory_service.attention.exact import Dense, TopK, group_heads, merge
from memory_service.attention.scan import Arena, Chunk
from memory_service.attention.slabs import largest_norms
from memory_service.store.store import Store
from memory_service.types.answers import Partial
from memory_service.types.callers import Cancel
from memory_service.types.questions import AttendGroup, AttendOptions, Engine
from memory_service.types.scopes import Scope
from memory_service.types.specs import DType
from tests.memory_service.oracle import (
    F32_BAR,
    ME,
    append,
    attend,
    bar,
    document,
    error,
    put,
    reference,
    scores_of,
    spec_of,
)

DIM = 16
EDGES = (1, 15, 16, 17, 255, 256, 257, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 12_345)
ARITHMETIC = [
    pytest.param((DType.F32, False), id="f32"),
    pytest.param((DType.F16, False), id="f16"),
    pytest.param((DType.BF16, False), id="bf16-scanned-in-f32"),
    pytest.param((DType.BF16, True), id="bf16-scanned-in-bf16"),
]


@pytest.fixture(params=ARITHMETIC)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DType:
    """A storage dtype, with the arithmetic of the scan forced."""
    stored: DType
    stored, fast = request.param
    force(monkeypatch, fast)
    return stored


def force(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """Make every chunk go through the scan, in this arithmetic."""
    monkeypatch.setattr(scan, "scans_in_bf16", lambda *_: fast)
    monkeypatch.setattr(exact, "_FEW_KEYS", 0)


def random(shape: tuple[int, ...], seed: int, dtype: DType = DType.F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype.torch)


def cut(keys: Tensor, values: Tensor, pieces: int) -> Iterator[Chunk]:
    """Keys and values [H, N, D] as chunks with foreign rows between the runs: what a scope looks like."""
    h, n, dim = keys.shape
    bounds = [n * one // pieces for one in range(pieces + 1)]
    for number, (start, stop) in enumerate(pairwise(bounds)):
        middle = (start + stop) // 2
        # A key that outshines all others lies before, between and behind the runs: nothing may look at it.
        loud = torch.full((h, 1, dim), 1e4, dtype=keys.dtype)
        wide = torch.cat([loud, keys[:, start:middle], loud, keys[:, middle:stop], loud], dim=1)
        filler = torch.full((h, 1, dim), torch.nan, dtype=values.dtype)
        rows = torch.cat([filler, values[:, start:middle], filler, values[:, middle:stop], filler], dim=1)
        both = ((1, 1 + middle - start), (2 + middle - start, 2 + stop - start))
        runs = tuple((a, b) for a, b in both if a < b)
        yield Chunk(wide, rows, runs, largest_norms(keys[:, start:stop]), number << 40)


def engines(queries: Tensor, keys: Tensor, values: Tensor, top_k: int, pieces: int = 1) -> Partial:
    """Attention of [G, Q, D] by the engine under test, scale included."""
    rows = group_heads(queries * keys.shape[2] ** -0.5, keys.shape[0])
    engine: TopK | Dense = TopK(rows, top_k) if top_k else Dense(rows)
    for chunk in cut(keys, values, pieces):
        engine.add(chunk)
    found = engine.partial()
    shape = queries.shape
    return Partial(found.output.reshape(shape), found.lse.reshape(shape[:2]))


@settings(max_examples=80)
@given(data=st.data())
def test_the_best_of_any_chunks_in_any_order_are_the_best_of_all(data: st.DataObject) -> None:
    """Scores are small whole numbers: ties, and sums that are exact whatever their order."""
    heads, rows, top_k = (data.draw(st.integers(1, most)) for most in (2, 3, 6))
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    queries = torch.randint(-2, 3, (heads, rows, 4), generator=generator).float()
    engine, seen = TopK(queries, top_k), []
    for number, size in enumerate(sizes):
        keys, values = torch.randint(-2, 3, (2, heads, max(size, 1), 4), generator=generator).float().unbind()
        chunk = Chunk(keys, values, ((0, size),) if size else (), largest_norms(keys), number << 40)
        # Candidates may leave keys out, in another number for every row: what is missing is padding, -1.
        named = data.draw(st.booleans())
        found = torch.arange(max(size, 1)).expand(heads, rows, -1).clone()
        if named:
            found[torch.rand(found.shape, generator=generator) < 0.4] = -1
            places = found + (number << 40)
            engine.add_candidates([chunk], places.masked_fill_((found < 0) | (size == 0), -1))
        else:
            engine.add(chunk)
        visible = (found >= 0) & (torch.arange(max(size, 1)) < size)
        scores = (queries @ keys.mT).masked_fill(~visible, -torch.inf)
        seen += [(scores[..., row], row + (number << 40), values[:, row]) for row in range(size)]
    pool = torch.stack([scores for scores, *_ in seen], dim=2) if seen else torch.zeros(heads, rows, 0)
    want = torch.cat([pool, torch.full((heads, rows, top_k), -torch.inf)], dim=2).topk(top_k, dim=2).values
    assert torch.equal(engine.scores.sort(dim=2, descending=True).values, want)
    assert torch.equal(engine.rows < 0, engine.scores == -torch.inf)
    at = {row: (scores, values) for scores, row, values in seen}
    for head, query in itertools.product(range(heads), range(rows)):
        kept = [row for row in engine.rows[head, query].tolist() if row >= 0]
        assert len(kept) == len(set(kept))
        for slot, row in enumerate(engine.rows[head, query].tolist()):
            if row >= 0:
                assert engine.scores[head, query, slot] == at[row][0][head, query]
                assert torch.equal(engine.values[head, query, slot], at[row][1][head])


@pytest.mark.parametrize("top_k", [0, 3])
def test_a_query_that_is_no_number_gets_no_answer_rather_than_a_wrong_one(top_k: int) -> None:
    keys, values = random((2, 40, DIM), 0), random((2, 40, DIM), 1)
    queries = random((2, 2, DIM), 2)
    queries[1, 0, 0] = torch.nan
    found = engines(queries, keys, values, top_k, pieces=3)
    assert found.output.isnan().all(2).tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("stored", [DType.F32, DType.BF16])
@pytest.mark.parametrize("queries", [1, 3, 7, 8, 9])
@pytest.mark.parametrize(("elements", "scores"), [(1 << 19, 1 << 20), (512 * DIM, 1), (300 * DIM, 2000)])
def test_dense_equals_torch_for_few_queries_however_its_work_is_cut(
    stored: DType, queries: int, elements: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "_FEW_ELEMENTS", elements)
    monkeypatch.setattr(exact, "_FEW_SCORES", scores)
    keys, values = random((3, 1300, DIM), 0, stored), random((3, 1300, DIM), 1, stored)
    asked = 3 * random((3, queries, DIM), 2)
    want = exact.attend(asked * DIM**-0.5, keys, values)
    for pieces in (1, 4):
        assert error(engines(asked, keys, values, 0, pieces), want) < F32_BAR


# --- Sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", EDGES)
def test_it_equals_torch_at_every_ragged_size(dtype: DType, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_FEW_KEYS", 0)  # Scan even what is small.
    keys, values = (random((2, count, DIM), seed + count, dtype) for seed in (1, 2))
    queries = 3 * random((4, 5, DIM), count)
    for top_k in (0, 1, 7, 100):
        for pieces in (1, 3):
            wrong = error(engines(queries, keys, values, top_k, pieces), reference(queries, keys, values, top_k=top_k))
            assert wrong <= bar(dtype), (top_k, pieces, wrong)


@pytest.mark.parametrize("queries_per_head", [1, 2, 15, 16, 17, 64])
@pytest.mark.parametrize("group", [1, 3])
def test_it_equals_torch_for_any_number_of_queries_and_heads(dtype: DType, queries_per_head: int, group: int) -> None:
    keys, values = (random((3, 5000, DIM), seed, dtype) for seed in (1, 2))
    queries = 3 * random((3 * group, queries_per_head, DIM), 3)
    for top_k in (0, 32):
        wrong = error(engines(queries, keys, values, top_k), reference(queries, keys, values, top_k=top_k))
        assert wrong <= bar(dtype), (top_k, wrong)


@pytest.mark.parametrize("dim", [3, 8, 64, 100, 256])
def test_it_equals_torch_for_any_head_dim(dtype: DType, dim: int) -> None:
    keys, values = (random((2, 3000, dim), seed, dtype) for seed in (1, 2))
    queries = 3 * random((2, 20, dim), 3)
    for top_k in (0, 32):
        wrong = error(engines(queries, keys, values, top_k, 2), reference(queries, keys, values, top_k=top_k))
        assert wrong <= bar(dtype), (top_k, wrong)


@pytest.mark.parametrize("top_k", [1000, 4096])
def test_a_huge_top_k_is_exact_also_beyond_the_number_of_keys(dtype: DType, top_k: int) -> None:
    queries = 3 * random((2, 3, DIM), 3)
    for count in (10, top_k - 1, top_k, top_k + 1, 3 * top_k):
        keys, values = (random((1, count, DIM), seed, dtype) for seed in (1, 2))
        wrong = error(engines(queries, keys, values, top_k, 2), reference(queries, keys, values, top_k=top_k))
        assert wrong <= bar(dtype), (count, wrong)


def test_little_scratch_changes_nothing(dtype: DType) -> None:
    keys, values = (random((2, 5000, DIM), seed, dtype) for seed in (1, 2))
    queries = random((2, 20, DIM), 3)
    answers = []
    for scratch in (1, 20_000, 64 << 20):
        engine = TopK(queries, 32)
        for chunk in cut(keys, values, 2):
            engine.add(chunk, scratch_bytes=scratch)
        answers.append(engine.partial())
    expected = reference(queries, keys, values, top_k=32, scale=1.0)
    assert max(error(answer, expected) for answer in answers) <= bar(dtype)


def test_many_threads_with_an_arena_each_do_not_disturb_each_other() -> None:
    keys, values = (random((2, 5000, DIM), seed) for seed in (1, 2))
    arena = Arena()
    for seed in range(3):
        queries = random((2, 9 + seed, DIM), seed)
        engine = TopK(queries, 8, arena)
        for chunk in cut(keys, values, 1):
            engine.add(chunk)
        assert error(engine.partial(), reference(queries, keys, values, top_k=8, scale=1.0)) <= F32_BAR


# --- Large logits, and why the scan may be trusted --------------------------------------------------------------------


def loud(dtype: DType, count: int, rows: int, logit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose largest |q·k·scale| is `logit`."""
    keys, values = (random((2, count, DIM), seed, dtype) for seed in (11, 12))
    queries = random((2, rows, DIM), 13)
    return queries * (logit / scores_of(queries, keys).abs().max()), keys, values


@pytest.mark.parametrize("logit", [1.0, 10.0, 50.0])
@pytest.mark.parametrize("rows", [4, 64])
def test_large_logits_stay_within_the_bar(dtype: DType, logit: float, rows: int) -> None:
    queries, keys, values = loud(dtype, 6000, rows, logit)
    for top_k in (0, 1, 32):
        wrong = error(engines(queries, keys, values, top_k), reference(queries, keys, values, top_k=top_k))
        assert wrong <= bar(dtype), (top_k, wrong)


@pytest.mark.parametrize("logit", [1.0, 50.0])
def test_the_top_k_set_is_the_float32_one(dtype: DType, logit: float) -> None:
    queries, keys, values = loud(dtype, 6000, 48, logit)
    scores = scores_of(queries, keys, precision=torch.float64)
    best = scores.topk(33, dim=2)
    clear = best.values[..., 31] - best.values[..., 32] > 1e-5 * logit  # No float32 sum could mistake the two.
    assert clear.float().mean() > 0.9
    engine = TopK(queries * DIM**-0.5, 32)
    for chunk in cut(keys, values, 1):
        engine.add(chunk)
    # `cut` puts one foreign row before each half.
    rows = engine.rows - 1 - (engine.rows > 3000).long()
    assert torch.equal(rows.sort(2).values[clear], best.indices[..., :32].sort(2).values[clear])


def near_ties() -> tuple[Tensor, Tensor, Tensor]:
    """Scores of about 3 that differ by less than bfloat16 can tell there."""
    keys = 0.1 * random((1, 8192, DIM), 21)
    keys[..., 0] = 6.0
    queries = 0.05 * random((1, 64, DIM), 22)
    queries[..., 0] = 2.0
    return queries, keys.bfloat16(), random((1, 8192, DIM), 23).bfloat16()


def hidden_by_the_query() -> tuple[Tensor, Tensor, Tensor]:
    """Long keys nearly orthogonal to the queries, whose rounding moves small scores by more than they differ."""
    base = random((DIM,), 31)
    keys = random((1, 8192, DIM), 32)
    keys = 16 * (keys - (keys @ base)[..., None] * base / (base @ base))
    queries = base + 1e-3 * random((1, 64, DIM), 33)
    return queries, keys.bfloat16(), random((1, 8192, DIM), 34).bfloat16()


@pytest.mark.parametrize("case", [near_ties, hidden_by_the_query])
@pytest.mark.parametrize("top_k", [1, 8])
def test_the_bfloat16_scan_is_complete_where_bfloat16_cannot_tell_keys_apart(
    monkeypatch: pytest.MonkeyPatch, case: Any, top_k: int
) -> None:
    force(monkeypatch, True)
    queries, keys, values = case()
    expected = reference(queries, keys, values, top_k=top_k)
    # In pieces: then what one piece rounded must stand against what another scored exactly. Only the lse is compared:
    # some keys tie for float32, too, and have different values.
    assert (engines(queries, keys, values, top_k, 3).lse - expected.lse).abs().max() <= F32_BAR


def without_any_bound(maxima: Tensor, _: Tensor, __: int) -> Tensor:
    return maxima.float()


def without_the_scores_rounding(maxima: Tensor, error: Tensor, sign: int) -> Tensor:
    return maxima.float() + sign * error


def without_the_queries_rounding(maxima: Tensor, _: Tensor, sign: int) -> Tensor:
    return WIDENED(maxima, torch.zeros(()), sign)


WIDENED = scan.widened


@pytest.mark.parametrize(
    ("case", "mutant"),
    [
        (near_ties, without_any_bound),
        (hidden_by_the_query, without_any_bound),
        (near_ties, without_the_scores_rounding),
        (hidden_by_the_query, without_the_queries_rounding),
    ],
)
def test_without_its_error_bound_the_bfloat16_scan_would_miss_keys(
    monkeypatch: pytest.MonkeyPatch, case: Any, mutant: Any
) -> None:
    force(monkeypatch, True)
    monkeypatch.setattr(scan, "widened", mutant)
    queries, keys, values = case()
    found = engines(queries, keys, values, 1, 3)
    missed = found.lse < reference(queries, keys, values, top_k=1).lse - 1e-5
    assert missed.any(), "the bound would not be needed: these keys prove nothing"


@pytest.mark.parametrize("dim", [4, 64, 1024])
@pytest.mark.parametrize("rows", [3, 40])
def test_the_bounds_enclose_the_best_score_of_every_group(dtype: DType, dim: int, rows: int) -> None:
    keys = 5 * random((1, 1000, dim), 41, dtype)
    queries = random((1, rows, dim), 42)
    chunk = next(cut(keys, keys, 1))
    maxima, wide = scan.group_maxima(chunk, slice(0, 1), queries, Arena(), Cancel())
    scores = scores_of(queries, keys, 1.0, torch.float64)[0].T  # [N, R]
    padded = torch.cat([scores, torch.full((24, rows), -torch.inf)])
    exact = padded.view(64, scan.GROUP, rows).amax(1)
    high, low = (scan.widened(maxima, wide[:, None], sign)[0] for sign in (1, -1))
    real = exact > -torch.inf
    assert (high.double() >= exact)[real].all()
    assert (low.double() <= exact)[real].all()
    assert (maxima[0][~real] == -torch.inf).all()


# --- Equal keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [40, 5000])
def test_among_identical_keys_any_k_count_and_each_once(dtype: DType, count: int) -> None:
    keys = random((1, 1, DIM), 1, dtype).expand(1, count, DIM).contiguous()
    values = random((1, count, DIM), 2, dtype)
    queries = random((1, 6, DIM), 3)
    engine = TopK(queries, 32)
    for chunk in cut(keys, values, 2):
        engine.add(chunk)
    found = engine.partial()
    assert (engine.rows.sort(2).values.diff(dim=2) > 0).all()
    assert (engine.rows >= 0).all()
    assert torch.allclose(found.output, engine.values.mean(2), atol=1e-5)
    assert torch.allclose(found.lse, scores_of(queries, keys, 1.0)[..., 0] + torch.tensor(32.0).log(), atol=1e-5)


def test_copies_of_the_best_key_are_all_kept(dtype: DType) -> None:
    keys, values = (random((1, 6000, DIM), seed, dtype) for seed in (1, 2))
    queries = random((1, 1, DIM), 3)
    best = (4 * queries[0, 0]).to(dtype.torch)
    places = torch.tensor([0, 15, 16, 255, 256, 2999, 3000, 5999])
    keys[0, places] = best
    engine = TopK(queries, 8)
    for chunk in cut(keys, values, 1):
        engine.add(chunk)
    rows = engine.rows - 1 - (engine.rows > 3000).long()
    assert torch.equal(rows.flatten().sort().values, places)


def test_a_tie_at_the_boundary_leaves_the_sum_the_same(dtype: DType) -> None:
    keys = torch.zeros(1, 3000, DIM).to(dtype.torch)
    keys[0, ::3, 0] = 1.0  # 1000 keys tie for the best 10.
    values = torch.ones(1, 3000, DIM).to(dtype.torch)
    queries = torch.ones(1, 20, DIM)
    found = engines(queries, keys, values, 10)
    assert torch.allclose(found.lse, torch.tensor(DIM**-0.5) + torch.tensor(10.0).log(), atol=1e-5)
    assert torch.allclose(found.output, torch.ones(()), atol=1e-5)


def test_keys_of_zero_length_weigh_the_same(dtype: DType) -> None:
    keys, values = torch.zeros(1, 4000, DIM).to(dtype.torch), random((1, 4000, DIM), 2, dtype)
    queries = random((1, 20, DIM), 3)
    assert error(engines(queries, keys, values, 0), reference(queries, keys, values)) <= bar(dtype)


# --- Merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [DType.F32, DType.BF16])
def test_candidates_out_of_many_chunks_are_weighed_like_those_of_one(storage: DType) -> None:
    queries, keys, values = random((2, 5, DIM), 1), random((2, 300, DIM), 2, storage), random((2, 300, DIM), 3, storage)
    candidates = torch.stack(
        [torch.randperm(300, generator=torch.Generator().manual_seed(row))[:60] for row in range(10)]
    )
    candidates = candidates.view(2, 5, 60)
    candidates[:, :, ::7] = -1
    ends = [(0, 100), (100, 101), (101, 300)]
    parts = [
        Chunk(keys[:, a:b], values[:, a:b], ((0, b - a),), largest_norms(keys[:, a:b]), number << 40)
        for number, (a, b) in enumerate(ends)
    ]
    places = candidates.clone()
    for number, (a, b) in enumerate(ends):
        places[(candidates >= a) & (candidates < b)] += (number << 40) - a
    one, many = TopK(queries, 8), TopK(queries, 8)
    one.add_candidates([Chunk(keys, values, ((0, 300),), largest_norms(keys))], candidates)
    many.add_candidates(parts, places)
    assert torch.equal(one.partial().output, many.partial().output)
    visible = torch.zeros(2, 5, 301, dtype=torch.bool).scatter(2, candidates.where(candidates >= 0, 300), True)[
        ..., :300
    ]
    scores = (queries @ keys.float().mT).masked_fill(~visible, -torch.inf)
    assert torch.allclose(one.scores.sort(2).values, scores.topk(8).values.sort(2).values, atol=1e-5)


def test_merged_parts_equal_the_whole() -> None:
    keys, values = (random((2, 900, DIM), seed) for seed in (1, 2))
    queries = random((2, 7, DIM), 3)
    parts = [exact.attend(queries, keys[:, a:b], values[:, a:b]) for a, b in ((0, 1), (1, 1), (1, 500), (500, 900))]
    assert error(merge(parts), exact.attend(queries, keys, values)) <= F32_BAR


def test_merging_nothing_visible_is_nothing_visible() -> None:
    nothing = Partial(torch.zeros(1, 2, DIM), torch.full((1, 2), -torch.inf))
    merged = merge([nothing, nothing])
    assert torch.equal(merged.output, nothing.output)
    assert torch.equal(merged.lse, nothing.lse)


# --- The same through the store ---------------------------------------------------------------------------------------


@pytest.fixture(params=[DType.F32, DType.F16, DType.BF16])
def store(request: pytest.FixtureRequest) -> Iterator[tuple[Store, DType]]:
    with Store.open(None) as store:
        store.run(ME, verbs.CreateMemory("m", spec_of(request.param)))
        for number, tokens in enumerate((700, 1, 2500)):
            put(store, "m", document(f"d{number}", tokens, spec_of(request.param), number))
        yield store, request.param


QUERIES = 3 * random((4, 5, DIM), 99)


def all_keys(dtype: DType, layer: int) -> tuple[Tensor, Tensor]:
    documents = [document(f"d{number}", tokens, spec_of(dtype), number) for number, tokens in enumerate((700, 1, 2500))]
    return torch.cat([d.keys[layer] for d in documents], 1), torch.cat([d.values[layer] for d in documents], 1)


@pytest.mark.parametrize("scope", [Scope(documents=()), Scope(documents=(), sessions=())])
@pytest.mark.parametrize("top_k", [0, 1, 4096])
def test_an_empty_scope_answers_zero_and_minus_infinity(store: tuple[Store, DType], scope: Scope, top_k: int) -> None:
    answer = attend(store[0], "m", 3, QUERIES, scope, top_k=top_k, attribution=True, measure=bool(top_k))
    assert torch.equal(answer.output, torch.zeros_like(QUERIES))
    assert torch.equal(answer.lse, torch.full((4, 5), -torch.inf))
    assert (answer.coverage.searched, answer.coverage.in_scope, answer.coverage.fraction) == (0, 0, 1.0)
    assert answer.attribution == ()


@pytest.mark.parametrize("top_k", [0, 8])
def test_an_empty_memory_answers_zero_and_minus_infinity(top_k: int) -> None:
    with Store.open(None) as store:
        store.run(ME, verbs.CreateMemory("m", spec_of()))
        answer = attend(store, "m", 3, QUERIES, top_k=top_k)
    assert torch.equal(answer.output, torch.zeros_like(QUERIES))
    assert torch.equal(answer.lse, torch.full((4, 5), -torch.inf))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("top_k", [0, 1, 32, 4096])
def test_the_store_equals_torch_on_every_layer(store: tuple[Store, DType], layer: int, top_k: int) -> None:
    keys, values = all_keys(store[1], layer)
    answer = attend(store[0], "m", spec_of().layers[layer], QUERIES, top_k=top_k)
    assert error(answer, reference(QUERIES, keys, values, top_k=top_k)) <= bar(store[1])
    assert answer.engine == ("exact" if top_k else "dense")


@pytest.mark.parametrize("scale", [0.01, 0.5, 2.0])
def test_the_scale_is_the_callers(store: tuple[Store, DType], scale: float) -> None:
    keys, values = all_keys(store[1], 0)
    answer = attend(store[0], "m", 3, QUERIES, top_k=32, scale=scale)
    # At scale 2 logits reach 90, where float32 itself rounds by 1e-5.
    assert error(answer, reference(QUERIES, keys, values, top_k=32, scale=scale)) <= 4 * bar(store[1])


@pytest.mark.parametrize("gap", [0.0, 0.5, 3.0, 1000.0])
def test_a_logit_gap_drops_what_is_far_below_the_best(store: tuple[Store, DType], gap: float) -> None:
    keys, values = all_keys(store[1], 0)
    answer = attend(store[0], "m", 3, QUERIES, top_k=32, logit_gap=gap, tokens=True)
    expected = reference(QUERIES, keys, values, top_k=32, logit_gap=gap)
    assert error(answer, expected) <= bar(store[1])
    assert answer.tokens is not None
    kept = answer.tokens.source >= 0
    best = answer.tokens.score.amax(2, keepdim=True).expand_as(answer.tokens.score)
    assert (answer.tokens.score >= best - gap - 1e-5)[kept].all()
    assert ((answer.tokens.weight > 0) == kept).all() or gap == 1000.0


@pytest.mark.parametrize("output", [DType.F32, DType.BF16, DType.F16])
def test_the_output_comes_in_the_dtype_asked_for(store: tuple[Store, DType], output: DType) -> None:
    answer = attend(store[0], "m", 3, QUERIES, top_k=8, output_dtype=output)
    assert answer.output.dtype == output.torch
    assert answer.lse.dtype == torch.float32


@pytest.mark.parametrize("top_k", [0, 16])
def test_groups_of_one_call_are_answered_apart_and_in_order(store: tuple[Store, DType], top_k: int) -> None:
    opened, dtype = store
    session = opened.run(ME, verbs.OpenSession("m", spec_of(dtype).fingerprint)).id
    keys, values = (random((2, 2, 50, DIM), seed, dtype) for seed in (5, 6))
    append(opened, "m", session, spec_of(dtype), keys, values, 0)
    scopes = [
        Scope(("d1",)),
        Scope(),
        Scope.session(session),
        Scope(()),
        Scope(("d0", "d2")),
        Scope(),
        Scope(sessions=Scope.session(session).sessions),
    ]
    groups = tuple(AttendGroup(scope, random((4, 1 + n, DIM), n)) for n, scope in enumerate(scopes))
    options = AttendOptions(top_k=top_k, engine=Engine.EXACT, attribution=True)
    together = opened.run(ME, verbs.Attend("m", 7, groups, options))
    for group, answer in zip(groups, together, strict=True):
        alone = opened.run(ME, verbs.Attend("m", 7, (group,), options))[0]
        assert error(answer, alone.partial) <= F32_BAR
        assert answer.coverage == alone.coverage
        assert {a.source: a.mass for a in answer.attribution or ()} == pytest.approx(
            {a.source: a.mass for a in alone.attribution or ()}, abs=1e-5
        )


@pytest.mark.parametrize("top_k", [0, 16])
def test_attribution_is_the_softmax_mass_of_each_source(store: tuple[Store, DType], top_k: int) -> None:
    keys, _ = all_keys(store[1], 0)
    scores = scores_of(QUERIES, keys)
    if top_k:
        best = scores.topk(top_k, dim=2)
        scores = torch.full_like(scores, -torch.inf).scatter(2, best.indices, best.values)
    mass = torch.split(scores.softmax(2).mean((0, 1)), [700, 1, 2500])
    answer = attend(store[0], "m", 3, QUERIES, top_k=top_k, attribution=True)
    assert {a.source: a.mass for a in answer.attribution or ()} == pytest.approx(
        {f"d{n}": float(part.sum()) for n, part in enumerate(mass) if part.sum()}, abs=1e-4
    )


def test_search_names_the_tokens_attend_would_use(store: tuple[Store, DType]) -> None:
    group = AttendGroup(Scope(), QUERIES)
    options = AttendOptions(top_k=8, engine=Engine.EXACT)
    top = store[0].run(ME, verbs.Search("m", 3, (group,), options))[0]
    attended = attend(store[0], "m", 3, QUERIES, top_k=8, tokens=True).tokens
    assert attended is not None
    assert torch.equal(top.offset, attended.offset)
    assert torch.equal(top.score, attended.score)
    assert [top.sources[int(s)] for s in top.source.flatten()] == [
        attended.sources[int(s)] for s in attended.source.flatten()
    ]
