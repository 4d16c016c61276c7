"""Attention across rows equals one plain softmax over all that a query sees, gradients too, in little memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memory_service.errors import InvalidArgument
from model_worker.attention import part
from model_worker.attention.joint import joint, shares

SCALE = 0.4
Reads = Sequence[Sequence[int]]


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(
    rows: int, heads: int, kv_heads: int, count: int, dim: int = 4, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Query, far query, key, value and memory key, heads beside their token as projections leave them."""
    sizes = (heads, heads, kv_heads, kv_heads, kv_heads)
    return [
        drawn(rows, count, size, dim, seed=seed, dtype=dtype).transpose(1, 2).requires_grad_()
        for seed, size in enumerate(sizes)
    ]


def dense(
    query: Tensor,
    far_query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    reads: Reads,
    *,
    softcap: float | None = None,
    sliding: int | None = None,
    retrieved: int | None = None,
) -> Tensor:
    """The definition, row by row, over the whole table of scores."""
    count, shared = query.shape[2], query.shape[1] // key.shape[1]
    key, value, memory_key = (x.repeat_interleave(shared, dim=1) for x in (key, value, memory_key))
    distance = torch.arange(count)[:, None] - torch.arange(count)
    hidden = (distance < 0) | (distance >= (sliding or count))

    def scores_of(queries: Tensor, keys: Tensor) -> Tensor:
        scores = queries @ keys.mT * SCALE
        return scores if softcap is None else softcap * (scores / softcap).tanh()

    outputs = []
    for row, others in enumerate(reads):
        scores = scores_of(query[row], key[row]).masked_fill(hidden, -torch.inf)  # [H, n, n]
        values = value[row]
        if others:
            found = scores_of(far_query[row], torch.cat([memory_key[one] for one in others], 1))
            if retrieved is not None and retrieved < found.shape[2]:
                found = found.masked_fill(
                    found < found.sort(-1, descending=True).values[..., retrieved - 1, None], -torch.inf
                )
            scores = torch.cat([scores, found], -1)
            values = torch.cat([values, *(value[one] for one in others)], 1)
        outputs.append(scores.softmax(-1) @ values)
    return torch.stack(outputs)


