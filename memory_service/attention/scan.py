"""Which keys can belong to the top k: one pass over all keys that only keeps the best score of every 16.

A full sort of the scores would cost more than computing them. So keys are scored block by block while the block is in
cache, only the maximum of each group of 16 neighbours is written down, and a group survives if its maximum, raised by
a proven bound on the rounding error, reaches the k-th highest lowered by it. Survivors are scored again in float32 by
the caller: the result is the exact top k, whatever arithmetic did the scan.

H heads, n keys, R query rows, D head_dim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from memory_service.types.callers import Cancel

GROUP = 16  # Keys whose best score is kept.
FEW_ROWS = 16  # Below this many query rows, keys stand on the right of the product.
BLOCK_ELEMENTS = 1 << 20  # Keys of a block times max(R, D): what stays in a core's cache between the two passes.
_BF16_UNIT = 2.0**-8  # Relative rounding error of a bfloat16.
_F32_UNIT = 2.0**-24


class Chunk(NamedTuple):
    """Keys and values that lie in one pair of tensors, and which of their rows are in scope."""

    keys: Tensor  # [H, rows, D] as stored
    values: Tensor  # [H, rows, D]
    runs: tuple[tuple[int, int], ...]  # Half-open row ranges in scope, ascending.
    largest_norm: Tensor  # [H] float32, at least the norm of every key.
    base: int = 0  # Added to a row to tell it from the rows of other chunks.

    @property
    def size(self) -> int:
        """Keys in scope."""
        return sum(stop - start for start, stop in self.runs)

    def rows(self, positions: Tensor) -> Tensor:
        """Rows of the tensors at these positions: places in the runs laid end to end."""
        if len(self.runs) == 1:
            return positions + self.runs[0][0]
        starts = torch.tensor([start for start, _ in self.runs], device=positions.device)
        lengths = torch.tensor([stop - start for start, stop in self.runs], device=positions.device)
        begins = lengths.cumsum(0) - lengths
        run = torch.bucketize(positions, begins, right=True) - 1
        return positions + (starts - begins)[run]

    def blocks(self, size: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """The runs cut into blocks of `size` keys (the last may be shorter): (first position, row ranges)."""
        ranges: list[tuple[int, int]] = []
        first = room = 0
        room = size
        for start, stop in self.runs:
            while start < stop:
                take = min(room, stop - start)
                ranges.append((start, start + take))
                start += take
                room -= take
                if not room:
                    yield first, ranges
                    first, ranges, room = first + size, [], size
        if ranges:
            yield first, ranges


class Arena:
    """Working memory that outlives a call: fresh pages would cost as much as the arithmetic. One thread at a time."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, the same memory for the same name: what it held before is gone."""
        elements = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < elements or buffer.dtype != dtype or buffer.device != device:
            self._buffers[name] = buffer = torch.empty(elements, dtype=dtype, device=device)
        return buffer[:elements].view(shape)


def load(keys: Tensor, ranges: list[tuple[int, int]], out: Tensor) -> Tensor:
    """Row ranges of [rows, D] side by side, converted to the dtype of `out`: a view of them if that is all it takes.

    Else they are copied into `out` [≥ n, D]. Not to be written to.
    """
    if len(ranges) == 1 and keys.dtype == out.dtype:
        return keys[slice(*ranges[0])]
    filled = 0
    for start, stop in ranges:
        out[filled : filled + stop - start].copy_(keys[start:stop])
        filled += stop - start
    return out[:filled]


