"""Attention within the window, as a partial that can be merged with what the memory answers.

B batch rows, H query heads, K key/value heads (query head h reads h // (H // K)), n queries, S key slots, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memory_service import Partial, merge

_BAND_QUERIES = 64  # Queries that share one band of keys: more waste keys, fewer waste calls.
_BLOCK_SCORES = 1 << 22  # Float32 scores held at a time where no kernel serves.


def causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, softcap: float | None = None, sliding: int | None = None
) -> Partial:
    """Query i sees keys 0 to i, only the last `sliding` of them if given; as many queries as keys, no padding.

    query [B, H, n, D], key and value [B, K, n, D] → output [B, H, n, D] of their dtype, lse [B, H, n] float32.
    Time ∝ n² (with `sliding`, n · sliding), scratch ∝ n.
    """
    return trailing(query, key, value, scale, softcap=softcap, sliding=sliding)


def trailing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    first: Tensor | None = None,
    softcap: float | None = None,
    sliding: int | None = None,
) -> Partial:
    """The queries are the last n of S slots, causal; slots before `first` [B] of their row are invisible.

    key and value are [B, K, S, D], the rest is as in `causal`. A query before `first` sees nothing: output 0, lse -inf.
    """
    count, slots = query.shape[2], key.shape[2]
    if sliding is not None and slots > count + sliding - 1:
        gone = slots - (count + sliding - 1)
        key, value, slots = key[:, :, gone:], value[:, :, gone:], slots - gone
        first = None if first is None else first - gone
    if sliding is not None and sliding >= slots:
        sliding = None
    if not _served(query, key, value, softcap):
        return by_blocks(query, key, value, scale, first=first, softcap=softcap, sliding=sliding)
    if first is not None and int(first.max()) <= 0:
        first = None
    if sliding is None:
        return _plain(query, key, value, scale, first)
    if first is None:
        return _banded(query, key, value, scale, sliding)
    return _row_by_row(query, key, value, scale, first, sliding)


def by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    first: Tensor | None = None,
    softcap: float | None = None,
    sliding: int | None = None,
) -> Partial:
    """`trailing` by matrix products and a masked softmax, all in float32: on any device, and with gradients."""
    batch, heads, count, dim = query.shape
    kv_heads, slots = key.shape[1:3]
    past = slots - count
    step = max(1, _BLOCK_SCORES // max(1, batch * heads * slots))
    parts = []
    for start in range(0, count, step):
        stop = min(start + step, count)
        low = 0 if sliding is None else max(0, past + start - sliding + 1)
        seen = slice(low, past + stop)
        rows = query[:, :, start:stop].float().reshape(batch, kv_heads, -1, dim)
        scores = (rows @ key[:, :, seen].float().mT * scale).view(batch, heads, stop - start, -1)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        slot = torch.arange(low, past + stop, device=query.device)
        distance = torch.arange(past + start, past + stop, device=query.device)[:, None] - slot
        visible = distance >= 0 if sliding is None else (distance >= 0) & (distance < sliding)
        if first is not None:
            visible = visible & (slot >= first[:, None, None, None])
        scores = scores.masked_fill(~visible, -torch.inf)
        lse = scores.logsumexp(-1)  # [B, H, c]
        # Where nothing is visible, subtract 0 instead: weights of 0 rather than nan.
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
        output = weights.view(batch, kv_heads, -1, weights.shape[3]) @ value[:, :, seen].float()
        parts.append(Partial(output.view(batch, heads, stop - start, -1).to(value.dtype), lse))
    if not parts:
        return Partial(value.new_zeros(batch, heads, 0, value.shape[3]), query.new_zeros(batch, heads, 0).float())
    return _in_a_row(parts)


def _served(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> bool:
    """Whether PyTorch's CPU flash attention can answer; it has no gradient of the lse."""
    if softcap is not None or query.device.type != "cpu" or query.shape[2] == 0 or query.shape[3] != value.shape[3]:
        return False
    return not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float, first: Tensor | None = None) -> Partial:
    """Every earlier key: those before the queries, which all queries see, and the queries' own, causal."""
    count, slots = query.shape[2], key.shape[2]
    past = slots - count
    hidden = None if first is None else torch.arange(slots) < first[:, None]  # [B, S]
    if count == 1:
        return _every(query, key, value, scale, hidden)
    own = _own(query, key[:, :, past:], value[:, :, past:], scale, None if hidden is None else hidden[:, past:])
    if not past:
        return own
    before = (key[:, :, :past], value[:, :, :past])
    return merge([_every(query, *before, scale, None if hidden is None else hidden[:, :past]), own])


