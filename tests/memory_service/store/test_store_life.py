"""Background work, figures, and what is there after a restart."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memory_service import verbs
from memory_service.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    SessionExpired,
    Unavailable,
)
from memory_service.storage.vfs import OsVfs
from memory_service.store.recovery import rebuild_catalog
from memory_service.store.store import Store
from memory_service.types.callers import Cancel
from memory_service.types.operations import OperationKind, OperationState
from tests.memory_service.oracle import (
    ME,
    MODEL,
    attend,
    document,
    finish,
    put,
    refused,
    warm,
)
from tests.memory_service.store.given import OPTIONS, QUERIES, SPEC, A, B, ids

# --- Operations and statistics --------------------------------------------------------------------------------------


def test_an_operation_is_watched_to_its_end(store: Store) -> None:
    put(store, "m", A)
    done = finish(store, "m", OperationKind.VERIFY)
    assert (done.memory, done.kind, done.state) == ("m", OperationKind.VERIFY, OperationState.DONE)
    assert store.run(ME, verbs.ListOperations("m")).items == (done,)
    assert store.run(ME, verbs.CancelOperation(done.id)) == done


def test_operations_are_listed_in_pages_newest_first(store: Store) -> None:
    made = [finish(store, "m", OperationKind.VERIFY).id for _ in range(3)]
    first = store.run(ME, verbs.ListOperations(page_size=2))
    rest = store.run(ME, verbs.ListOperations(page_size=2, page_token=first.next))
    assert [one.id for one in (*first.items, *rest.items)] == made[::-1]
    assert rest.next == ""
    assert isinstance(refused(store, verbs.ListOperations(page_token="none")), InvalidArgument)


def test_the_same_work_is_not_started_twice(store: Store) -> None:
    put(store, "m", A)
    memory = store._memories.get("default", "m")
    with memory.filling:  # The compaction must wait for it.
        first = store.run(ME, verbs.StartOperation("m", OperationKind.COMPACT))
        again = store.run(ME, verbs.StartOperation("m", OperationKind.COMPACT))
    assert again.id == first.id


def test_compaction_frees_what_was_deleted_and_keeps_the_rest(disk: Store, tmp_path: Path) -> None:
    for number in range(4):
        put(disk, "m", document(str(number), 50, SPEC, number))
    for number in (0, 2):
        disk.run(ME, verbs.DeleteDocument("m", str(number)))
    assert disk.run(ME, verbs.GetStats("m")).dead_bytes == 100 * (SPEC.bytes_per_token + 4)
    assert finish(disk, "m", OperationKind.COMPACT).state is OperationState.DONE
    stats = disk.run(ME, verbs.GetStats("m"))
    assert (stats.dead_bytes, stats.segments, stats.tokens) == (0, 1, 100)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    for number in (1, 3):
        got = disk.run(ME, verbs.Fetch("m", str(number), 3, 0, 50))
        assert torch.equal(got.keys, document(str(number), 50, SPEC, number).keys[0])


def test_a_reader_keeps_the_files_it_reads_until_it_is_done(disk: Store, tmp_path: Path) -> None:
    put(disk, "m", A)
    put(disk, "m", B)
    put(disk, "m", document("c", 5, SPEC, "c"))
    disk.run(ME, verbs.DeleteDocument("m", "b"))
    memory = disk._memories.get("default", "m")
    with memory.reading():
        old = memory.documents["a"]
        finish(disk, "m", OperationKind.COMPACT)
        assert torch.equal(memory.read(old, 0, 0, 5)[0], A.keys[0])
        assert len(list(tmp_path.rglob("*.safetensors"))) == 4  # The three old ones and the new one.
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_compacting_again_while_a_reader_holds_the_old_files_is_fine(disk: Store) -> None:
    put(disk, "m", A)
    put(disk, "m", B)
    disk.run(ME, verbs.DeleteDocument("m", "b"))
    with disk._memories.get("default", "m").reading():
        for _ in range(2):
            done = finish(disk, "m", OperationKind.COMPACT)
            assert done.state is OperationState.DONE, done.message
    assert torch.equal(disk.run(ME, verbs.Fetch("m", "a", 3, 0, 5)).keys, A.keys[0])
    assert finish(disk, "m", OperationKind.VERIFY).state is OperationState.DONE


def test_statistics_count_what_is_there(store: Store) -> None:
    put(store, "m", A)
    store.run(ME, verbs.CreateMemory("n", SPEC))
    put(store, "n", B)
    one, both = store.run(ME, verbs.GetStats("m")), store.run(ME, verbs.GetStats())
    assert (one.documents, one.tokens, one.bytes) == (1, 5, 5 * (SPEC.bytes_per_token + 4))
    assert (both.documents, both.tokens, both.memory) == (2, 12, "")


def test_figures_can_be_asked_while_documents_come(disk: Store) -> None:
    failures: list[BaseException] = []
    stop = threading.Event()

    def ask() -> None:
        try:
            while not stop.is_set():
                disk.run(ME, verbs.GetStats("m"))
        except BaseException as error:
            failures.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # As on a machine that is busy.
    askers = [threading.Thread(target=ask) for _ in range(3)]
    try:
        for asker in askers:
            asker.start()
        for number in range(60):
            put(disk, "m", document(f"x{number}", 3, SPEC, number))
    finally:
        stop.set()
        for asker in askers:
            asker.join()
        sys.setswitchinterval(before)
    assert failures == []


# --- Life -----------------------------------------------------------------------------------------------------------


def test_a_closed_store_answers_nothing(place: Path | None) -> None:
    store = Store.open(place, OPTIONS)
    assert store.ready is True
    for _ in range(2):
        store.close()
        assert store.ready is False
    assert isinstance(refused(store, verbs.ListMemories()), Unavailable)


def test_one_directory_is_open_once(disk: Store, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="in use"):
        Store.open(tmp_path / "data", OPTIONS)
    disk.close()
    Store.open(tmp_path / "data", OPTIONS).close()


def test_everything_acknowledged_is_there_after_a_restart(tmp_path: Path) -> None:
    with Store.open(tmp_path / "data", OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        first = put(store, "m", A, request_id="r")
        put(store, "m", B)
        put(store, "m", document("b", 3, SPEC, 9, {"new": True}), replacing=True)
        put(store, "m", document("c", 3, SPEC, 9))
        store.run(ME, verbs.DeleteDocument("m", "c", request_id="d"))
        session = store.run(ME, verbs.OpenSession("m", MODEL)).id
        info, listed = store.run(ME, verbs.GetMemory("m")), store.run(ME, verbs.ListDocuments("m"))
        before = attend(store, "m", 3, QUERIES)
        operation = finish(store, "m", OperationKind.VERIFY)
    with Store.open(tmp_path / "data", OPTIONS) as store:
        assert store.run(ME, verbs.GetMemory("m")) == info
        assert store.run(ME, verbs.ListDocuments("m")) == listed
        assert torch.equal(attend(store, "m", 3, QUERIES).output, before.output)
        assert store.run(ME, verbs.GetOperation(operation.id)) == operation
        assert isinstance(refused(store, verbs.RenewSession("m", session)), SessionExpired)
        assert put(store, "m", A, request_id="r") == first
        store.run(ME, verbs.DeleteDocument("m", "c", request_id="d"))
        assert put(store, "m", document("d", 1, SPEC, 1)).generation == 5


def test_a_catalogue_gone_missing_is_told_not_replaced(tmp_path: Path) -> None:
    with Store.open(tmp_path / "data", OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        put(store, "m", A)
    (tmp_path / "data" / "catalog.sqlite").unlink()
    with pytest.raises(DataLoss, match="rebuild-catalog"):
        Store.open(tmp_path / "data", OPTIONS)


def test_an_id_used_again_after_a_rebuild_is_not_mistaken_for_the_one_deleted_before(tmp_path: Path) -> None:
    root = tmp_path / "data"
    with Store.open(root, OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        put(store, "m", A)
        put(store, "m", B)
        store.run(ME, verbs.DeleteDocument("m", "b"))
        finish(store, "m", OperationKind.COMPACT)  # No segment remembers the generation of b.
    rebuild_catalog(root / "catalog.sqlite", root, OsVfs())
    with Store.open(root, OPTIONS) as store:
        assert ids(store) == ["a"]
        put(store, "m", B)
    with Store.open(root, OPTIONS) as store:
        assert ids(store) == ["a", "b"]


def test_deleting_a_memory_gives_all_its_ram_back(disk: Store) -> None:
    put(disk, "m", A)
    warm(disk, "m")
    memory = disk._memories.get("default", "m")
    disk.run(ME, verbs.DeleteMemory("m"))
    for late in (lambda: disk._upkeep.warm(memory, Cancel()), memory.tidy, memory.send_away):
        late()  # The background thread may have been about to.
        assert disk._memories.residency.used == 0


def test_background_work_brings_documents_into_ram_by_itself(tmp_path: Path) -> None:
    with Store.open(tmp_path / "data", replace(OPTIONS, background=True)) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        put(store, "m", A)
        end = time.monotonic() + 10
        while store.run(ME, verbs.GetStats("m")).resident_tokens < 5:
            assert time.monotonic() < end
            time.sleep(0.05)
