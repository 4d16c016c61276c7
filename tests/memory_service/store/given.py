"""What the tests of this room begin with."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from memory_service import verbs
from memory_service.settings import StoreOptions
from memory_service.storage.parts import PartLayout
from memory_service.store.store import Store
from memory_service.types.callers import Identity, Role
from memory_service.types.documents import Document
from memory_service.types.uploads import Chunk
from tests.memory_service.oracle import (
    ME,
    MODEL,
    document,
    names,
    spec_of,
)

SPEC = spec_of()
OTHER = Identity("other", Role.ADMIN)
OPTIONS = StoreOptions(background=False)
QUERIES = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(5))
A = document("a", 5, SPEC, "a", {"n": 1, "kind": "x"})
B = document("b", 7, SPEC, "b", {"n": 2})


def ids(store: Store, **narrowed: Any) -> list[str]:
    return names(store.run(ME, verbs.ListDocuments("m", **narrowed)).items)


def chunks(one: Document) -> list[Chunk]:
    """A one-part document as it travels."""
    layout = PartLayout.of(SPEC, one.tokens)
    assert one.token_ids is not None
    tensors = (one.keys, one.values, one.token_ids.to(torch.int32))
    payload = b"".join(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)
    assert len(payload) == layout.nbytes
    pieces = [(at, payload[at : at + (1 << 20)]) for at in range(0, len(payload), 1 << 20)]
    return [Chunk(0, at, zlib.crc32(piece), piece) for at, piece in pieces]


def begin(one: Document, **more: Any) -> verbs.BeginUpload:
    return verbs.BeginUpload("m", one.id, one.tokens, MODEL, one.metadata, **more)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)