def _every(query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor | None) -> Partial:
    """Every query sees every key that is not hidden [B, S]."""
    batch, heads, count, dim = query.shape
    # Query heads that share a key head become queries of that one head: the keys are read once.
    folded = query.reshape(batch, key.shape[1], -1, dim)
    output, lse = _flash(folded, key, value, scale, None if hidden is None else _mask(hidden, query)[:, None, None])
    if hidden is not None:
        lse = lse.masked_fill(hidden.all(1)[:, None, None], -torch.inf)  # The kernel says 0.
    return Partial(output.reshape(batch, heads, count, dim), lse.reshape(batch, heads, count))


def _own(query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor | None) -> Partial:
    """Query i sees keys 0 to i, less the hidden ones [B, n], which are a row's first."""
    if hidden is None:
        return _flash(query, key, value, scale, None, causal=True)
    output, lse = _flash(query, key, value, scale, _mask(hidden, query)[:, None, None], causal=True)
    return Partial(output, lse.masked_fill(hidden[:, None], -torch.inf))  # The kernel says 0.


def _banded(query: Tensor, key: Tensor, value: Tensor, scale: float, sliding: int) -> Partial:
    """The last `sliding` keys only: blocks of queries whose bands of keys have one shape go to the kernel together."""
    count = query.shape[2]
    ramp = sliding - (key.shape[2] - count)  # These queries still see slot 0, the next one sees slots 1 to `sliding`.
    parts = [_plain(query[:, :, :ramp], key[:, :, :sliding], value[:, :, :sliding], scale)]
    step = min(_BAND_QUERIES, count - ramp)
    ahead = torch.arange(step + sliding - 1) - torch.arange(step)[:, None]  # [c, W]
    mask = _mask((ahead < 0) | (ahead >= sliding), query)
    rows = zip(query[:, :, ramp:], key[:, :, 1:], value[:, :, 1:], strict=True)
    parts.append(_stacked([_bands(*row, scale, mask) for row in rows]))
    rest = (count - ramp) % step
    if rest:
        tail = rest + sliding - 1
        parts.append(_flash(query[:, :, -rest:], key[:, :, -tail:], value[:, :, -tail:], scale, mask[:rest, :tail]))
    return _in_a_row(parts)


def _bands(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> Partial:
    """All whole blocks of a row's queries [H, n, D] over their bands of keys [K, W, D], which overlap and are views."""
    step, width = mask.shape
    query, key, value = (_windows(x, size, step) for x, size in ((query, step), (key, width), (value, width)))
    output, lse = _flash(query, key, value, scale, mask)  # [blocks, H, c, D], laid out as [blocks, c, H, D]
    return Partial(
        output.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None], lse.transpose(1, 2).flatten(0, 1).T[None]
    )


def _windows(x: Tensor, width: int, step: int) -> Tensor:
    """Views of x [heads, S, D]: [windows, heads, width, D]."""
    return x.unfold(1, width, step).permute(1, 0, 3, 2)


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, scale: float, first: Tensor, sliding: int) -> Partial:
    """Every row alone, without its hidden slots: then nothing needs a mask but the band."""
    past = key.shape[2] - query.shape[2]
    rows = []
    for row, begin in enumerate(first.clamp(0, key.shape[2]).tolist()):
        alone = slice(row, row + 1)
        blind = max(0, begin - past)  # Queries that see nothing.
        seen = trailing(query[alone, :, blind:], key[alone, :, begin:], value[alone, :, begin:], scale, sliding=sliding)
        output = torch.nn.functional.pad(seen.output, (0, 0, blind, 0))
        rows.append(Partial(output, torch.nn.functional.pad(seen.lse, (blind, 0), value=-torch.inf)))
    return _stacked(rows)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, *, causal: bool = False
) -> Partial:
    """The kernel; `mask` is added to the scores. Causal: query i sees keys 0 to i. The lse of an empty row is 0."""
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    return Partial(output, lse)


def _mask(hidden: Tensor, like: Tensor) -> Tensor:
    return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _in_a_row(parts: Sequence[Partial]) -> Partial:
    """Queries after queries."""
    return Partial(torch.cat([part.output for part in parts], 2), torch.cat([part.lse for part in parts], 2))


def _stacked(rows: Sequence[Partial]) -> Partial:
    """Batch rows under batch rows."""
    return rows[0] if len(rows) == 1 else Partial(torch.cat([x.output for x in rows]), torch.cat([x.lse for x in rows]))
