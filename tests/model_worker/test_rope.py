"""Rotation is transformers' own, bit for bit, and does what rotary positions promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PhiConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
from transformers.models.phi.modeling_phi import apply_rotary_pos_emb as apply_phi

from model_worker.positions.rope import Rope, rotate

DTYPES = [pytest.param(dtype, id=str(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10_000.0},
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


def llama(head_dim: int = 24, **rope: Any) -> LlamaRotaryEmbedding:
    rope = rope or SCALINGS[0]
    return LlamaRotaryEmbedding(
        LlamaConfig(head_dim=head_dim, max_position_embeddings=512, rope_parameters=rope)  # type: ignore[arg-type]
    )


def rope_of(module: LlamaRotaryEmbedding | PhiRotaryEmbedding) -> Rope:
    return Rope(module.inv_freq, module.attention_scaling)


def heads(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """[B, heads, T, D] as projections leave it: heads beside their token."""
    batch, count, tokens, dim = shape
    drawn = torch.randn(batch, tokens, count, dim, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
@pytest.mark.parametrize("head_dim", [2, 24, 64, 256])
def test_angles_are_bit_equal_to_those_of_llama(scaling: dict[str, Any], head_dim: int, dtype: torch.dtype) -> None:
    module = llama(head_dim, **scaling)
    positions = torch.stack((torch.arange(700), torch.randint(0, 200_000, (700,))))
    cos, sin = module(torch.empty(0, dtype=dtype), positions)
    ours = rope_of(module).angles(positions, dtype)
    assert torch.equal(ours.cos, cos)
    assert torch.equal(ours.sin, sin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 512, 513, 1300])
def test_rotation_is_bit_equal_to_llamas(tokens: int, dtype: torch.dtype) -> None:
    module, x = llama(), heads(2, 3, tokens, 24, dtype=dtype)
    positions = torch.stack((torch.arange(tokens), torch.arange(tokens) + 1000))  # [B, T]
    theirs, _ = apply_rotary_pos_emb(x, x, *module(x, positions))
    assert torch.equal(rotate(x, rope_of(module).angles(positions, dtype)), theirs)
    assert torch.equal(rotate(x[:1], rope_of(module).angles(positions[0], dtype)), theirs[:1])


@pytest.mark.parametrize("tokens", [1, 600])
def test_partial_rotation_is_bit_equal_to_phis(tokens: int) -> None:
    config = PhiConfig(hidden_size=64, num_attention_heads=2)  # Rotates half of its 32 channels.
    module, x = PhiRotaryEmbedding(config), heads(2, 3, tokens, 32)
    rope, positions = rope_of(module), torch.arange(tokens)[None].expand(2, -1)
    turned, _ = apply_phi(x[..., :16], x[..., :16], *module(x, positions))
    assert rope.rotary_dims == 16
    assert torch.equal(rotate(x, rope.angles(positions, x.dtype)), torch.cat((turned, x[..., 16:]), -1))


def test_rotation_does_not_write_into_its_argument() -> None:
    x = heads(1, 2, 600, 24)
    before = x.clone()
    rotate(x, rope_of(llama()).angles(torch.arange(600), x.dtype))
    assert torch.equal(x, before)


def test_scores_depend_only_on_the_distance() -> None:
    rope, query, key = rope_of(llama()), heads(1, 1, 1, 24, seed=1), heads(1, 1, 1, 24, seed=2)
    here, there = (
        [rotate(x, rope.angles(torch.tensor([p]), x.dtype)) for x, p in zip((query, key), at, strict=True)]
        for at in ((9, 4), (105, 100))
    )
    assert (here[0] @ here[1].mT).item() == pytest.approx((there[0] @ there[1].mT).item(), abs=1e-5)


def test_rotation_by_zero_multiplies_rotary_channels_by_the_unrotated_factor() -> None:
    rope, x = rope_of(llama(16, **SCALINGS[2])), heads(1, 1, 1, 24)
    turned = rotate(x, rope.angles(torch.tensor([0]), x.dtype))
    assert rope.unrotated_factor() == pytest.approx(1.2079, abs=1e-4)  # 0.1 ln 8 + 1
    assert torch.allclose(turned[..., :16], x[..., :16] * rope.unrotated_factor())
    assert torch.equal(turned[..., 16:], x[..., 16:])


@pytest.mark.parametrize("tokens", [3, 700])
def test_the_gradient_of_a_rotation_is_the_rotation_back(tokens: int) -> None:
    rope, x = rope_of(llama()), heads(1, 2, tokens, 24).requires_grad_()
    positions, ahead = torch.arange(tokens), heads(1, 2, tokens, 24, seed=3)
    rotate(x, rope.angles(positions, x.dtype)).backward(ahead)  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.allclose(x.grad, rotate(ahead, rope.angles(-positions, x.dtype)), atol=1e-6)
