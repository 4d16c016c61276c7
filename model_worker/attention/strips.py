"""Causal attention of short windows by strips of queries: a few products serve all heads of all windows.

For windows that fit a core's cache this beats a kernel that goes from head to head. Nothing but the output comes out,
so there is nothing to merge it with. Channels stand in pairs, 2r beside 2r + 1, and a pair is a complex number: then a
rotation is one product.

B rows, K key/value heads, G query heads that share one, n keys, m queries (the newest), D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.attention.room import Room
from model_worker.positions.rope import Angles

LONGEST = 1024  # Keys; what is longer is the kernel's.
_QUERIES = 64  # Of a strip.


def paired(channels: int) -> Tensor:
    """In which order the channels of a head, whose halves turn against each other in Llama, become pairs."""
    return torch.arange(channels).view(2, -1).t().flatten()


def turns(angles: Angles) -> Tensor:
    """Angles [n, D] as complex numbers [n, D/2], one a pair."""
    cos, sin = (x[:, : x.shape[1] // 2].contiguous() for x in angles)
    return torch.complex(cos, sin)


def causal(query: Tensor, key: Tensor, value: Tensor, turns: Tensor, room: Room) -> Tensor:
    """Queries [B, m, K, G, D], already scaled, see the keys [B, n, K, D] up to their own; both un-rotated.

    Returns [B·m, K·G·D], in the room's memory. `turns` [≥ n, D/2]. Time ∝ m·n, scratch ∝ n.
    """
    batch, count, heads, group, dim = query.shape
    seen = key.shape[1]
    # Query heads that share a key head become queries of that one head, those of a token side by side.
    queries = room.take("queries", batch, heads, count, group, dim)
    keys = room.take("keys", batch, heads, seen, dim)
    values = room.take("values", batch, heads, seen, dim)
    torch.mul(_complex(query.transpose(1, 2)), turns[seen - count : seen, None], out=_complex(queries))
    torch.mul(_complex(key.transpose(1, 2)), turns[:seen], out=_complex(keys))
    values.copy_(value.transpose(1, 2))
    queries, keys, values = (x.flatten(0, 1) for x in (queries.flatten(2, 3), keys, values))
    output = room.take("attended", batch, count, heads, group, dim)
    size = min(_QUERIES, count)
    later = torch.full((size, size), -torch.inf).triu_(1).repeat_interleave(group, 0)  # [s·G, s]
    for start in range(0, count, size):
        own = min(size, count - start)
        stop = seen - count + start + own
        scores = room.take("scores", len(queries), own * group, stop)
        torch.bmm(queries[:, start * group : (start + own) * group], keys[:, :stop].mT, out=scores)
        scores[:, :, stop - own :].add_(later[: own * group, :own])
        torch.softmax(scores, dim=-1, out=scores)
        # Straight into the output, whose heads stand apart, the product would go head by head.
        mixed = room.take("mixed", len(queries), own * group, dim)
        torch.bmm(scores, values[:, :stop], out=mixed)
        output[:, start : start + own] = mixed.view(batch, heads, own, group, dim).transpose(1, 2)
    return output.view(batch * count, -1)


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(torch.unflatten(x, -1, (-1, 2)))