def gradients(output: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """By each leaf, for one cotangent with heads beside their token, as the projection after it hands it back."""
    batch, heads, count, dim = output.shape
    cotangent = drawn(batch, count, heads, dim, seed=9).to(output.dtype).transpose(1, 2)
    found = torch.autograd.grad(output, leaves, cotangent, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(found, leaves, strict=True)]


def check(leaves: list[Tensor], reads: Reads, atol: float = 1e-10, **options: Any) -> None:
    query, far_query, key, value, memory_key = leaves
    have = joint(query, key, value, memory_key, reads, SCALE, far_query=far_query, **options)
    want = dense(*leaves, reads, **options)
    torch.testing.assert_close(have, want, atol=atol, rtol=0)
    for mine, right in zip(gradients(have, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(mine, right, atol=atol, rtol=0)


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, Reads]:
    """Rows and what they read; some read the same."""
    rows = draw(st.integers(1, 5))
    sets: list[list[int]] = []
    for row in range(rows):
        others = [one for one in range(rows) if one != row]
        again = [read for read in sets if row not in read]
        fresh = st.lists(st.sampled_from(others), unique=True) if others else st.just([])
        sets.append(draw(st.sampled_from(again) | fresh if again else fresh))
    return rows, sets


@settings(max_examples=40, deadline=None)
@given(
    batch=batches(),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    count=st.integers(1, 9),
    softcap=st.sampled_from([None, 3.0]),
    sliding=st.sampled_from([None, 1, 4]),
    retrieved=st.sampled_from([None, None, 1, 5, 1000]),
    block=st.sampled_from([1, 40, 1 << 20]),
)
def test_it_is_one_softmax_over_all_that_a_query_sees(
    batch: tuple[int, Reads],
    heads: tuple[int, int],
    count: int,
    softcap: float | None,
    sliding: int | None,
    retrieved: int | None,
    block: int,
) -> None:
    rows, reads = batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "BLOCK_SCORES", block)
        check(inputs(rows, *heads, count), reads, softcap=softcap, sliding=sliding, retrieved=retrieved)


@pytest.mark.parametrize("softcap", [None, 1e6], ids=["kernel", "products"])
@pytest.mark.parametrize("sliding", [None, 7])
def test_float32_and_windows_longer_than_a_block_of_the_kernel(softcap: float | None, sliding: int | None) -> None:
    leaves = inputs(3, 2, 1, 530, dtype=torch.float32)
    check(leaves, [(), (0, 2), (0,)], atol=2e-5, softcap=softcap, sliding=sliding)


def test_without_a_far_query_others_are_looked_at_as_ones_own_row_is() -> None:
    query, _, key, value, memory_key = inputs(3, 2, 2, 5)
    reads = [(1, 2), (), (0,)]
    have = joint(query, key, value, memory_key, reads, SCALE)
    torch.testing.assert_close(have, dense(query, query, key, value, memory_key, reads))


def test_what_is_read_learns_from_who_read_it() -> None:
    query, far_query, key, value, memory_key = inputs(3, 2, 1, 4)
    output = joint(query, key, value, memory_key, [(2,), (), ()], SCALE, far_query=far_query)
    to_keys, to_values = torch.autograd.grad(output[0].square().sum(), [memory_key, value])
    assert to_keys[2].abs().min() > 0
    assert to_values[2].abs().min() > 0
    assert not to_keys[:2].any()
    assert not to_values[1].any()


def test_rows_of_another_kind_can_be_read_and_may_be_longer() -> None:
    query, _, key, value, _ = inputs(2, 2, 1, 3)
    memory_key, memory_value = (drawn(3, 1, 8, 4, seed=seed).requires_grad_() for seed in (6, 7))
    reads = [(0, 2), (1,)]
    leaves = [query, key, value, memory_key, memory_value]

    have = joint(query, key, value, memory_key, reads, SCALE, memory_value=memory_value)

    causal = torch.ones(3, 3).tril().bool()
    rows = []
    for row, read in enumerate(reads):
        keys = torch.cat([key[row], *(memory_key[one] for one in read)], 1)
        values = torch.cat([value[row], *(memory_value[one] for one in read)], 1)
        seen = torch.cat([causal, torch.ones(3, 8 * len(read)).bool()], 1)
        rows.append((query[row] @ keys.mT * SCALE).masked_fill(~seen, -torch.inf).softmax(-1) @ values)
    want = torch.stack(rows)
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(gradients(have, leaves), gradients(want, leaves))


@pytest.mark.parametrize("softcap", [None, 30.0], ids=["kernel", "products"])
def test_half_precision_comes_in_and_goes_out_and_is_computed_in_float32(softcap: float | None) -> None:
    leaves = [one.detach().bfloat16().requires_grad_() for one in inputs(3, 4, 2, 9)]
    exact = [one.detach().double().requires_grad_() for one in leaves]
    query, far_query, key, value, memory_key = leaves
    reads = [(1, 2), (), (1, 0)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        have = joint(query, key, value, memory_key, reads, SCALE, far_query=far_query, softcap=softcap)
    want = dense(*exact, reads, softcap=softcap)

    assert have.dtype is torch.bfloat16
    torch.testing.assert_close(have.double(), want, atol=0, rtol=2**-8)
    for mine, right in zip(gradients(have, leaves), gradients(want, exact), strict=True):
        assert mine.dtype is torch.bfloat16
        # The cotangent is rounded too, so only what is large is right to all digits.
        torch.testing.assert_close(mine.double(), right, atol=2**-7 * float(right.abs().max()), rtol=0)


def test_autocast_makes_nothing_coarser() -> None:
    query, far_query, key, value, memory_key = inputs(2, 2, 2, 6, dtype=torch.float32)
    plain, coarse = (torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled) for enabled in (False, True))
    results = []
    for mode in (plain, coarse):
        with mode:
            output = joint(query, key, value, memory_key, [(1,), ()], SCALE, far_query=far_query, softcap=5.0)
            results.append((output, *torch.autograd.grad(output.sum(), [query, memory_key])))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return out


@pytest.mark.parametrize("softcap", [None, 30.0], ids=["kernel", "products"])
def test_no_table_of_all_scores_is_ever_made(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, count, block = 16, 32, 1 << 13
    leaves = inputs(rows, 2, 2, count, dtype=torch.float32)
    query, far_query, key, value, memory_key = leaves
    reads = [tuple(range(0, rows, 2)) if row % 2 else () for row in range(rows)]
    monkeypatch.setattr(part, "BLOCK_SCORES", block)

    with Largest() as seen:
        gradients(joint(query, key, value, memory_key, reads, SCALE, far_query=far_query, softcap=softcap), leaves)
    with Largest() as plain:
        gradients(dense(*leaves, reads, softcap=softcap), leaves)

    assert seen.numbers <= max(query.numel(), block)
    assert plain.numbers > 2 * seen.numbers  # Else this could not tell.


def test_shares_are_what_the_softmax_gave_each_row() -> None:
    query, far_query, key, _, memory_key = inputs(3, 2, 1, 5)
    reads = [(1, 2), (), (0,)]
    # Each row's values are a channel of their own, so the output says where the attention went.
    value = torch.eye(3, 4, dtype=torch.float64)[:, None, None].expand(3, 1, 5, 4)

    have = shares(query, key, memory_key, reads, SCALE, far_query=far_query)

    output = joint(query, key, value, memory_key, reads, SCALE, far_query=far_query)
    assert [one.shape for one in have] == [(2, 5, 2), (2, 5, 0), (2, 5, 1)]
    torch.testing.assert_close(have[0], output[0][..., [1, 2]])
    torch.testing.assert_close(have[2], output[2][..., [0]])


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        ([(), ()], "reads for each of 3 rows"),
        ([(0,), (), ()], "row 0 would read"),
        ([(1, 1), (), ()], "each once"),
        ([(3,), (), ()], "of 3 rows"),
        ([(-1,), (), ()], "of 3 rows"),
    ],
)
def test_reads_that_make_no_sense_are_refused(reads: Reads, message: str) -> None:
    query, _, key, value, memory_key = inputs(3, 1, 1, 2)
    with pytest.raises(InvalidArgument, match=message):
        joint(query, key, value, memory_key, reads, SCALE)


def test_to_retrieve_nothing_is_refused() -> None:
    query, _, key, value, memory_key = inputs(2, 1, 1, 2)
    with pytest.raises(InvalidArgument, match="retrieved"):
        joint(query, key, value, memory_key, [(1,), ()], SCALE, retrieved=0)
