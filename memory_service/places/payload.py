"""A document's bytes as they are sent: parts of whole tokens, cut into checksummed chunks.

A part of T tokens is keys [L, H, T, D] ‖ values [L, H, T, D] ‖ token ids [T] uint32, little-endian.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from memory_service.checksums import crc32
from memory_service.errors import InvalidArgument
from memory_service.types.documents import Document
from memory_service.types.specs import MemorySpec
from memory_service.types.uploads import Chunk, Upload


def payload_bytes(document: Document) -> int:
    """Bytes of keys, values and token ids."""
    return document.keys.nbytes + document.values.nbytes + 4 * document.tokens


def missing_chunks(document: Document, upload: Upload) -> Iterator[Chunk]:
    """The chunks the service still misses, in order. Copies what is not contiguous."""
    present, planes = -1, list[memoryview]()
    for part, first_chunk, chunks in upload.missing:
        if part != present:
            present, planes = part, _planes(document, part * upload.part_tokens, upload.part_tokens)
        for number in range(first_chunk, first_chunk + chunks):
            data = _slice(planes, number * upload.chunk_bytes, upload.chunk_bytes)
            # Usually a view: the message that carries it copies it, once.
            yield Chunk(part, number * upload.chunk_bytes, crc32(data), cast(bytes, data))


def check_shape(document: Document, spec: MemorySpec) -> None:
    """Raise InvalidArgument unless keys and values are [L, H, T, D] in the spec's dtype, and token ids [T]."""
    tokens = document.keys.shape[2] if document.keys.ndim == 4 else 0
    expected = (len(spec.layers), spec.kv_heads, tokens, spec.head_dim)
    for name, tensor in (("keys", document.keys), ("values", document.values)):
        if tuple(tensor.shape) != expected or not tokens:
            raise InvalidArgument(
                f"{name} must be [{len(spec.layers)} layers, {spec.kv_heads} kv heads, tokens, {spec.head_dim}], "
                f"got {list(tensor.shape)}"
            )
        if tensor.dtype != spec.dtype.torch:
            raise InvalidArgument(f"{name} must be {spec.dtype} like the memory, got {tensor.dtype}")
    if document.token_ids is not None and tuple(document.token_ids.shape) != (tokens,):
        raise InvalidArgument(f"token_ids must be [{tokens}], got {list(document.token_ids.shape)}")


def check_token_ids(token_ids: Tensor | None) -> None:
    """Raise InvalidArgument unless every token id fits the 32 bits it is stored in."""
    if token_ids is not None and token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < 2**32:
        raise InvalidArgument("token_ids must be 0 to 2^32 - 1")


def _planes(document: Document, first_token: int, tokens: int) -> list[memoryview]:
    run = slice(first_token, first_token + tokens)
    keys, values = document.keys[:, :, run], document.values[:, :, run]
    if document.token_ids is None:
        ids = torch.zeros(keys.shape[2], dtype=torch.int32)
    else:
        ids = document.token_ids[run].to(torch.int64).to(torch.uint32)
    return [*_runs(keys), *_runs(values), _bytes(ids)]


def _runs(tensor: Tensor) -> list[memoryview]:
    """The bytes of [L, H, T, D], a head at a time if it is a piece of a longer tensor: so nothing is copied."""
    if tensor.is_contiguous():
        return [_bytes(tensor)]
    return [_bytes(head) for layer in tensor for head in layer]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _slice(planes: list[memoryview], offset: int, length: int) -> bytes | memoryview:
    """Bytes `offset` to `offset + length` of the planes laid end to end; fewer at their end."""
    found = []
    for plane in planes:
        if offset < len(plane) and length > 0:
            found.append(plane[offset : offset + length])
            length -= len(found[-1])
        offset = max(0, offset - len(plane))
    return found[0] if len(found) == 1 else b"".join(found)
