"""Between a scope and the indexes that cover part of it: what they may return, where it lies, what they miss.

H kv heads, R query rows, D head_dim, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memory_service.attention.provenance import Provenance
from memory_service.attention.scan import Chunk
from memory_service.attention.slabs import Run, Slab, join
from memory_service.index.factories import default_candidates
from memory_service.index.unit import IndexUnit
from memory_service.store.live_document import LiveDocument
from memory_service.store.live_memory import LiveMemory
from memory_service.store.plans import Plan
from memory_service.types.questions import AttendOptions

_GAP = 256  # Cold tokens nearer than this to each other are read in one go.
_COLD = -1


@dataclass(frozen=True, slots=True, eq=False)
class _Cover:
    """How a unit's ids map to the tokens of a plan."""

    allowed: np.ndarray | None  # Packed bits of the ids in scope, little bit order; None: all.
    first: np.ndarray  # First id of every span, ascending.
    slab: np.ndarray  # Which of `slabs`, or _COLD.
    row: np.ndarray  # Row of the span's first id in its slab, or token in its document.
    document: np.ndarray  # Which of `documents`.
    slabs: list[Slab]
    documents: list[LiveDocument | None]


def covered(plan: Plan) -> int:
    """Tokens of the plan that its indexes cover."""
    if "covered" not in plan.notes:
        plan.notes["covered"] = sum(
            one.tokens for unit in plan.units for one in unit.documents if one.pk in plan.documents
        )
    known = plan.notes["covered"]
    assert isinstance(known, int)
    return known


def tail(memory: LiveMemory, plan: Plan) -> Plan:
    """The part of the plan no index covers; it is scanned exactly."""
    if "tail" not in plan.notes:
        inside = {one.pk for unit in plan.units for one in unit.documents}
        rest = {pk: document for pk, document in plan.documents.items() if pk not in inside}
        runs: dict[Slab, list[Run]] = {}
        for document in rest.values():
            for slab, run in document.spans:
                runs.setdefault(slab, []).append(run)
        cold = tuple(document for document in rest.values() if not document.spans)
        tokens = sum(document.row.tokens for document in rest.values())
        plan.notes["tail"] = Plan(tuple((slab, join(found)) for slab, found in runs.items()), cold, rest, tokens, ())
    known = plan.notes["tail"]
    assert isinstance(known, Plan)
    return known


def candidates(
    memory: LiveMemory,
    plan: Plan,
    unit: IndexUnit,
    layer: int,
    queries: Tensor,
    options: AttendOptions,
    provenance: Provenance,
) -> tuple[list[Chunk], Tensor]:
    """What the index would look at, to be scored exactly: chunks, and rows of them with their base, -1 for none.

    The rows are [H, R, C].
    """
    cover = _cover(plan, unit)
    search = {name: value for name, value in options.search.items() if name != "candidates"}
    usual = default_candidates(unit.factory, queries.shape[2], options.top_k)
    wanted = max(options.top_k, int(options.search.get("candidates", usual)))
    flat = queries.cpu().numpy()
    ids = np.stack(
        [unit.search(layer, head, flat[head], wanted, search, cover.allowed) for head in range(queries.shape[0])]
    )
    place = np.searchsorted(cover.first, ids, side="right") - 1
    slab = np.where(ids >= 0, cover.slab[place], _COLD - 1)
    chunks: list[Chunk] = []
    bases = np.zeros(len(cover.slabs), np.int64)
    for number in np.unique(slab[slab >= 0]):
        target = cover.slabs[number]
        chunks.append(target.chunk(layer, ((0, max(target.used)),), provenance.base(target.locate)))
        bases[number] = chunks[-1].base
    found = np.full(ids.shape, -1, np.int64)
    warm = slab >= 0
    found[warm] = (ids - cover.first[place] + cover.row[place])[warm] + bases[slab[warm]]
    if (slab == _COLD).any():
        here = slab == _COLD
        document = np.where(here, cover.document[place], -1)
        token = np.where(here, ids - cover.first[place] + cover.row[place], -1)
        chunk, rows = _gather_cold(memory, cover, layer, document, token, provenance, queries.device)
        chunks.append(chunk)
        found[here] = rows[here] + chunk.base
    return chunks, torch.from_numpy(found).to(queries.device)


def _cover(plan: Plan, unit: IndexUnit) -> _Cover:
    key = f"cover:{unit.name}"
    if key not in plan.notes:
        plan.notes[key] = _make_cover(plan, unit)
    known = plan.notes[key]
    assert isinstance(known, _Cover)
    return known


def _make_cover(plan: Plan, unit: IndexUnit) -> _Cover:
    slabs: dict[Slab, int] = {}
    documents: list[LiveDocument | None] = []
    spans: list[tuple[int, int, int, int]] = []  # First id, slab, row, document.
    bits = np.zeros(unit.tokens, np.uint8)
    for start, one in zip(unit.starts.tolist(), unit.documents, strict=False):
        document = plan.documents.get(one.pk)
        documents.append(document)
        if document is None:
            spans.append((start, _COLD, 0, len(documents) - 1))
            continue
        bits[start : start + one.tokens] = 1
        if not document.spans:
            spans.append((start, _COLD, 0, len(documents) - 1))
        for slab, run in document.spans:
            spans.append((start, slabs.setdefault(slab, len(slabs)), run[0], len(documents) - 1))
            start += run[1] - run[0]
    table = np.array(spans, np.int64).reshape(-1, 4)
    allowed = None if bits.all() else np.packbits(bits, bitorder="little")
    return _Cover(allowed, table[:, 0], table[:, 1], table[:, 2], table[:, 3], list(slabs), documents)


def _gather_cold(
    memory: LiveMemory,
    cover: _Cover,
    layer: int,
    document: np.ndarray,
    token: np.ndarray,
    provenance: Provenance,
    device: torch.device,
) -> tuple[Chunk, np.ndarray]:
    """Read the tokens some index rows point to: a chunk of them and their rows in it, shaped like `token`."""
    valid = token >= 0
    wanted = np.unique(np.stack([document[valid], token[valid]], axis=1), axis=0)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    names: list[str] = []
    for number in np.unique(wanted[:, 0]):
        source = cover.documents[number]
        assert source is not None, "the selector keeps documents out of scope away"
        tokens = wanted[wanted[:, 0] == number, 1]
        names.append(source.row.id)
        for run in np.split(tokens, np.flatnonzero(np.diff(tokens) > _GAP) + 1):
            for first, k, v in memory.read_cold(source, layer, int(run[0]), int(run[-1] - run[0]) + 1):
                inside = torch.from_numpy(run[(run >= first) & (run < first + k.shape[1])] - first)
                keys.append(k[:, inside])
                values.append(v[:, inside])
    numbers = np.unique(wanted[:, 0])

    def locate(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
        return np.searchsorted(numbers, wanted[rows, 0]), wanted[rows, 1], names

    # `wanted` is sorted by document, then token, and was read in that order: a pair's place is its row.
    pairs = (wanted[:, 0] << 40) + wanted[:, 1]
    found = np.where(valid, np.searchsorted(pairs, (document << 40) + token), -1)
    both = torch.cat(keys, dim=1).to(device), torch.cat(values, dim=1).to(device)
    norms = torch.full((both[0].shape[0],), torch.inf, device=device)  # Candidates need no bound.
    return Chunk(*both, ((0, len(wanted)),), norms, provenance.base(locate)), found
