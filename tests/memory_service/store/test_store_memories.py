"""What every verb of memories does, and how much a tenant may hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memory_service import verbs
from memory_service.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    QuotaExceeded,
    ResourceExhausted,
)
from memory_service.store.store import Store
from memory_service.types.operations import OperationKind
from memory_service.types.questions import AttendGroup
from memory_service.types.scopes import Scope
from memory_service.types.specs import DType, Fingerprint, IndexPolicy
from tests.memory_service.oracle import (
    ME,
    MODEL,
    document,
    put,
    refused,
    spec_of,
)
from tests.memory_service.store.given import OPTIONS, OTHER, QUERIES, SPEC, A, begin, ids

# --- Memories -------------------------------------------------------------------------------------------------------


def test_a_memory_is_created_once_and_described(store: Store) -> None:
    info = store.run(ME, verbs.GetMemory("m"))
    assert (info.name, info.spec, info.documents, info.tokens, info.bytes) == ("m", SPEC, 0, 0, 0)
    assert store.run(ME, verbs.CreateMemory("m", SPEC)) == info


def test_the_same_name_with_another_spec_already_exists(store: Store) -> None:
    found = refused(store, verbs.CreateMemory("m", spec_of(DType.BF16)))
    assert isinstance(found, AlreadyExists)
    assert "another spec" in found.message


@pytest.mark.parametrize("name", ["", "-a", "a/b", "..", "a" * 64, "ä", "a b", "a\n"])
def test_a_memory_needs_a_plain_name(store: Store, name: str) -> None:
    assert isinstance(refused(store, verbs.CreateMemory(name, SPEC)), InvalidArgument)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": ()},
        {"layers": (2, 1)},
        {"layers": (1, 1)},
        {"layers": (-1,)},
        {"kv_heads": 0},
        {"kv_heads": 1 << 40},
        {"head_dim": 0},
        {"head_dim": 1 << 40},
        {"fingerprint": Fingerprint("")},
        {"index": IndexPolicy(min_tokens=0)},
    ],
)
def test_a_spec_beyond_its_limits_is_refused(store: Store, wrong: dict[str, Any]) -> None:
    assert isinstance(refused(store, verbs.CreateMemory("x", replace(SPEC, **wrong))), InvalidArgument)


def test_memories_are_listed_in_pages_by_name(store: Store) -> None:
    for name in ("z", "b", "y"):
        store.run(ME, verbs.CreateMemory(name, SPEC))
    first = store.run(ME, verbs.ListMemories(page_size=3))
    rest = store.run(ME, verbs.ListMemories(page_size=3, page_token=first.next))
    assert [one.name for one in first.items] == ["b", "m", "y"]
    assert ([one.name for one in rest.items], rest.next) == (["z"], "")


def test_a_deleted_memory_is_gone_and_its_name_is_free(store: Store) -> None:
    put(store, "m", A)
    store.run(ME, verbs.DeleteMemory("m"))
    assert isinstance(refused(store, verbs.GetMemory("m")), NotFound)
    assert isinstance(refused(store, verbs.DeleteMemory("m")), NotFound)
    store.run(ME, verbs.CreateMemory("m", spec_of(DType.BF16)))
    assert ids(store) == []


def test_a_deleted_memory_leaves_nothing_on_disk(disk: Store, tmp_path: Path) -> None:
    put(disk, "m", A)
    disk.run(ME, verbs.DeleteMemory("m"))
    assert list((tmp_path / "data" / "memories").iterdir()) == []


@pytest.mark.parametrize(
    "verb",
    [
        verbs.GetMemory("none"),
        verbs.DeleteMemory("none"),
        verbs.PutDocument("none", A, MODEL),
        verbs.BeginUpload("none", "a", 1, MODEL),
        verbs.GetDocument("none", "a"),
        verbs.GetDocument("m", "none"),
        verbs.DeleteDocument("m", "none"),
        verbs.ListDocuments("none"),
        verbs.OpenSession("none", MODEL),
        verbs.GetUpload("m", "none"),
        verbs.CommitUpload("m", "none"),
        verbs.RenewSession("m", "none"),
        verbs.Attend("none", 3, (AttendGroup(Scope(), QUERIES),)),
        verbs.Attend("m", 3, (AttendGroup(Scope(("none",)), QUERIES),)),
        verbs.Attend("m", 3, (AttendGroup(Scope.session("none"), QUERIES),)),
        verbs.Fetch("m", "none", 3),
        verbs.Fetch("m", "session:none", 3),
        verbs.GetStats("none"),
        verbs.StartOperation("none", OperationKind.COMPACT),
        verbs.GetOperation("none"),
        verbs.CancelOperation("none"),
        verbs.ListOperations("none"),
    ],
    ids=repr,
)
def test_what_does_not_exist_is_not_found(store: Store, verb: verbs.Verb[Any]) -> None:
    assert isinstance(refused(store, verb), NotFound)


# --- Quotas ---------------------------------------------------------------------------------------------------------


def test_a_tenant_holds_no_more_bytes_than_its_quota(place: Path | None) -> None:
    size = 5 * (SPEC.bytes_per_token + 4)
    with Store.open(place, replace(OPTIONS, tenant_bytes=2 * size)) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        put(store, "m", A)
        waiting = store.run(ME, begin(replace(A, id="b")))
        found = refused(store, verbs.PutDocument("m", replace(A, id="c"), MODEL))
        assert isinstance(found, QuotaExceeded)
        assert "delete documents" in found.message
        store.run(OTHER, verbs.CreateMemory("m", SPEC))
        store.run(OTHER, verbs.PutDocument("m", A, MODEL))
        store.run(ME, verbs.AbortUpload("m", waiting.id))
        put(store, "m", replace(A, id="c"))
        store.run(ME, verbs.DeleteDocument("m", "a"))
        put(store, "m", replace(A, id="d"))


def test_a_tenant_holds_no_more_memories_than_its_limit(place: Path | None) -> None:
    with Store.open(place, replace(OPTIONS, tenant_memories=2)) as store:
        for name in ("a", "b"):
            store.run(ME, verbs.CreateMemory(name, SPEC))
        assert isinstance(refused(store, verbs.CreateMemory("c", SPEC)), QuotaExceeded)
        store.run(OTHER, verbs.CreateMemory("c", SPEC))


def test_documents_that_wait_in_ram_are_bounded(place: Path | None) -> None:
    with Store.open(place, replace(OPTIONS, staging_bytes=10_000)) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        waiting = store.run(ME, begin(document("a", 15, SPEC, 1)))
        found = refused(store, begin(document("b", 15, SPEC, 1)))
        assert isinstance(found, ResourceExhausted)
        assert found.retry_after_s
        store.run(ME, verbs.AbortUpload("m", waiting.id))
        put(store, "m", document("b", 15, SPEC, 1))
