"""What the store must answer, by the plainest definition, and documents made from nothing but a seed.

L layers, H kv heads, G query heads, T tokens, Q queries, D head_dim, N keys in scope, K top_k.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_service import verbs
from memory_service.attention import exact, slabs
from memory_service.errors import FotError
from memory_service.storage import parts, segments
from memory_service.store import cold_tokens, commits, engine
from memory_service.store.store import Store
from memory_service.types.answers import Attended, Partial, TopTokens
from memory_service.types.callers import Cancel, Identity, Role
from memory_service.types.conditions import Scalar
from memory_service.types.documents import Conflict, Document, DocumentInfo
from memory_service.types.operations import Operation, OperationKind, OperationState
from memory_service.types.questions import AttendGroup, AttendOptions, Engine
from memory_service.types.scopes import Scope
from memory_service.types.sessions import SessionAppend
from memory_service.types.specs import DType, Fingerprint, IndexPolicy, MemorySpec

ME = Identity("default", Role.ADMIN)
MODEL = Fingerprint("model", "1")
F32_BAR = 1e-5  # Largest error allowed of output and lse.
BF16_BAR = 1e-3


def spec_of(
    dtype: DType = DType.F32, *, layers: tuple[int, ...] = (3, 7), heads: int = 2, dim: int = 16, factory: str = "none"
) -> MemorySpec:
    return MemorySpec(MODEL, layers, heads, dim, dtype, IndexPolicy(factory))


def tensors(spec: MemorySpec, tokens: int, seed: int | str) -> tuple[Tensor, Tensor]:
    """Keys and values [L, H, T, D] that depend on nothing but their arguments."""
    generator = torch.Generator().manual_seed(hash_of(seed))
    shape = (len(spec.layers), spec.kv_heads, tokens, spec.head_dim)
    keys, values = (torch.randn(shape, generator=generator).to(spec.dtype.torch) for _ in range(2))
    return keys, values


def hash_of(seed: int | str) -> int:
    """The same number in every process, unlike `hash`."""
    return seed if isinstance(seed, int) else int.from_bytes(seed.encode(), "little") % (2**61 - 1)


def document(
    name: str, tokens: int, spec: MemorySpec, seed: int | str, metadata: Mapping[str, Scalar] | None = None
) -> Document:
    """A document whose every byte follows from its arguments; token ids count from 100."""
    keys, values = tensors(spec, tokens, seed)
    return Document(name, keys, values, torch.arange(100, 100 + tokens), metadata or {})


def put(
    store: Store,
    memory: str,
    one: Document,
    *,
    replacing: bool = False,
    request_id: str = "",
    model: Fingerprint = MODEL,
) -> DocumentInfo:
    conflict = Conflict.REPLACE if replacing else Conflict.FAIL
    return store.run(ME, verbs.PutDocument(memory, one, model, conflict, request_id))


def append(store: Store, memory: str, session: str, spec: MemorySpec, keys: Tensor, values: Tensor, first: int) -> None:
    """Tokens for all layers of a session."""
    store.run(ME, verbs.AppendSessions(memory, (SessionAppend(session, spec.layers, first, keys, values),)))


def attend(
    store: Store, memory: str, layer: int, queries: Tensor, scope: Scope | None = None, **options: Any
) -> Attended:
    """Exact unless told otherwise."""
    chosen = replace(AttendOptions(engine=Engine.EXACT), **options)
    return store.run(ME, verbs.Attend(memory, layer, (AttendGroup(scope or Scope(), queries),), chosen))[0]


def finish(store: Store, memory: str, kind: OperationKind) -> Operation:
    """Start an operation and wait for its end."""
    operation = store.run(ME, verbs.StartOperation(memory, kind))
    end = time.monotonic() + 60
    while operation.state is OperationState.RUNNING:
        assert time.monotonic() < end, operation
        time.sleep(0.002)
        operation = store.run(ME, verbs.GetOperation(operation.id))
    return operation


def warm(store: Store, memory: str) -> None:
    """Bring into RAM what the budget allows, now instead of in the background."""
    store._upkeep.warm(store._memories.get(ME.tenant, memory), Cancel())


# --- The definition -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Tokens a query may see: one layer's keys and values [H, N, D] of a document or session."""

    name: str
    keys: Tensor
    values: Tensor


def reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    top_k: int = 0,
    scale: float | None = None,
    logit_gap: float | None = None,
    precision: torch.dtype = torch.float32,
) -> Partial:
    """Softmax over all keys or over the top k: queries [G, Q, D], keys and values [H, N, D]; GQA by repetition."""
    scores = scores_of(queries, keys, scale, precision)
    if top_k:
        best = scores.topk(min(top_k, scores.shape[2]), dim=2)
        scores = torch.full_like(scores, -torch.inf).scatter(2, best.indices, best.values)
    if logit_gap is not None and scores.shape[2]:
        scores = scores.masked_fill(scores < scores.amax(2, keepdim=True) - logit_gap, -torch.inf)
    lse = scores.logsumexp(2)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return Partial(weights @ values.to(precision).repeat_interleave(queries.shape[0] // values.shape[0], 0), lse)


def scores_of(
    queries: Tensor, keys: Tensor, scale: float | None = None, precision: torch.dtype = torch.float32
) -> Tensor:
    """[G, Q, N]"""
    wide = keys.to(precision).repeat_interleave(queries.shape[0] // keys.shape[0], 0)
    return queries.to(precision) @ wide.mT * (keys.shape[2] ** -0.5 if scale is None else scale)


def error(answer: Attended | Partial, expected: Partial) -> float:
    """The largest difference of output and lse; infinite where they differ in what is finite or NaN."""
    found = (answer.output, answer.lse)
    worst = 0.0
    for have, want in zip(found, expected, strict=True):
        assert have.shape == want.shape, (have.shape, want.shape)
        same = have == want
        difference = (have.double() - want.double()).abs().masked_fill(same, 0).nan_to_num(nan=torch.inf)
        worst = max(worst, float(difference.max()) if difference.numel() else 0.0)
    return worst


def bar(dtype: DType) -> float:
    return F32_BAR if dtype is DType.F32 else BF16_BAR


def check_exact(
    store: Store,
    memory: str,
    spec: MemorySpec,
    sources: Sequence[Source],
    scope: Scope,
    queries: Tensor,
    *,
    layer: int,
    top_k: int = 0,
    note: object = "",
) -> None:
    """Hold an exact answer, its coverage, its top tokens and its attribution to the definition."""
    heads, dim = spec.kv_heads, spec.head_dim
    empty = torch.zeros(heads, 0, dim, dtype=spec.dtype.torch)
    keys = torch.cat([empty, *(one.keys for one in sources)], dim=1)
    values = torch.cat([empty, *(one.values for one in sources)], dim=1)
    answer = attend(store, memory, layer, queries, scope, top_k=top_k, tokens=bool(top_k), attribution=True)
    expected = reference(queries, keys, values, top_k=top_k)
    wrong = error(answer, expected)
    assert wrong <= bar(spec.dtype), (note, wrong)
    assert answer.coverage.searched == answer.coverage.in_scope == keys.shape[1], note
    assert answer.attribution is not None
    masses = {one.source: one.mass for one in answer.attribution}
    assert sum(masses.values()) == pytest.approx(1 if sources else 0, abs=1e-4), note
    if top_k:
        assert answer.tokens is not None
        check_top_tokens(answer.tokens, sources, scores_of(queries, keys), top_k, note)


def check_top_tokens(top: TopTokens, sources: Sequence[Source], scores: Tensor, top_k: int, note: object = "") -> None:
    """The tokens reported are the best k, each once, with their own scores, and weights that sum to 1."""
    starts, total = {}, 0
    for one in sources:
        starts[one.name] = total
        total += one.keys.shape[1]
    count = min(top_k, total)
    assert (top.source[..., count:] == -1).all(), note
    assert (top.offset[..., count:] == -1).all(), note
    assert (top.weight[..., count:] == 0).all(), note
    if not count:
        return
    begin = torch.tensor([starts[name] for name in top.sources])
    place = begin[top.source[..., :count].long()] + top.offset[..., :count]  # [G, Q, count]
    assert (place.sort(2).values.diff(dim=2) > 0).all(), f"{note}: a token was counted twice"
    own = scores.gather(2, place)
    best = scores.topk(count, dim=2).values
    assert torch.allclose(own, top.score[..., :count], atol=1e-4), f"{note}: a token has another token's score"
    assert torch.allclose(own.sort(2, descending=True).values, best, atol=1e-4), f"{note}: not the best {count}"
    assert torch.allclose(top.weight.sum(2), torch.ones(()), atol=1e-4), note


# --- Small pieces ---------------------------------------------------------------------------------------------------


@contextmanager
def everything_in_small_pieces(token_bytes: int) -> Iterator[None]:
    """Slabs, parts, disk reads and cold chunks of a few dozen tokens, and no short cut for few keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabs, "_FIRST_ROWS", 16)
        patch.setattr(slabs, "_SLAB_BYTES", 96 * token_bytes)
        patch.setattr(cold_tokens, "_PIECE_BYTES", 40 * token_bytes)
        patch.setattr(engine, "_COLD_BYTES", 56 * token_bytes)
        patch.setattr(exact, "_FEW_KEYS", 0)
        patch.setattr(parts, "PART_BYTES", 72 * (token_bytes + 4))
        patch.setattr(segments, "SMALL_PART_BYTES", 48 * token_bytes)
        patch.setattr(commits, "_BATCH_DOCUMENTS", 4)
        yield


def refused(store: Store, verb: verbs.Verb[Any]) -> FotError:
    """The error a verb ends with."""
    with pytest.raises(FotError) as caught:
        store.run(ME, verb)
    return caught.value


def names(infos: Iterable[DocumentInfo]) -> list[str]:
    return [one.id for one in infos]
