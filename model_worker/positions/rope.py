"""Rotary positions as a value: one rule, its angles, and the rotation itself.

B batch, T tokens, D head_dim, R rotary dims (the first R of D; the rest is left alone).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_TOKENS = 512  # Rotated at a time, so that what lies between two steps stays in the cache.


class Angles(NamedTuple):
    """What a channel is multiplied by, for some positions."""

    cos: Tensor  # [..., T, R]
    sin: Tensor


@dataclass(frozen=True, eq=False)
class Rope:
    """One rotation rule: the angle of channel pair r at position p is p · inv_freq[r]."""

    inv_freq: Tensor  # [R/2] float32
    scaling: float = 1.0  # Multiplies cos and sin (YaRN's attention factor).

    @property
    def rotary_dims(self) -> int:
        return 2 * self.inv_freq.shape[0]

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """Cosines and sines [..., R] of whole positions [...], computed in float32 as transformers computes them."""
        half = positions[..., None].float() * self.inv_freq
        cos, sin = half.cos(), half.sin()
        if self.scaling != 1.0:
            cos, sin = cos * self.scaling, sin * self.scaling
        return Angles(torch.cat((cos, cos), -1).to(dtype), torch.cat((sin, sin), -1).to(dtype))

    def unrotated_factor(self) -> float:
        """What a rotation by position 0 multiplies a rotary channel by; the other channels it never touches."""
        return self.scaling


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn the first R channels of x [B, heads, T, D] by angles [T, R] or [B, T, R], halves paired as in Llama."""
    cos, sin = angles
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]  # [B, 1, T, R]
    tokens = x.shape[2]
    if tokens <= _BLOCK_TOKENS or (torch.is_grad_enabled() and x.requires_grad):
        return _turned(x, cos, sin)
    output = torch.empty_like(x)
    for start in range(0, tokens, _BLOCK_TOKENS):
        some = slice(start, start + _BLOCK_TOKENS)
        output[:, :, some] = _turned(x[:, :, some], cos[..., some, :], sin[..., some, :])
    return output


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.shape[-1]
    turned = x[..., :rotary]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-right, left), dim=-1) * sin
    return turned if rotary == x.shape[-1] else torch.cat((turned, x[..., rotary:]), dim=-1)
