"""Causal attention of short windows by strips of queries, in memory that is used again.

For windows that fit a core's cache, a few products a strip for all heads of all windows are faster than a kernel that
goes from head to head; nothing but the output comes out. Channels stand in pairs: 2r and 2r + 1 turn together, so that
a rotation is one product of complex numbers.

B rows, K key/value heads, G query heads that share one, n keys, m queries (the newest), D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST = 1024  # Keys; what is longer is the kernel's.
_QUERIES = 64  # Of a strip.


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """Of the calls that one `Strips` serves."""

    rows: int
    kv_heads: int
    group: int
    keys: int
    queries: int
    dim: int


@dataclass(frozen=True, slots=True, eq=False)
class _Strip:
    """Views of one strip's share; [B·K, …] unless told otherwise."""

    queries: Tensor  # [… , s·G, D]
    keys: Tensor  # [… , D, seen]
    values: Tensor  # [… , seen, D]
    scores: Tensor  # [… , s·G, seen]
    own: Tensor  # [… , s·G, s]: the scores of the strip's own keys
    mask: Tensor  # [s·G, s]
    mixed: Tensor  # [… , s·G, D]
    turned: Tensor  # [B, s, K, G, D]: the same, as the output has it
    output: Tensor  # [B, s, K, G, D]


class Strips:
    """Working memory for calls of one shape, all its views made beforehand."""

    def __init__(self, shape: Shape, like: Tensor):
        b, k, g, n, m, d = shape.rows, shape.kv_heads, shape.group, shape.keys, shape.queries, shape.dim
        self._shape = shape
        # Query heads that share a key head become queries of that one head, those of a token side by side.
        self._queries = like.new_empty(b, k, m, g, d)
        self._keys, self._values = like.new_empty(2, b, k, n, d).unbind()
        self._output = like.new_empty(b, m, k, g, d)
        queries, keys, values = (x.view(b * k, -1, d) for x in (self._queries, self._keys, self._values))
        most = min(_QUERIES, m)
        scores, mixed = like.new_empty(b * k * most * g * n), like.new_empty(b * k * most * g * d)
        mask = like.new_full((most, most), -torch.inf).triu_(1).repeat_interleave(g, 0)
        self._strips = []
        for start in range(0, m, most):
            own = min(most, m - start)
            seen = n - m + start + own
            table = scores[: b * k * own * g * seen].view(b * k, own * g, seen)
            part = mixed[: b * k * own * g * d].view(b * k, own * g, d)
            self._strips.append(
                _Strip(
                    queries[:, start * g : (start + own) * g],
                    keys[:, :seen].mT,
                    values[:, :seen],
                    table,
                    table[:, :, seen - own :],
                    mask[: own * g, :own],
                    part,
                    part.view(b, k, own, g, d).permute(0, 2, 1, 3, 4),
                    self._output[:, start : start + own],
                )
            )

    def causal(self, query: Tensor, key: Tensor, value: Tensor, turns: Tensor | None) -> Tensor:
        """Queries [B, m, K, G, D], already scaled, see the keys [B, n, K, D] up to their own.

        Both are rotated by `turns`, complex numbers [n, D/2], if given. Returns [B·m, K·G·D], overwritten by the next
        call. Time ∝ m·n, scratch ∝ n.
        """
        count = self._shape.queries
        _turn(query.transpose(1, 2), None if turns is None else turns[-count:, None], self._queries)
        _turn(key.transpose(1, 2), turns, self._keys)
        self._values.copy_(value.transpose(1, 2))
        for strip in self._strips:
            torch.bmm(strip.queries, strip.keys, out=strip.scores)
            strip.own.add_(strip.mask)
            torch.softmax(strip.scores, dim=-1, out=strip.scores)
            # Straight into the output, whose heads stand apart, the product would go head by head.
            torch.bmm(strip.scores, strip.values, out=strip.mixed)
            strip.output.copy_(strip.turned)
        return self._output.view(self._shape.rows * count, -1)


def _turn(x: Tensor, turns: Tensor | None, out: Tensor) -> None:
    if turns is None:
        out.copy_(x)
    else:
        torch.mul(_complex(x), turns, out=_complex(out))


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def paired(channels: int) -> Tensor:
    """In which order the channels of a head, whose halves turn against each other, become pairs."""
    return torch.arange(channels).view(2, -1).t().flatten()
