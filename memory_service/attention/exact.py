"""Attention over disjoint sets of keys: exact top-k, dense, and the one function that merges partial results.

H key/value heads, R query rows of a head (query heads that share it, times queries), D head_dim, K top_k.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memory_service.attention import scan
from memory_service.attention.scan import GROUP, Arena, Chunk
from memory_service.types.answers import Partial
from memory_service.types.callers import Cancel

_PIECE_ELEMENTS = 1 << 21  # Float32 elements gathered at a time when candidates are scored again.
_FEW_QUERIES = 8  # Below this, two products beat the kernel, which converts nothing and reads keys for many queries.
_FEW_ELEMENTS = 1 << 19  # Of keys that are converted and multiplied together.
_FEW_SCORES = 1 << 20  # Held at a time.
_FEW_KEYS = 8192  # Below this, scoring everything and sorting beats a scan.


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Partial:
    """Softmax attention in float32, written to be obvious: the oracle of the engines below.

    query [..., Q, D] already scaled, key and value [..., N, D], visible broadcasts to [..., Q, N].
    """
    scores = query.float() @ key.float().mT
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights, lse = _softmax(scores, dim=-1)
    return Partial(weights @ value.float(), lse)


def merge(partials: Sequence[Partial]) -> Partial:
    """What one softmax over all the keys would have given: a softmax over the partials' lse."""
    shares, lse = _softmax(torch.stack([p.lse.float() for p in partials]), dim=0)
    output = sum((share[..., None] * p.output for share, p in zip(shares, partials, strict=True)), torch.zeros(()))
    return Partial(output.to(partials[0].output.dtype), lse)


