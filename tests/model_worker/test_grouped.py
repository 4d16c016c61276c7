"""Self-Extend's attention equals one masked softmax with every pair at the place that the rule's table gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memory_service import Partial
from model_worker.attention import grouped, local
from model_worker.positions.rope import Rope, rotate
from model_worker.positions.self_extend import far_keys, query_scale, relative_positions
from model_worker.settings import LogitScaling, SelfExtend

SCALE = 0.3
ROPE = Rope(100.0 ** -(torch.arange(0, 8, 2) / 8))  # All of 8 channels, or half of 16.


def inputs(rows: int, heads: int, kv_heads: int, count: int, slots: int, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(count + 1000 * slots)
    query = torch.randn(rows, count, heads, dim, generator=source).transpose(1, 2)
    key, value = (torch.randn(rows, kv_heads, slots, dim, generator=source) for _ in range(2))
    return 2 * query, key, value


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SelfExtend,
    *,
    rope: Rope = ROPE,
    first: Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """The rule itself, in float64: each query is turned by its relative position to each key, the keys stay."""
    count, slots = query.shape[2], key.shape[2]
    key, value = (x.double().repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    rows = []
    for row in range(len(query)):
        begin = 0 if first is None else int(first[row])
        table = torch.full((slots, slots), -1)
        table[begin:, begin:] = relative_positions(slots - begin, config)
        places = table[slots - count :]  # [n, S]
        sharper = query_scale(torch.arange(slots - count, slots) - begin, config)
        sharp = query[row].double() * (1 if sharper is None else sharper.double()[:, None])
        scores = (_turned(sharp, places, rope) * key[row][:, None]).sum(-1) * SCALE  # [H, n, S]
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        scores = scores.masked_fill(places < 0, -torch.inf)
        rows.append(Partial(scores.softmax(-1).nan_to_num() @ value[row], scores.logsumexp(-1)))
    return Partial(torch.stack([x.output for x in rows]), torch.stack([x.lse for x in rows]))


def _turned(query: Tensor, places: Tensor, rope: Rope) -> Tensor:
    """Queries [H, n, D] turned by each of their places [n, S]: [H, n, S, D]."""
    angle = places[..., None] * rope.inv_freq.double()  # [n, S, R/2]
    half = rope.rotary_dims // 2
    left, right, rest = (x[:, :, None] for x in query.split((half, half, query.shape[2] - 2 * half), -1))
    turned = left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()
    return torch.cat((*turned, rest.expand(*turned[0].shape[:3], -1)), -1)


def assert_close(found: Partial, wanted: Partial) -> None:
    torch.testing.assert_close(found.output.double(), wanted.output, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.lse.double(), wanted.lse, atol=2e-5, rtol=1e-4)


@dataclass(frozen=True)
class Call:
    """Sizes and options of one call."""

    kv_heads: int
    shared: int  # Query heads of a key head.
    dim: int
    count: int
    slots: int
    begins: tuple[int, int] | None
    config: SelfExtend
    softcap: float | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return inputs(2, self.kv_heads * self.shared, self.kv_heads, self.count, self.slots, self.dim)

    @property
    def first(self) -> Tensor | None:
        return None if self.begins is None else torch.tensor(self.begins)


@st.composite
def calls(draw: st.DrawFn, longest: int = 40) -> Call:
    slots = draw(st.integers(1, longest))
    begin = st.integers(0, slots)
    return Call(
        kv_heads=draw(st.integers(1, 2)),
        shared=draw(st.integers(1, 2)),
        dim=draw(st.sampled_from((8, 16))),
        count=draw(st.sampled_from((1, slots)) | st.integers(1, slots)),
        slots=slots,
        begins=draw(st.none() | st.tuples(begin, begin)),
        config=SelfExtend(
            draw(st.integers(1, 9)), draw(st.integers(1, slots + 2)), draw(st.sampled_from(LogitScaling)), scale_base=7
        ),
        softcap=draw(st.none() | st.just(2.0)),
    )


@given(calls())
@settings(max_examples=80)
def test_any_call_equals_the_rule(call: Call) -> None:
    found = grouped.trailing(*call.tensors, ROPE, call.config, SCALE, first=call.first, softcap=call.softcap)
    assert_close(found, expected(*call.tensors, call.config, first=call.first, softcap=call.softcap))


@given(calls(), st.integers(0, 3), st.integers(0, 3), st.integers(0, 100))
@settings(max_examples=60)
def test_keys_kept_rotated_give_the_same(call: Call, more_near: int, more_far: int, shift: int) -> None:
    query, key, value = call.tensors
    # A row's positions may count from anywhere that its groups begin at.
    begins = torch.zeros(2, dtype=torch.int64) if call.first is None else call.first
    positions = torch.arange(call.slots) - begins[:, None] + shift * call.config.group  # [B, S]
    if call.config.logit_scaling is not LogitScaling.NONE:
        positions = positions - shift * call.config.group  # Sharpness knows absolute positions.
    near = rotate(key, ROPE.angles(positions, key.dtype))
    far = rotate(key, ROPE.angles(far_keys(positions, call.config), key.dtype))
    found = grouped.trailing_rotated(
        query,
        near[:, :, max(0, call.slots - (call.config.window + call.count - 1) - more_near) :],
        far[:, :, : max(0, call.slots - call.config.window) + more_far],
        value,
        ROPE,
        call.config,
        SCALE,
        positions=positions[:, call.slots - call.count :],
        first=call.first,
        softcap=call.softcap,
    )
    assert_close(found, expected(query, key, value, call.config, first=call.first, softcap=call.softcap))


@pytest.mark.parametrize("length", [127, 128, 129, 600])
@pytest.mark.parametrize(("group", "window"), [(4, 64), (5, 100)])
def test_prefill_around_the_blocks_of_the_kernel(length: int, group: int, window: int) -> None:
    tensors, config = inputs(1, 2, 1, length, length), SelfExtend(group, window)
    assert_close(grouped.prefill(*tensors, ROPE, config, SCALE), expected(*tensors, config))


def test_rotation_with_an_attention_factor_scales_rotary_channels_only() -> None:
    tensors, config = inputs(1, 2, 1, 30, 30, dim=16), SelfExtend(3, 6)
    found = grouped.prefill(*tensors, Rope(ROPE.inv_freq, scaling=1.3), config, SCALE)
    query, key, value = tensors
    factors = torch.tensor([1.3] * 8 + [1.0] * 8)
    assert_close(found, expected(query * factors, key * factors, value, config))


@pytest.mark.parametrize("config", [SelfExtend(group=8, window=50), SelfExtend(group=8, window=9999)], ids=str)
def test_a_text_within_the_window_is_bit_identical_to_ordinary_attention(config: SelfExtend) -> None:
    query, key, value = inputs(2, 4, 2, 50, 50)
    angles = ROPE.angles(torch.arange(50), torch.float32)
    ordinary = local.causal(rotate(query, angles), rotate(key, angles), value, SCALE)
    found = grouped.prefill(query, key, value, ROPE, config, SCALE)
    assert torch.equal(found.output, ordinary.output)
    assert torch.equal(found.lse, ordinary.lse)


def test_a_padded_row_equals_the_row_alone() -> None:
    query, key, value = inputs(2, 4, 2, 60, 60)
    config = SelfExtend(group=3, window=7)
    both = grouped.trailing(query, key, value, ROPE, config, SCALE, first=torch.tensor([0, 22]))
    alone = grouped.prefill(*(x[1:, :, 22:] for x in (query, key, value)), ROPE, config, SCALE)
    torch.testing.assert_close(both.output[1:, :, 22:], alone.output, atol=1e-6, rtol=1e-5)
    assert (both.lse[1, :, :22] == -torch.inf).all()


def test_gradients_are_those_of_the_rule() -> None:
    config, first = SelfExtend(3, 4, LogitScaling.LOG, scale_base=6), torch.tensor([0, 5])
    tensors = [x.requires_grad_() for x in inputs(2, 4, 2, 10, 15)]
    ahead = torch.arange(2 * 4 * 10 * 8).view(2, 4, 10, 8).sin()
    found = grouped.trailing(*tensors, ROPE, config, SCALE, first=first)
    ours = torch.autograd.grad(found.output, tensors, ahead)
    theirs = torch.autograd.grad(expected(*tensors, config, first=first).output, tensors, ahead.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for tensor in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return given


@pytest.mark.parametrize("first", [None, torch.tensor([100])])
def test_no_tensor_is_larger_than_the_queries_twice_over(first: Tensor | None) -> None:
    query, key, value = inputs(1, 2, 1, 2048, 2048, dim=64)
    with Largest() as largest:
        grouped.trailing(query, key, value, ROPE, SelfExtend(8, 256), SCALE, first=first)
    assert largest.bytes < 2 * query.untyped_storage().nbytes()  # 2 MiB, where a mask of all pairs would take 16.
