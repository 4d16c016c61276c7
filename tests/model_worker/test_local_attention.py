"""Attention within the window equals one float64 softmax over what each query may see, and says how much it saw."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memory_service import Partial, merge
from model_worker.attention import local

SCALE = 0.3


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(
    rows: int, heads: int, kv_heads: int, count: int, slots: int, dim: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as projections leave them, heads beside their token; keys and values as the window holds them."""
    query = 2 * drawn(rows, count, heads, dim, seed=1, dtype=dtype).transpose(1, 2)
    return (
        query,
        drawn(rows, kv_heads, slots, dim, seed=2, dtype=dtype),
        drawn(rows, kv_heads, slots, dim, seed=3, dtype=dtype),
    )


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    first: Tensor | None = None,
    softcap: float | None = None,
    sliding: int | None = None,
) -> Partial:
    """The definition, in float64, over the whole table of scores."""
    count, slots = query.shape[2], key.shape[2]
    key, value = (x.double().repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query.double() @ key.mT * SCALE  # [B, H, n, S]
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    slot = torch.arange(slots)
    distance = slot[slots - count :, None] - slot
    visible = (distance >= 0) & (distance < (sliding or slots))
    begins = torch.zeros(len(query), dtype=torch.int64) if first is None else first
    visible = visible & (slot >= begins[:, None, None, None])
    weights = (
        scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
    )  # A query that sees nothing weighs nothing.
    return Partial(weights @ value, scores.masked_fill(~visible, -torch.inf).logsumexp(-1))


def assert_close(found: Partial, wanted: Partial, bar: float = 1e-5) -> None:
    assert found.lse.dtype == torch.float32
    torch.testing.assert_close(found.output.double(), wanted.output, atol=bar, rtol=bar)
    torch.testing.assert_close(found.lse.double(), wanted.lse, atol=bar, rtol=bar)


@dataclass(frozen=True)
class Shape:
    """Sizes of one call."""

    rows: int
    kv_heads: int
    shared: int  # Query heads of a key head.
    count: int
    slots: int
    begins: tuple[int, ...] | None
    softcap: float | None
    sliding: int | None


@st.composite
def shapes(draw: st.DrawFn, longest: int) -> Shape:
    slots, rows = draw(st.integers(1, longest)), draw(st.integers(1, 3))
    begins = st.tuples(*[st.integers(0, slots)] * rows)
    return Shape(
        rows=rows,
        kv_heads=draw(st.integers(1, 2)),
        shared=draw(st.integers(1, 3)),
        count=draw(st.sampled_from((1, slots)) | st.integers(1, slots)),
        slots=slots,
        begins=draw(st.none() | begins),
        softcap=draw(st.none() | st.just(2.0)),
        sliding=draw(st.none() | st.integers(1, slots + 2)),
    )


@pytest.mark.parametrize("longest", [12, 400])
def test_any_call_equals_the_definition(longest: int) -> None:
    @given(shapes(longest))
    @settings(max_examples=100)
    def holds(shape: Shape) -> None:
        tensors = inputs(shape.rows, shape.kv_heads * shape.shared, shape.kv_heads, shape.count, shape.slots)
        first = None if shape.begins is None else torch.tensor(shape.begins)
        found = local.trailing(*tensors, SCALE, first=first, softcap=shape.softcap, sliding=shape.sliding)
        assert_close(found, expected(*tensors, first=first, softcap=shape.softcap, sliding=shape.sliding))

    holds()


@pytest.mark.parametrize("sliding", [None, 1, 63, 64, 65, 600, 1099, 1100])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1100])
def test_lengths_around_the_blocks_of_the_kernel(count: int, sliding: int | None) -> None:
    tensors = inputs(1, 4, 2, count, 1100)
    assert_close(local.trailing(*tensors, SCALE, sliding=sliding), expected(*tensors, sliding=sliding))


