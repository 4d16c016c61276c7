"""Small documents for the storage tests, and a check that they are whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from memory_service.storage.catalog import Catalog
from memory_service.storage.parts import PartHeader, PartLayout, SegmentRef, part_ranges
from memory_service.storage.segments import SegmentFiles
from memory_service.storage.staging import Staging
from memory_service.types.conditions import Scalar
from memory_service.types.specs import DType, Fingerprint, MemorySpec

SPEC = MemorySpec(Fingerprint("tiny", "1", "abc", '{"theta":10000.0}'), layers=(1, 3), kv_heads=2, head_dim=8)
KEY = "0123abcd"


@dataclass(frozen=True, eq=False)
class Content:
    """A document's tensors, made from its name alone."""

    keys: Tensor  # [L, H, T, D]
    values: Tensor  # [L, H, T, D]
    token_ids: Tensor  # [T]


def content(document: str, generation: int, tokens: int, spec: MemorySpec = SPEC) -> Content:
    """The same arguments give the same tensors."""
    dice = torch.Generator().manual_seed(hash_of(document, generation))
    shape = (len(spec.layers), spec.kv_heads, tokens, spec.head_dim)
    keys, values = (torch.randn(shape, generator=dice).to(spec.dtype.torch) for _ in range(2))
    return Content(keys, values, torch.randint(0, 2**32, (tokens,), generator=dice))


def hash_of(document: str, generation: int) -> int:
    """A seed; Python's own hash differs from run to run."""
    return int.from_bytes(document.encode()[:4], "little") * 1000 + generation


def stage(
    files: SegmentFiles,
    document: str,
    generation: int,
    tokens: int,
    *,
    spec: MemorySpec = SPEC,
    key: str = KEY,
    ranges: list[tuple[int, int]] | None = None,
    metadata: Mapping[str, Scalar] | None = None,
) -> list[tuple[PartHeader, Staging]]:
    """Staged parts of a document, ready to seal."""
    whole = content(document, generation, tokens, spec)
    parts = ranges or part_ranges(spec, tokens)
    found = []
    for number, (first, count) in enumerate(parts):
        staging = files.stage(key, PartLayout.of(spec, count))
        run = slice(first, first + count)
        staging.fill(whole.keys[:, :, run], whole.values[:, :, run], whole.token_ids[run])
        header = PartHeader(
            document, generation, number, len(parts), first, count, tokens, metadata or {"n": generation}, 1.5, "r"
        )
        found.append((header, staging))
    return found


def check_part(files: SegmentFiles, segment: SegmentRef, index: int, spec: MemorySpec = SPEC, key: str = KEY) -> None:
    """Read a whole part back and compare it with what its document is made of."""
    header = segment.parts[index].header
    whole = content(header.document, header.generation, header.document_tokens, spec)
    run = slice(header.first_token, header.first_token + header.tokens)
    for layer in range(len(spec.layers)):
        keys = files.read_tensor(key, segment, index, "keys", layer, 0, header.tokens)
        values = files.read_tensor(key, segment, index, "values", layer, 0, header.tokens)
        assert torch.equal(keys, whole.keys[layer, :, run]) and torch.equal(values, whole.values[layer, :, run])
    assert torch.equal(files.read_ids(key, segment, index, 0, header.tokens), whole.token_ids[run])


def visible(catalog: Catalog, files: SegmentFiles, key: str = KEY) -> dict[str, int]:
    """Every visible document's generation, after reading all its bytes."""
    segments = {row.pk: row.ref for row in catalog.segments(key)}
    for document in catalog.documents(key):
        headers = [segments[pk].parts[index].header for pk, index in document.parts]
        assert [one.part for one in headers] == list(range(headers[0].parts))
        assert {(one.document, one.generation) for one in headers} == {(document.id, document.generation)}
        assert sum(one.tokens for one in headers) == document.tokens
        for pk, index in document.parts:
            check_part(files, segments[pk], index, key=key)
    return {document.id: document.generation for document in catalog.documents(key)}


def with_dtype(dtype: DType) -> MemorySpec:
    """The tiny spec in another dtype."""
    return MemorySpec(SPEC.fingerprint, SPEC.layers, SPEC.kv_heads, SPEC.head_dim, dtype)