def _softmax(scores: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    lse = scores.logsumexp(dim, keepdim=True)
    # Where every score is -inf, subtract 0 instead: weights of 0 rather than nan.
    return (scores - lse.masked_fill(lse == -torch.inf, 0)).exp(), lse.squeeze(dim)


def group_heads(queries: Tensor, kv_heads: int) -> Tensor:
    """[G, Q, D] to [H, R, D]: query head g reads kv head g // (G // H)."""
    heads, count, dim = queries.shape
    return queries.reshape(kv_heads, heads // kv_heads * count, dim)


def _kernel(queries: Tensor, keys: Tensor, values: Tensor) -> Partial:
    """`attend` over [n, D], n ≥ 1, by PyTorch's CPU kernel, which reads every key and value once and tells the lse."""
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries[None, None], keys[None, None], values[None, None], scale=1.0
    )
    return Partial(output[0, 0], lse[0, 0])


def _loaded(keys: Tensor, ranges: list[tuple[int, int]], out: Tensor) -> Tensor:
    """Row ranges of [h, rows, D] in float32, in `out` [≥ h, ≥ n, D] if they are not that already."""
    if len(ranges) == 1:
        found = keys[:, slice(*ranges[0])]
        return found if keys.dtype == out.dtype else out[: len(keys), : found.shape[1]].copy_(found)
    for head, into in zip(keys, out[: len(keys)], strict=True):
        count = len(scan.load(head, ranges, into))
    return out[: len(keys), :count]


class TopK:
    """The K best keys of every query row so far, with their values. Feed it chunks; order does not matter."""

    def __init__(self, queries: Tensor, top_k: int, arena: Arena | None = None, cancel: Cancel | None = None):
        """`queries` [H, R, D] float32 carry the scale."""
        h, rows, dim = queries.shape
        self.queries = queries
        self.top_k = top_k
        self.arena = arena or Arena()
        self.cancel = cancel or Cancel()
        self.scores = queries.new_full((h, rows, top_k), -torch.inf)  # Unsorted; -inf is padding.
        self.rows = torch.full((h, rows, top_k), -1, dtype=torch.int64, device=queries.device)  # With their base.
        self.values = queries.new_zeros((h, rows, top_k, dim))

    def add(self, chunk: Chunk, scratch_bytes: int = 64 << 20) -> None:
        """Look at every key of the chunk. Time ∝ keys·R·D; scratch ≤ about `scratch_bytes`."""
        count = chunk.size
        if not count:
            return
        h, rows, _ = self.queries.shape
        few = count <= max(_FEW_KEYS, self.top_k * GROUP)
        per_row = 4 * count * (1 if few else 2 / GROUP)
        step = max(1, min(rows, int(scratch_bytes / per_row)))
        # Small products share their overhead by taking all heads at once; large ones take turns to stay in cache.
        group = max(1, min(h, int(scratch_bytes / per_row / step))) if step < 32 else 1
        for head in range(0, h, group):
            for row in range(0, rows, step):
                part = (slice(head, min(head + group, h)), slice(row, min(row + step, rows)))
                (self._add_all if few else self._add_survivors)(chunk, *part)

    def add_candidates(self, chunks: Sequence[Chunk], places: Tensor) -> None:
        """Look only at these rows, in scope or not: [H, R, C] with their chunk's base, -1 is padding, none twice."""
        h, rows, width = places.shape
        step = max(1, _PIECE_ELEMENTS // max(1, width * self.queries.shape[2]))
        for head in range(h):
            for row in range(0, rows, step):
                self.cancel.check()
                part = places[head, row : row + step]
                scores = self._score(chunks, head, slice(row, row + step), part)
                self._keep(chunks, slice(head, head + 1), slice(row, row + step), scores[None], part[None])

    def narrow(self, rows: slice) -> TopK:
        """The same best keys, for some of the query rows: what is added there is added here."""
        part = object.__new__(TopK)
        part.queries, part.top_k, part.arena, part.cancel = self.queries[:, rows], self.top_k, self.arena, self.cancel
        part.scores, part.rows, part.values = self.scores[:, rows], self.rows[:, rows], self.values[:, rows]
        return part

    def keep(self, counts: Tensor) -> None:
        """Forget all but the `counts` [H, R] best keys of every row."""
        order = self.scores.sort(dim=2, descending=True, stable=True).indices
        places = torch.arange(self.top_k, device=order.device).expand_as(order)
        ranks = torch.empty_like(order).scatter_(2, order, places)
        lost = ranks >= counts[..., None]
        self.scores.masked_fill_(lost, -torch.inf)
        self.rows.masked_fill_(lost, -1)

    def partial(self, logit_gap: float | None = None) -> Partial:
        """Softmax over the kept keys: output [H, R, D], lse [H, R]. Drops what is `logit_gap` below the best."""
        if logit_gap is not None:
            lost = self.scores < self.scores.amax(2, keepdim=True) - logit_gap
            self.scores.masked_fill_(lost, -torch.inf)
            self.rows.masked_fill_(lost, -1)
        weights, lse = _softmax(self.scores, dim=2)
        return Partial((weights[:, :, None] @ self.values).squeeze(2), lse)

    def _add_all(self, chunk: Chunk, heads: slice, rows: slice) -> None:
        """Score every key in float32 and sort."""
        queries = self.queries[heads, rows]
        h, count, dim = queries.shape[0], chunk.size, queries.shape[2]
        scores = self.arena.take("table", (h, queries.shape[1], count), torch.float32, queries.device)
        wide = self.arena.take("wide", (count, dim), torch.float32, queries.device)
        for head in range(h):
            self.cancel.check()
            keys = scan.load(chunk.keys[heads.start + head], list(chunk.runs), wide)
            torch.mm(queries[head], keys.T, out=scores[head])
        best = scores.topk(min(self.top_k, scores.shape[2]), dim=2, sorted=False)
        self._keep([chunk], heads, rows, best.values, chunk.rows(best.indices) + chunk.base)

    def _add_survivors(self, chunk: Chunk, heads: slice, rows: slice) -> None:
        """Scan for groups that may matter, then score their keys in float32."""
        queries = self.queries[heads, rows]
        h, r, dim = queries.shape
        maxima, error = scan.group_maxima(chunk, heads, queries, self.arena, self.cancel)
        floor = self.scores[heads, rows].amin(2)
        row, group = scan.survivors(maxima, error, self.top_k, floor)
        counts = torch.bincount(row, minlength=h * r)
        ends = counts.cumsum(0)
        # Rows differ in how many groups they keep (equal keys make many): take as many rows at a time as fit.
        done = 0
        begins = ends - counts
        limits = ends.tolist()
        widths = counts.tolist()
        while done < h * r:
            stop, width = done, 0
            head = done // r
            while stop < (head + 1) * r:
                wider = max(width, widths[stop])
                if stop > done and wider * (stop + 1 - done) * GROUP * dim > _PIECE_ELEMENTS:
                    break
                width, stop = wider, stop + 1
            self.cancel.check()
            low, high = (limits[done - 1] if done else 0), limits[stop - 1]
            if high > low:
                padded = group.new_full((stop - done, width), -1)
                within = torch.arange(low, high, device=row.device) - begins[row[low:high]]
                padded[row[low:high] - done, within] = group[low:high]
                places = padded[:, :, None] * GROUP + torch.arange(GROUP, device=row.device)
                places = places.masked_fill((padded[:, :, None] < 0) | (places >= chunk.size), -1).flatten(1)
                absolute_head = heads.start + head
                absolute = slice(rows.start + done - head * r, rows.start + stop - head * r)
                found = (chunk.rows(places.clamp(min=0)) + chunk.base).masked_fill_(places < 0, -1)
                scores = self._score([chunk], absolute_head, absolute, found)
                self._keep([chunk], slice(absolute_head, absolute_head + 1), absolute, scores[None], found[None])
            done = stop

    def _score(self, chunks: Sequence[Chunk], head: int, rows: slice, places: Tensor) -> Tensor:
        """Exact scores [r, C] of one head's query rows for rows of the chunks; -inf where the place is -1."""
        stored = chunks[0].keys
        wide = self.arena.take("wide", (*places.shape, stored.shape[2]), torch.float32, stored.device)
        flat = wide.view(-1, stored.shape[2])
        for chunk, which, inside in _by_chunk(chunks, places.flatten()):
            shape = (len(inside), stored.shape[2])
            gathered = self.arena.take("gathered", shape, stored.dtype, stored.device)
            torch.index_select(chunk.keys[head], 0, inside, out=gathered)
            if which is None:
                flat.copy_(gathered)
            else:
                flat.index_copy_(0, which, gathered.float())
        scores = (self.queries[head, rows][:, None] @ wide.mT).squeeze(1)
        return scores.masked_fill_(places < 0, -torch.inf)

    def _keep(self, chunks: Sequence[Chunk], heads: slice, rows: slice, scores: Tensor, found: Tensor) -> None:
        """Merge new scores [h, r, C] of places into the best K and fetch the values of those that made it."""
        best = torch.cat([self.scores[heads, rows], scores], dim=2).topk(self.top_k, dim=2, sorted=False).indices
        chosen = torch.zeros(*scores.shape[:2], self.top_k + scores.shape[2], dtype=torch.bool, device=scores.device)
        chosen.scatter_(2, best, True)
        fresh = chosen[:, :, self.top_k :] & (scores != -torch.inf)
        # Only slots that are given up are written: moving the values of all others costs more than everything else
        # where keys come in many chunks. Where padding was chosen, more slots are given up than there is to fill.
        free = ~chosen[:, :, : self.top_k]
        free &= free.cumsum(2) <= fresh.sum(2, keepdim=True)
        head, row, place = fresh.nonzero(as_tuple=True)
        slot = free.nonzero(as_tuple=True)[2]  # As many of every row, in the same order.
        places = found[head, row, place]
        self.scores[heads, rows][head, row, slot] = scores[head, row, place]
        self.rows[heads, rows][head, row, slot] = places
        values = self.values[heads, rows]
        for chunk, which, inside in _by_chunk(chunks, places):
            h, r, s = (head, row, slot) if which is None else (head[which], row[which], slot[which])
            values[h, r, s] = chunk.values[heads][h, inside].float()


def _by_chunk(chunks: Sequence[Chunk], places: Tensor) -> Iterator[tuple[Chunk, Tensor | None, Tensor]]:
    """Places [n] by the chunk they are in: (chunk, which of them or None for all, their rows in it).

    Padding, -1, is taken for any row of the first chunk.
    """
    if len(chunks) == 1:
        yield chunks[0], None, (places - chunks[0].base).clamp_(min=0)
        return
    ordered = sorted(chunks, key=lambda chunk: chunk.base)
    bases = torch.tensor([chunk.base for chunk in ordered], device=places.device)
    owner = (torch.bucketize(places, bases, right=True) - 1).clamp_(min=0)
    order = owner.to(torch.int16).argsort(stable=True)
    counts = owner.bincount(minlength=len(ordered)).tolist()
    for chunk, which in zip(ordered, torch.split(order, counts), strict=True):
        if len(which):
            yield chunk, which, (places[which] - chunk.base).clamp_(min=0)


class Dense:
    """Softmax over every key, streamed: what the keys so far gave, merged with every further block."""

    def __init__(self, queries: Tensor, arena: Arena | None = None, cancel: Cancel | None = None):
        """`queries` [H, R, D] float32 carry the scale."""
        h, rows, dim = queries.shape
        self.queries = queries
        self.arena = arena or Arena()
        self.cancel = cancel or Cancel()
        self._lse = queries.new_full((h, rows), -torch.inf)
        self._output = queries.new_zeros((h, rows, dim))

    def add(self, chunk: Chunk) -> None:
        """Take every key of the chunk in. Time ∝ keys·R·D."""
        h, rows, dim = self.queries.shape
        if rows < _FEW_QUERIES:
            self._add_for_few(chunk)
            return
        size = scan.block_size(rows, dim)
        scratch = self.arena.take("blocks", (2, size, dim), torch.float32, self.queries.device)
        over = attend if self.queries.device.type != "cpu" else _kernel
        for head in range(h):
            for _, ranges in chunk.blocks(size):
                self.cancel.check()
                keys = scan.load(chunk.keys[head], ranges, scratch[0])
                further = over(self.queries[head], keys, scan.load(chunk.values[head], ranges, scratch[1]))
                self._merge(slice(head, head + 1), Partial(further.output[None], further.lse[None]))

    def _add_for_few(self, chunk: Chunk) -> None:
        """The same for a few queries: all scores of many keys first, so that a block is converted, read and forgotten.

        Keys and values then cost two calls a block; one softmax and one merge serve all blocks and heads.
        """
        h, rows, dim = self.queries.shape
        blocks = list(chunk.blocks(max(256, _FEW_ELEMENTS // dim)))
        at_once = max(1, _FEW_SCORES * dim // (h * rows * _FEW_ELEMENTS))
        for start in range(0, len(blocks), at_once):
            part = [ranges for _, ranges in blocks[start : start + at_once]]
            sizes = [sum(stop - start for start, stop in ranges) for ranges in part]
            heads = max(1, _FEW_ELEMENTS // (max(sizes) * dim))
            scratch = self.arena.take("few", (min(heads, h), max(sizes), dim), torch.float32, self.queries.device)
            scores = self.arena.take("few, scores", (h, rows, sum(sizes)), torch.float32, self.queries.device)
            output = self.queries.new_zeros(h, rows, dim)
            groups = [slice(head, min(head + heads, h)) for head in range(0, h, heads)]
            for group in groups:
                self.cancel.check()
                for ranges, score in zip(part, scores[group].split_with_sizes(sizes, 2), strict=True):
                    keys = _loaded(chunk.keys[group], ranges, scratch)
                    torch.bmm(self.queries[group], keys.mT, out=score)
            best = scores.amax(2, keepdim=True)
            weights = scores.sub_(best).exp_()
            for group in groups:
                self.cancel.check()
                for ranges, weight in zip(part, weights[group].split_with_sizes(sizes, 2), strict=True):
                    output[group].baddbmm_(weight, _loaded(chunk.values[group], ranges, scratch))
            total = weights.sum(2, keepdim=True)
            self._merge(slice(0, h), Partial(output.div_(total), (best + total.log()).squeeze(2)))

    def _merge(self, heads: slice, further: Partial) -> None:
        before = self._lse[heads]
        whole = torch.logaddexp(before, further.lse)
        mine, theirs = (before - whole).exp_(), (further.lse - whole).exp_()
        self._output[heads].mul_(mine[..., None]).addcmul_(further.output, theirs[..., None])
        self._lse[heads] = whole

    def narrow(self, rows: slice) -> Dense:
        """The same sums, for some of the query rows: what is added there is added here."""
        part = object.__new__(Dense)
        part.queries, part.arena, part.cancel = self.queries[:, rows], self.arena, self.cancel
        part._lse, part._output = self._lse[:, rows], self._output[:, rows]
        return part

    def partial(self) -> Partial:
        """Output [H, R, D] and lse [H, R]; 0 and -inf if there was no key."""
        return Partial(self._output, self._lse)

    def mass(self, chunk: Chunk, lse: Tensor) -> Tensor:
        """Softmax mass of each key in scope, over heads and rows: [count]. A second pass; needs the final lse."""
        h, rows, dim = self.queries.shape
        size = scan.block_size(rows, dim)
        total = self.queries.new_zeros(chunk.size)
        scratch = self.arena.take("blocks", (size, dim), torch.float32, self.queries.device)
        for head in range(h):
            for first, ranges in chunk.blocks(size):
                self.cancel.check()
                keys = scan.load(chunk.keys[head], ranges, scratch)
                weights = (self.queries[head] @ keys.T - lse[head][:, None]).exp_()
                total[first : first + keys.shape[0]] += weights.sum(0)
        return total

    def masses(self, chunk: Chunk, lse: Tensor, parts: Sequence[slice]) -> Tensor:
        """`mass` of several parts of the rows, which follow each other and are all rows: [parts, count]; one pass."""
        h, rows, dim = self.queries.shape
        size = scan.block_size(rows, dim)
        total = self.queries.new_zeros(len(parts), chunk.size)
        members = self.queries.new_zeros(len(parts), rows)
        for number, part in enumerate(parts):
            members[number, part] = 1
        scratch = self.arena.take("blocks", (size, dim), torch.float32, self.queries.device)
        for head in range(h):
            for first, ranges in chunk.blocks(size):
                self.cancel.check()
                keys = scan.load(chunk.keys[head], ranges, scratch)
                weights = (self.queries[head] @ keys.T).sub_(lse[head][:, None]).exp_()
                total[:, first : first + keys.shape[0]].addmm_(members, weights)
        return total


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; aminmax is one pass, isfinite().all() costs 20 times as much."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())
