"""What processes hold, compared and copied: the parts that healing and moving share. Blocking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from memory_service.errors import NotFound, Superseded
from memory_service.places.remote import RemotePlace
from memory_service.shards import ShardMap, stamp_at
from memory_service.types.documents import Conflict, Deleted, Document, DocumentInfo
from memory_service.types.listings import Page
from memory_service.types.memories import MemoryInfo
from memory_service.types.specs import MemorySpec
from memory_service.verbs import (
    DeleteDocument,
    Fetch,
    GetDocument,
    ListDeleted,
    ListDocuments,
    ListMemories,
    PutDocument,
    Verb,
)

Item = TypeVar("Item")

CALL_S = 60.0
UPLOAD_BYTES_PER_S = 8 << 20
_PAGE = 1000
_PIECE_BYTES = 32 << 20  # Of keys and values fetched in one call.
_CLOCKS_S = 5.0  # By how much the clocks of clients may differ.


@dataclass(frozen=True, slots=True)
class Holding:
    """What one process holds of one memory."""

    alive: Mapping[str, DocumentInfo] = field(default_factory=dict)
    dead: Mapping[str, int] = field(default_factory=dict)  # Document -> the last generation that is deleted.

    def newest(self, document: str) -> int:
        """The last generation it has heard of."""
        known = self.alive.get(document)
        return max(known.generation if known else 0, self.dead.get(document, 0))


def every(place: RemotePlace, ask: Callable[[str], Verb[Page[Item]]]) -> list[Item]:
    """All items of a listing."""
    page = place.run(ask(""), CALL_S)
    found = list(page.items)
    while page.next:
        page = place.run(ask(page.next), CALL_S)
        found += page.items
    return found


def memories_at(place: RemotePlace) -> dict[str, MemoryInfo]:
    """A process's memories by name."""
    return {one.name: one for one in every(place, lambda token: ListMemories(_PAGE, token))}


def holding(place: RemotePlace, memory: str) -> Holding:
    """What a process holds of a memory; nothing if it does not know it."""
    try:
        # Deletions first: a document that is deleted in between is then alive nowhere and dead somewhere.
        dead: list[Deleted] = every(place, lambda token: ListDeleted(memory, _PAGE, token))
        alive: list[DocumentInfo] = every(place, lambda token: ListDocuments(memory, None, _PAGE, token))
    except NotFound:
        return Holding()
    return Holding({one.id: one for one in alive}, {one.id: one.generation for one in dead})


def predates(document: DocumentInfo, memory: MemoryInfo) -> bool:
    """Whether a document is of a memory of the same name that was deleted before this one was created."""
    stamped = document.generation >= stamp_at(1e9)
    return stamped and document.generation < stamp_at(memory.created_at - _CLOCKS_S)


def copy(
    source: RemotePlace, target: RemotePlace, memory: str, spec: MemorySpec, info: DocumentInfo, generation: int
) -> int:
    """Copy a document, bit for bit, as this generation; the bytes copied. 0 if it changed meanwhile, on either side."""
    try:
        document = _fetched(source, memory, spec, info)
        # Its layers came one by one: of two states of it they would be nobody's document.
        if source.run(GetDocument(memory, info.id), CALL_S).generation != info.generation:
            return 0
    except NotFound:
        return 0
    put = PutDocument(memory, document, spec.fingerprint, Conflict.REPLACE, "", generation)
    nbytes = document.keys.nbytes + document.values.nbytes
    try:
        target.run(put, CALL_S + nbytes / UPLOAD_BYTES_PER_S)
    except Superseded:
        return 0
    return nbytes


def delete(target: RemotePlace, memory: str, document: str, generation: int) -> bool:
    """Delete all states of a document up to this generation; whether there was one."""
    try:
        target.run(DeleteDocument(memory, document, "", generation), CALL_S)
    except (NotFound, Superseded):
        return False
    return True


def _fetched(source: RemotePlace, memory: str, spec: MemorySpec, info: DocumentInfo) -> Document:
    step = max(1, _PIECE_BYTES // max(1, spec.bytes_per_token // len(spec.layers)))
    keys, values, ids = [], [], []
    for layer in spec.layers:
        pieces = [
            source.run(Fetch(memory, info.id, layer, first, min(step, info.tokens - first)), CALL_S)
            for first in range(0, info.tokens, step)
        ]
        keys.append(torch.cat([piece.keys for piece in pieces], dim=1))
        values.append(torch.cat([piece.values for piece in pieces], dim=1))
        ids = [piece.token_ids for piece in pieces]
    return Document(info.id, torch.stack(keys), torch.stack(values), torch.cat(ids), info.metadata)


def owned(shards: ShardMap, shard: str, memory: str, document: str) -> bool:
    """Whether a shard is to hold a document, in either layout."""
    return any(one.id == shard for one in shards.writers(memory, document))
