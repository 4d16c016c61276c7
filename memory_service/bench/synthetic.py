"""Keys, values and queries as hard to search as a language model's. H heads, T tokens, Q queries, D head_dim."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

NORM = 7.0  # Mean length of keys and queries: logits reach ~15 at head_dim 64.
SPREAD = 0.35  # Radius of a cluster against the distance between clusters.
DECAY = 0.5  # Standard deviation along the i-th axis falls as i ** -DECAY: a few directions carry most of the variance.
CLUSTER_TOKENS = 64  # Tokens of an average cluster; sizes are Zipf-like.


@dataclass(frozen=True, eq=False)
class Head:
    """The distribution of one head: anisotropic axes under a random rotation, so that no coordinate is special."""

    axes: Tensor  # [D, D]
    offset: Tensor  # [D] what all queries of a head share

    @staticmethod
    def draw(dim: int, generator: Generator) -> Head:
        deviations = torch.arange(1, dim + 1).float().pow(-DECAY)
        deviations *= (dim / deviations.square().sum()).sqrt()
        rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
        return Head(deviations[:, None] * rotation, normalize(torch.randn(dim, generator=generator), dim=0))

    def keys(self, tokens: int, generator: Generator) -> Tensor:
        """Keys [T, D]: clusters of uneven size and radius around a mean that is not zero, lengths within ±15 %."""
        dim = len(self.axes)
        clusters = max(16, tokens // CLUSTER_TOKENS)
        popularity = 1 / (torch.arange(clusters) + 10.0)
        cluster = torch.multinomial(popularity, tokens, replacement=True, generator=generator)  # [T]
        radius = SPREAD * torch.exp(0.4 * torch.randn(clusters, 1, generator=generator))
        centre = torch.randn(dim, generator=generator) + torch.randn(clusters, dim, generator=generator)
        keys = (centre[cluster] + radius[cluster] * torch.randn(tokens, dim, generator=generator)) @ self.axes
        keys *= torch.exp(0.15 * torch.randn(tokens, 1, generator=generator))
        length: Tensor = keys.norm(dim=1).mean()
        return keys * (NORM / length)

    def queries(self, keys: Tensor, queries: int, generator: Generator) -> Tensor:
        """Queries [Q, D]: half the direction of some stored key, half noise, and the head's own offset."""
        target = torch.randint(len(keys), (queries,), generator=generator)
        aim = normalize(keys[target] - keys.mean(0), dim=1)
        noise = normalize(torch.randn(queries, len(self.axes), generator=generator) @ self.axes, dim=1)
        length = NORM * torch.exp(0.2 * torch.randn(queries, 1, generator=generator))
        return length * normalize(aim + noise + 0.5 * self.offset, dim=1)


@dataclass(frozen=True, eq=False)
class Workload:
    """What an attend benchmark stores and asks.

    Calibrated on the memory layer of a small Focused Transformer over source code (524,288 tokens, 4 heads of 64):
    an inner-product IVF1024 over 131,072 of these keys has recall@32 of 0.56, 0.84 and 0.98 at 8, 32 and 128 probes
    (there 0.60, 0.84, 0.96), and the exact top 32 hold 3 % of the dense softmax mass (there 3 to 8 %). Clusters are
    drawn independently token by token: nothing is gained from neighbours being alike, as it might be in real text.
    """

    keys: Tensor  # [1, H, T, D] bf16
    values: Tensor  # [1, H, T, D] bf16
    queries: Tensor  # [H, Q, D] float32

    @staticmethod
    def draw(heads: int, tokens: int, dim: int, queries: int, seed: int = 0) -> Workload:
        generator = torch.Generator().manual_seed(seed)
        keys = torch.empty(1, heads, tokens, dim, dtype=torch.bfloat16)
        asked = torch.empty(heads, queries, dim)
        for number in range(heads):
            head = Head.draw(dim, generator)
            drawn = head.keys(tokens, generator)
            keys[0, number] = drawn
            asked[number] = head.queries(drawn, queries, generator)
        values = torch.randn(1, heads, tokens, dim, generator=generator).bfloat16()
        return Workload(keys, values, asked)