def block_size(rows: int, dim: int) -> int:
    """Keys of one block: a multiple of GROUP²."""
    size = BLOCK_ELEMENTS // max(rows, dim)
    return min(max(size // 256 * 256, 512), 16_384)


def group_maxima(chunk: Chunk, heads: slice, queries: Tensor, arena: Arena, cancel: Cancel) -> tuple[Tensor, Tensor]:
    """The best score of every GROUP consecutive positions: [h, groups, R], padded with -inf to a multiple of GROUP.

    `queries` [h, R, D] float32 carry the scale. Valid until the arena is used again. Also returns [h, R]: how far a
    score may be from the exact one, not counting the rounding of the score itself when the scan ran in bfloat16 (see
    `widened`).
    """
    keys = chunk.keys[heads]
    h, rows, dim = queries.shape
    supers = -(-chunk.size // (GROUP * GROUP))
    fast = scans_in_bf16(keys.dtype, keys.device.type, dim, rows)
    kind = torch.bfloat16 if fast else torch.float32
    size = block_size(rows, dim)
    turned = queries.to(kind).mT.contiguous()  # [h, D, R]
    maxima = arena.take("maxima", (h, supers * GROUP, rows), kind, keys.device)
    maxima[:, -(-chunk.size // GROUP) :] = -torch.inf
    scratch = arena.take("keys", (size, dim), kind, keys.device)
    scores = arena.take("scores", (size * rows,), kind, keys.device)
    for first, ranges in chunk.blocks(size):
        cancel.check()
        for head in range(h):
            if len(ranges) == 1 and keys.dtype == kind:
                block = keys[head, ranges[0][0] : ranges[0][1]]
            else:
                block = load(keys[head], ranges, scratch)
            groups = maxima[head, first // GROUP : -(-(first + block.shape[0]) // GROUP)]
            _score_groups(block, turned[head], scores, groups)
    norm = chunk.largest_norm[heads][:, None].to(keys.device)
    # Summation order: twice (the scan's and the exact score's) the classical bound for a dot product of D terms.
    error = 2 * (dim + 2) * _F32_UNIT * queries.norm(dim=-1) * norm
    if fast:
        error = error + (queries - turned.mT.float()).norm(dim=-1) * norm
    return maxima, error


def _score_groups(keys: Tensor, queries: Tensor, scores: Tensor, out: Tensor) -> None:
    """Best scores of keys [n, D] for queries [D, R] by groups of GROUP: out [groups, R]. `scores` is scratch."""
    n, rows = keys.shape[0], queries.shape[1]
    groups = out.shape[0]
    padded = groups * GROUP
    if rows >= FEW_ROWS:
        table = scores[: padded * rows].view(padded, rows)
        torch.mm(keys, queries, out=table[:n] if n < padded else table)
        if n < padded:
            table[n:] = -torch.inf
        torch.amax(table.view(groups, GROUP, rows), 1, out=out)
    else:
        table = scores[: rows * padded].view(rows, padded)
        if n < padded:
            table[:, :n] = queries.T @ keys.T
            table[:, n:] = -torch.inf
        else:
            torch.mm(queries.T, keys.T, out=table)
        out.copy_(table.view(rows, groups, GROUP).amax(2).T)


def widened(maxima: Tensor, error: Tensor, sign: int) -> Tensor:
    """Bounds on the exact best scores of groups: above with sign 1, below with sign -1. Float32."""
    exact = maxima.float()
    if maxima.dtype == torch.bfloat16:
        # The scan rounded its scores as well: |exact - rounded| ≤ |rounded| · u / (1 - u).
        exact = exact + sign * exact.abs() * (_BF16_UNIT / (1 - _BF16_UNIT))
        exact = exact.masked_fill(maxima == -torch.inf, -torch.inf)
    return exact + sign * error


def survivors(maxima: Tensor, error: Tensor, top_k: int, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Groups that may hold one of the top k of their query row.

    maxima [h, groups, R] and error [h, R] of `group_maxima`; floor [h, R]: a score the k-th best is known to reach.
    Returns (rows, groups), both [P] int64: pairs in ascending order of row, rows counting h·R.
    """
    h, groups, queries = maxima.shape
    supers = maxima.view(h, groups // GROUP, GROUP, queries)
    best = supers.amax(2).mT.contiguous()  # [h, R, supers]
    # Any k groups' lower bounds hold k different keys: the k-th highest of them is a floor for the k-th best score.
    # A tight one needs many more groups than k, else good keys share a group and their seconds are not seen.
    if best.shape[2] >= 4 * top_k:
        level = best.topk(top_k, dim=2, sorted=False).values.amin(2)
    elif groups >= top_k:
        level = maxima.topk(top_k, dim=1, sorted=False).values.amin(1)
    else:
        level = torch.full_like(error, -torch.inf)
    floor = torch.maximum(widened(level, error, -1), floor)
    head, row, over = (widened(best, error[..., None], 1) >= floor[..., None]).nonzero(as_tuple=True)
    inside = supers[head, over, :, row]  # [P, GROUP]
    keep = widened(inside, error[head, row][:, None], 1) >= floor[head, row][:, None]
    keep &= inside > -torch.inf
    pair, within = keep.nonzero(as_tuple=True)
    return head[pair] * queries + row[pair], over[pair] * GROUP + within


def scans_in_bf16(stored: torch.dtype, device: str, dim: int, rows: int) -> bool:
    """Whether scanning in bfloat16 is faster here. Only keys stored as bfloat16 are: they are exact in it."""
    if stored != torch.bfloat16 or device != "cpu":
        return False  # On CUDA float32 accumulation and output need float32 operands.
    return _bf16_is_faster(dim, 1 << min(max(rows - 1, 0).bit_length(), 9))


@lru_cache(maxsize=64)
def _bf16_is_faster(dim: int, rows: int) -> bool:
    """Time both on one block, once for every shape: it depends on the CPU (AVX512-BF16, AMX) and not on its name."""
    keys = torch.ones(block_size(rows, dim), dim, dtype=torch.bfloat16)
    queries = torch.ones(dim, rows)
    wide = torch.empty(keys.shape)

    def in_bf16() -> None:
        (keys @ queries.bfloat16()).view(-1, GROUP, rows).amax(1)

    def in_f32() -> None:
        (wide.copy_(keys) @ queries).view(-1, GROUP, rows).amax(1)

    def best_of(work: object, times: int) -> float:
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            work()  # type: ignore[operator]
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    best_of(in_f32, 1), best_of(in_bf16, 1)
    return best_of(in_bf16, 3) < best_of(in_f32, 3)
