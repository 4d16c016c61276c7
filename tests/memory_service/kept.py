"""What tests of snapshots share: waiting for operations, two disks, and what a memory is, to compare."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from memory_service import verbs
from memory_service.errors import FotError
from memory_service.storage.vfs import CannotLink, OsVfs
from memory_service.store.store import Store
from memory_service.types.callers import Identity
from memory_service.types.documents import DocumentInfo
from memory_service.types.operations import Operation, OperationState
from memory_service.types.specs import MemorySpec
from tests.memory_service.oracle import ME, attend, document, put, spec_of

SPEC = spec_of(dim=8)
QUERIES = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


class TwoDisks(OsVfs):
    """What lies under `other` is on another disk: nothing is linked to it or from it."""

    def __init__(self, other: Path):
        self.other = other

    def link(self, source: Path, target: Path) -> None:
        if (self.other in source.parents) != (self.other in target.parents):
            raise CannotLink("another disk")
        super().link(source, target)


def run(store: Store, verb: verbs.Verb[Any], who: Identity = ME) -> Operation:
    """An operation once it has ended."""
    operation: Operation = store.run(who, verb)
    end = time.monotonic() + 30
    while operation.state is OperationState.RUNNING:
        assert time.monotonic() < end, operation
        time.sleep(0.001)
        operation = store.run(who, verbs.GetOperation(operation.id))
    return operation


def done(store: Store, verb: verbs.Verb[Any], who: Identity = ME) -> Operation:
    """An operation that must end well."""
    ended = run(store, verb, who)
    assert ended.state is OperationState.DONE, ended
    return ended


def failed(store: Store, verb: verbs.Verb[Any]) -> str:
    """Why a call, or the operation it starts, fails."""
    try:
        ended = run(store, verb)
    except FotError as error:
        return error.message
    assert ended.state is OperationState.FAILED, ended
    return ended.message


def filled(store: Store, memory: str = "m", spec: MemorySpec = SPEC) -> None:
    """A memory with large and small documents, one of them replaced and one deleted."""
    store.run(ME, verbs.CreateMemory(memory, spec))
    for number, tokens in enumerate((20, 200, 30, 60)):
        put(store, memory, document(f"d{number}", tokens, spec, f"{number}", {"n": number}))
    put(store, memory, document("d1", 40, spec, "new"), replacing=True)
    store.run(ME, verbs.DeleteDocument(memory, "d2"))


def look(store: Store, memory: str = "m", who: Identity = ME) -> dict[str, Any]:
    """All that a memory is, to the bit: documents, deletions, keys, values, token ids, an answer."""
    infos: tuple[DocumentInfo, ...] = store.run(who, verbs.ListDocuments(memory)).items
    bytes_of: list[Any] = []
    for info in infos:
        for layer in SPEC.layers:
            got = store.run(who, verbs.Fetch(memory, info.id, layer, 0, info.tokens))
            bytes_of += [got.keys.numpy().tobytes(), got.values.numpy().tobytes(), got.token_ids.tolist()]
    about = store.run(who, verbs.GetMemory(memory))
    answer = attend(store, memory, 3, QUERIES).partial if who == ME else None
    return {
        "documents": infos,
        "deleted": store.run(who, verbs.ListDeleted(memory)).items,
        "bytes": bytes_of,
        "about": (about.spec, about.created_at, about.documents, about.tokens, about.bytes),
        "answer": None if answer is None else (answer.output.tolist(), answer.lse.tolist()),
    }


def names(store: Store, who: Identity = ME) -> list[str]:
    """All memories."""
    return [one.name for one in store.run(who, verbs.ListMemories()).items]


def kept(store: Store, who: Identity = ME) -> list[str]:
    """All snapshots."""
    return [one.id for one in store.run(who, verbs.ListSnapshots()).items]
