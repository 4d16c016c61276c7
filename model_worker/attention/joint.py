"""Attention in which rows of a batch also read each other's keys, in one softmax: how a Focused Transformer is trained.

Rows that read the same rows are worked off together, over one copy of the keys they share. Neither forwards nor
backwards is there ever a matrix of the batch's queries by the batch's keys.

B batch rows, H query heads, K key/value heads (query head h reads h // (H // K)), n queries, D head_dim;
R rows that can be read, of m keys each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memory_service import Partial
from memory_service.errors import InvalidArgument
from model_worker.attention import part
from model_worker.attention.part import Rule


def joint(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    reads: Sequence[Sequence[int]],
    scale: float,
    *,
    far_query: Tensor | None = None,
    memory_value: Tensor | None = None,
    softcap: float | None = None,
    sliding: int | None = None,
    retrieved: int | None = None,
) -> Tensor:
    """Causal attention of every row to its own keys and, in the same softmax, to all keys of the rows it reads.

    query [B, H, n, D]; key, value and memory_key [B, K, n, D] → [B, H, n, D] in the query's dtype. `memory_key` is how
    a row's keys look to others (un-rotated), `far_query` how queries look at them (None: as in their own row);
    `reads[b]` names the rows that row b reads, not itself. Gradients flow into what is read. `sliding` bounds only what
    a query sees of its own row. With `retrieved`, each query and head reads only so many keys of others, its best.
    With `memory_value`, the rows that can be read are others: memory_key and memory_value [R, K, m, D].

    Computes in float32, or float64 if that is what it gets. Beyond its results it holds one copy of the keys that one
    set of rows reads, and a block of scores. Its gradient cannot be differentiated again.
    """
    readers = _readers(reads, len(query), None if memory_value is not None else len(memory_key), len(memory_key))
    if retrieved is not None and retrieved < 1:
        raise InvalidArgument(f"retrieved must be ≥ 1 key a query, got {retrieved}; for none, let nobody read")
    own = Rule(scale, softcap, causal=True, sliding=sliding)
    far = Rule(scale, softcap, retrieved=retrieved)
    return cast(
        Tensor,
        _Joint.apply(  # type: ignore[no-untyped-call]
            query,
            query if far_query is None else far_query,
            key,
            value,
            memory_key,
            value if memory_value is None else memory_value,
            readers,
            own,
            far,
        ),
    )


@torch.no_grad()
def shares(
    query: Tensor,
    key: Tensor,
    memory_key: Tensor,
    reads: Sequence[Sequence[int]],
    scale: float,
    *,
    far_query: Tensor | None = None,
    softcap: float | None = None,
) -> list[Tensor]:
    """How much of its attention each query of `joint` gives to each row it reads: per row b, [H, n, len(reads[b])].

    What is missing to 1 went to the row's own keys.
    """
    far = query if far_query is None else far_query
    own = _lse(query, key, Rule(scale, softcap, causal=True))
    told = []
    for row, read in enumerate(reads):
        lses = [own[row]]
        for other in read:
            lses.append(_lse(far[row : row + 1], memory_key[other : other + 1], Rule(scale, softcap))[0])
        told.append(torch.stack(lses, -1).softmax(-1)[..., 1:])
    return told


def _lse(query: Tensor, key: Tensor, rule: Rule) -> Tensor:
    query, key = _working(query, key)
    return part.forward(query, key, key, rule).lse


class _Readers(NamedTuple):
    """Rows that read the same rows."""

    rows: list[int]
    read: list[int]


def _readers(reads: Sequence[Sequence[int]], rows: int, own: int | None, readable: int) -> list[_Readers]:
    """Rows by what they read; those that read nothing are left out. `own`: rows that are their own memory."""
    if len(reads) != rows or own not in (None, rows):
        raise InvalidArgument(f"there must be reads for each of {rows} rows, got {len(reads)} (and {readable} to read)")
    together: dict[frozenset[int], list[int]] = {}
    for row, read in enumerate(reads):
        some = frozenset(read)
        if len(some) != len(read) or (own is not None and row in some):
            raise InvalidArgument(f"a row reads other rows, each once; row {row} would read {sorted(read)}")
        if some and not 0 <= min(some) <= max(some) < readable:
            raise InvalidArgument(f"row {row} would read {sorted(read)}, of {readable} rows")
        together.setdefault(some, []).append(row)
    return [_Readers(readers, sorted(read)) for read, readers in together.items() if read]


class _Joint(torch.autograd.Function):
    """`joint` with its gradient; parts are merged by their lse."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        far_query: Tensor,
        key: Tensor,
        value: Tensor,
        memory_key: Tensor,
        memory_value: Tensor,
        readers: list[_Readers],
        own: Rule,
        far: Rule,
    ) -> Tensor:
        tensors = (query, far_query, key, value, memory_key, memory_value)
        ctx.readers, ctx.own, ctx.far = readers, own, far
        with torch.autocast(query.device.type, enabled=False):
            near_query, far_query, key, value, memory_key, memory_value = _working(*tensors)
            output, lse = part.forward(near_query, key, value, own)
            for rows, read in _indexed(readers, query.device):
                queries = _in_a_row(far_query, rows)
                found = part.forward(queries, _in_a_row(memory_key, read), _in_a_row(memory_value, read), far)
                found = Partial(_as_rows(found.output, len(rows)), _as_rows(found.lse, len(rows)))
                before = lse[rows]
                whole = torch.logaddexp(before, found.lse)
                kept = output[rows].mul_((before - whole).exp_()[..., None])
                output[rows] = kept.addcmul_(found.output, (found.lse - whole).exp_()[..., None])
                lse[rows] = whole
        ctx.save_for_backward(*tensors, output, lse)
        return output.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, output, lse = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            query, far_query, key, value, memory_key, memory_value = _working(*tensors)
            grad = grad.to(query.dtype)
            to_query, to_key, to_value = part.backward(grad, query, key, value, Partial(output, lse), ctx.own)
            gradients: list[Tensor | None] = [to_query, None, to_key, to_value, None, None]
            if ctx.readers:
                to_far, to_memory_key, to_memory_value = map(torch.zeros_like, (far_query, memory_key, memory_value))
                for rows, read in _indexed(ctx.readers, grad.device):
                    to_queries, to_keys, to_values = part.backward(
                        _in_a_row(grad, rows),
                        _in_a_row(far_query, rows),
                        _in_a_row(memory_key, read),
                        _in_a_row(memory_value, read),
                        Partial(_in_a_row(output, rows), _in_a_row(lse, rows)),
                        ctx.far,
                    )
                    to_far[rows] = _as_rows(to_queries, len(rows))
                    to_memory_key.index_add_(0, read, _as_rows(to_keys, len(read)))
                    to_memory_value.index_add_(0, read, _as_rows(to_values, len(read)))
                gradients = [to_query, to_far, to_key, to_value, to_memory_key, to_memory_value]
        typed = [None if one is None else one.to(its.dtype) for one, its in zip(gradients, tensors, strict=True)]
        return *typed, None, None, None


def _working(*tensors: Tensor) -> list[Tensor]:
    """All in the dtype to compute in, which what arrives in half precision does not have."""
    widest = torch.float32
    for one in tensors:
        widest = torch.promote_types(widest, one.dtype)
    return [one.to(widest) for one in tensors]


def _indexed(readers: list[_Readers], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for rows, read in readers:
        yield torch.tensor(rows, device=device), torch.tensor(read, device=device)


def _in_a_row(x: Tensor, rows: Tensor) -> Tensor:
    """These rows one after the other: [B, heads, n, …] to [1, heads, rows * n, …]."""
    return x[rows].transpose(0, 1).flatten(1, 2)[None]


def _as_rows(x: Tensor, count: int) -> Tensor:
    """Back again: [1, heads, rows * n, …] to [rows, heads, n, …]."""
    return x.view(x.shape[1], count, -1, *x.shape[3:]).transpose(0, 1)