@pytest.mark.parametrize("count", [1, 40, 1100])
def test_rows_that_begin_beyond_whole_blocks_of_keys(count: int) -> None:
    tensors, first = inputs(4, 2, 2, count, 1100), torch.tensor([0, 513, 1075, 1100])
    assert_close(local.trailing(*tensors, SCALE, first=first), expected(*tensors, first=first))
    assert_close(local.trailing(*tensors, SCALE, first=first, sliding=90), expected(*tensors, first=first, sliding=90))


@pytest.mark.parametrize("sliding", [None, 3])
def test_a_query_that_sees_nothing_says_so(sliding: int | None) -> None:
    output, lse = local.trailing(*inputs(2, 2, 1, 6, 9), SCALE, first=torch.tensor([5, 9]), sliding=sliding)
    assert lse[0, 0].isinf().tolist() == [True, True, False, False, False, False]
    assert (lse[1] == -torch.inf).all()
    assert not output[0, :, :2].any()
    assert not output[1].any()


def test_causal_is_trailing_with_as_many_queries_as_keys() -> None:
    tensors = inputs(2, 4, 2, 90, 90)
    assert_close(local.causal(*tensors, SCALE), expected(*tensors))
    assert_close(local.causal(*tensors, SCALE, softcap=3.0, sliding=7), expected(*tensors, softcap=3.0, sliding=7))


def test_no_queries_get_no_answers() -> None:
    output, lse = local.trailing(*inputs(2, 4, 2, 0, 5), SCALE)
    assert output.shape == (2, 4, 0, 8)
    assert lse.shape == (2, 4, 0)


def test_windows_merge_to_the_whole() -> None:
    query, key, value = inputs(1, 2, 2, 1, 50)
    parts = [local.trailing(query, key[:, :, some], value[:, :, some], SCALE) for some in (slice(0, 20), slice(20, 50))]
    assert_close(merge(parts), expected(query, key, value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_half_precision_rounds_only_what_comes_out(dtype: torch.dtype, softcap: float | None) -> None:
    tensors = inputs(2, 4, 2, 70, 200, dim=16, dtype=dtype)
    found = local.trailing(*tensors, SCALE, softcap=softcap, sliding=50)
    assert found.output.dtype == dtype
    assert_close(found, expected(*tensors, softcap=softcap, sliding=50), bar=2e-2)
    torch.testing.assert_close(
        found.lse.double(), expected(*tensors, softcap=softcap, sliding=50).lse, atol=1e-4, rtol=0
    )


def test_large_scores_do_not_overflow() -> None:
    query, key, value = inputs(1, 2, 2, 30, 60)
    assert_close(local.trailing(1000 * query, key, value, SCALE), expected(1000 * query, key, value), bar=1e-3)


@pytest.mark.parametrize("sliding", [None, 4])
def test_gradients_reach_the_output_and_the_lse(sliding: int | None) -> None:
    first = torch.tensor([0, 3])
    tensors = [x.requires_grad_() for x in inputs(2, 4, 2, 9, 12)]
    wanted = torch.autograd.grad(_sum(expected(*tensors, first=first, sliding=sliding)), tensors)
    found = torch.autograd.grad(_sum(local.trailing(*tensors, SCALE, first=first, sliding=sliding)), tensors)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def _sum(partial: Partial) -> Tensor:
    weights = torch.arange(partial.output.numel()).view(partial.output.shape).sin()
    lse = partial.lse.masked_fill(partial.lse == -torch.inf, 0)
    return (partial.output.double() * weights).sum() + (lse.double() * weights[..., 0]).sum()


def test_arguments_are_left_alone() -> None:
    tensors, first = inputs(2, 4, 2, 70, 200), torch.tensor([0, 150])
    before = [x.clone() for x in (*tensors, first)]
    local.trailing(*tensors, SCALE, first=first, sliding=20)
    local.trailing(*tensors, SCALE, first=first)
    assert all(torch.equal(x, y) for x, y in zip((*tensors, first), before, strict=True))
