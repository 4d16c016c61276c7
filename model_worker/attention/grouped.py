"""Self-Extend as a merge of two partials: near keys at their place, far keys at the place of their group.

Keys nearer than w make one partial, a sliding window; those at w or farther the other, which is causal again once the
last w slots are left out. So nothing is ever [n, S]. (The authors' flash version splits prefill the same way.)
B batch rows, H query heads, K key/value heads, n queries, S key slots, D head_dim, w window, G group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memory_service import Partial, merge
from model_worker.attention import local
from model_worker.positions import self_extend
from model_worker.positions.rope import Rope, rotate
from model_worker.settings import SelfExtend


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rope: Rope,
    config: SelfExtend,
    scale: float,
    *,
    softcap: float | None = None,
) -> Partial:
    """Un-rotated queries [B, H, n, D] and keys, values [B, K, n, D] of whole sequences, which stand at 0 to n - 1.

    Costs about what plain causal attention over n tokens costs; scratch ∝ n.
    """
    return trailing(query, key, value, rope, config, scale, softcap=softcap)


def trailing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rope: Rope,
    config: SelfExtend,
    scale: float,
    *,
    first: Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """The queries are the last n of S slots; slot s of row b stands at s - first[b], and those before 0 are invisible.

    Un-rotated query [B, H, n, D] and key [B, K, S, D]; a query that stands before 0 gets output 0 and lse -inf.
    Rotates every key on every call: who decodes token by token keeps rotated keys and calls `trailing_rotated`.
    """
    count, slots = query.shape[2], key.shape[2]
    positions = torch.arange(slots, device=query.device)  # [S]
    if first is not None:
        positions = positions - first[:, None]  # [B, S]
    near = min(slots, config.window + count - 1)
    far = max(0, slots - config.window)
    near_keys = rotate(key[:, :, slots - near :], rope.angles(positions[..., slots - near :], key.dtype))
    grouped = self_extend.far_keys(positions[..., :far], config)
    far_keys = rotate(key[:, :, :far], rope.angles(grouped, key.dtype))
    own = positions[..., slots - count :]
    return trailing_rotated(
        query, near_keys, far_keys, value, rope, config, scale, positions=own, first=first, softcap=softcap
    )


def trailing_rotated(
    query: Tensor,
    near_keys: Tensor,
    far_keys: Tensor,
    value: Tensor,
    rope: Rope,
    config: SelfExtend,
    scale: float,
    *,
    positions: Tensor,
    first: Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """`trailing` over keys that are kept rotated: near ones at their positions p, far ones at floor(p / G).

    `positions` [n] or [B, n] are those of the queries, counted from where the keys' were; the query is un-rotated.
    Value has all S slots; `near_keys` needs only the last min(S, w + n - 1) of them, `far_keys` only the first S - w.
    """
    count, slots = query.shape[2], value.shape[2]
    sharpness = self_extend.query_scale(positions, config)
    if sharpness is not None:
        by_row = sharpness[:, None] if sharpness.dim() == 2 else sharpness  # [B, 1, n] or [n]
        query = (query * by_row[..., None]).to(query.dtype)
    far_slots = max(0, slots - config.window)
    # The query at slot s sees far slots up to s - w: among the first S - w slots, that is where it stands.
    blind = max(0, count - far_slots)  # Queries that see none.
    far_positions = self_extend.far_queries(positions[..., blind:], config)
    # Both rotations at once: for one query, calls cost more than numbers.
    angles = rope.angles(torch.cat((positions, far_positions), -1), query.dtype)
    turned = rotate(torch.cat((query, query[:, :, blind:]), 2), angles)
    gone = slots - near_keys.shape[2]
    near = local.trailing(
        turned[:, :, :count],
        near_keys,
        value[:, :, gone:],
        scale,
        first=None if first is None else first - gone,
        softcap=softcap,
        sliding=config.window,
    )
    if not far_slots:
        return near
    far = local.trailing(
        turned[:, :, count:],
        far_keys[:, :, :far_slots],
        value[:, :, :far_slots],
        scale,
        first=first,
        softcap=softcap,
    )
    whole = merge([Partial(near.output[:, :, blind:], near.lse[:, :, blind:]), far])
    if not blind:
        return whole
    alone = Partial(near.output[:, :, :blind], near.lse[:, :, :blind])
    return Partial(torch.cat((alone.output, whole.output), 2), torch.cat((alone.lse, whole.lse), 2))
