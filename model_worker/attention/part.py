"""Attention over some of the keys, forwards and backwards by hand, so that one softmax can be worked off part by part.

Given the output and the log-sum-exp over ALL keys, the gradient of one part needs nothing of the others: its weights
are exp(score - lse). So no more than a block of scores is ever held, and parts that were merged have exact gradients.
(FlashAttention-2, arXiv 2307.08691, does so with blocks of one text.)

B batch rows, H query heads, K key/value heads (query head h reads h // (H // K)), n queries, m keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memory_service import Partial

BLOCK_SCORES = 1 << 20  # Held at a time where no kernel serves.


@dataclass(frozen=True, slots=True)
class Rule:
    """Which keys a query sees, and how scores are made of products."""

    scale: float
    softcap: float | None = None
    causal: bool = False  # Query i sees keys 0 to i; then there are as many queries as keys.
    sliding: int | None = None  # Only the last so many of them.
    retrieved: int | None = None  # Only so many keys, those with the largest scores.


def forward(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Partial:
    """Query [B, H, n, D], key and value [B, K, m, D], in float32 or float64 → output [B, H, n, D] and lse [B, H, n]."""
    if not _served(query, rule):
        return _forward(query, key, value, rule)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, rule.causal, attn_mask=_band(query, rule), scale=rule.scale
    )
    return Partial(output, lse)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Partial, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """What query, key and value get of the output's gradient by way of these keys; `whole` is all keys' partial."""
    if not _served(query, rule):
        return _backward(grad, query, key, value, whole, rule)
    # The kernel makes its weights of the lse it is given, and asks not whose it is.
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad,
        query,
        key,
        value,
        whole.output,
        whole.lse,
        0.0,
        rule.causal,
        attn_mask=_band(query, rule),
        scale=rule.scale,
    )
    return gradients


def _served(query: Tensor, rule: Rule) -> bool:
    """Whether PyTorch's CPU flash attention can do it: it knows neither caps nor choices."""
    return query.device.type == "cpu" and rule.softcap is None and rule.retrieved is None and query.numel() > 0


def _band(query: Tensor, rule: Rule) -> Tensor | None:
    """What to add to the scores [n, n], for the kernel that knows what is causal and no more."""
    count = query.shape[2]
    if rule.sliding is None or rule.sliding >= count:
        return None
    return query.new_full((count, count), -torch.inf).tril_(-rule.sliding)


def _forward(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Partial:
    """By matrix products, on any device."""
    rows, keys, values = _folded(query, key), key.flatten(0, 1), value.flatten(0, 1)
    output = torch.empty_like(rows)
    lse = rows.new_empty(rows.shape[:2])
    for some, at in _blocks(rows.shape[0], rows.shape[1], keys.shape[1]):
        scores, _ = _scores(rows[some, at], keys[some], at.start, query.shape[2], rule)
        part = scores.logsumexp(-1, keepdim=True)
        output[some, at] = scores.sub_(part).exp_() @ values[some]
        lse[some, at] = part[..., 0]
    return Partial(output.view(query.shape), lse.view(query.shape[:3]))


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Partial, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """By matrix products: the scores are made once more, block by block."""
    rows, keys, values, grads = _folded(query, key), key.flatten(0, 1), value.flatten(0, 1), _folded(grad, key)
    lse = whole.lse.reshape(rows.shape[:2])[..., None]
    mean = (grads * _folded(whole.output, key)).sum(-1, keepdim=True)  # Of the weights' gradients, by weight.
    to_rows, to_keys, to_values = torch.empty_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
    for some, at in _blocks(rows.shape[0], rows.shape[1], keys.shape[1]):
        scores, slope = _scores(rows[some, at], keys[some], at.start, query.shape[2], rule)
        weights = scores.sub_(lse[some, at]).exp_()
        to_values[some] += weights.mT @ grads[some, at]
        to_scores = (grads[some, at] @ values[some].mT).sub_(mean[some, at]).mul_(weights)
        if slope is not None:
            to_scores *= slope
        to_scores *= rule.scale
        to_rows[some, at] = to_scores @ keys[some]
        to_keys[some] += to_scores.mT @ rows[some, at]
    return to_rows.view(query.shape), to_keys.view(key.shape), to_values.view(value.shape)


def _scores(rows: Tensor, keys: Tensor, start: int, count: int, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """Scores [N, r, m] of queries, -inf where they do not see, and by how much a cap flattens them.

    The queries are rows `start` on of heads that share their keys, `count` queries a head.
    """
    scores = (rows @ keys.mT).mul_(rule.scale)
    slope = None
    if rule.softcap is not None:
        scores = scores.div_(rule.softcap).tanh_()
        slope = 1 - scores * scores
        scores *= rule.softcap
    if rule.causal:
        query = torch.arange(start, start + rows.shape[1], device=rows.device)[:, None] % count
        distance = query - torch.arange(keys.shape[1], device=rows.device)
        hidden = distance < 0 if rule.sliding is None else (distance < 0) | (distance >= rule.sliding)
        scores.masked_fill_(hidden, -torch.inf)
    if rule.retrieved is not None and rule.retrieved < keys.shape[1]:
        best = scores.topk(rule.retrieved, dim=-1)
        scores = torch.full_like(scores, -torch.inf).scatter_(-1, best.indices, best.values)
    return scores, slope


def _folded(x: Tensor, key: Tensor) -> Tensor:
    """Query heads as further queries of the key head they share: [B, H, n, D] to [B * K, H / K * n, D]."""
    return x.reshape(key.shape[0] * key.shape[1], -1, x.shape[3])


def _blocks(heads: int, rows: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Heads and rows of them that have no more than a block of scores: whole heads together, or one bit by bit."""
    together = max(1, BLOCK_SCORES // max(1, rows * keys))
    step = max(1, min(rows, BLOCK_SCORES // max(1, keys)))
    for head in range(0, heads, together):
        for row in range(0, rows, step):
            yield slice(head, head + together), slice(row, min(row + step, rows))
