"""The catalogue: what its transactions promise, and that damage to it is noticed."""

from __future__ import annotations

import random
import sqlite3
import stat
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from memory_service.errors import AlreadyExists, DataLoss, FailedPrecondition, FotError, Internal, ResourceExhausted
from memory_service.storage import database, schema
from memory_service.storage.catalog import Catalog
from memory_service.storage.parts import PartHeader, SegmentRef, encode_header
from memory_service.storage.records import MemoryRow, RequestRow
from memory_service.types.operations import Operation, OperationKind, OperationState
from tests.memory_service.faults import flip_bit, truncate, zero_page
from tests.memory_service.storage import KEY, SPEC

MEMORY = MemoryRow(KEY, "tenant", "name", SPEC, 5.0)


def segment(path: str, *headers: PartHeader) -> SegmentRef:
    return encode_header(path, SPEC, headers)[1]


def part(document: str, generation: int = 1, *, part: int = 0, parts: int = 1, tokens: int = 4) -> PartHeader:
    return PartHeader(
        document, generation, part, parts, part * tokens, tokens, parts * tokens, {"é": 1.5, "ok": True}, 2.5, "r", (7,)
    )


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.open(tmp_path / "catalog.sqlite") as found:
        found.create_memory(MEMORY)
        yield found


def everything(catalog: Catalog) -> object:
    return catalog.memories(), catalog.documents(KEY), catalog.segments(KEY), catalog.operations()


def test_what_was_committed_is_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    with Catalog.open(path) as catalog:
        catalog.create_memory(MEMORY)
        refs = [segment("s1", part("a", 3), part("b", 4, part=1, parts=2)), segment("s2", part("b", 4, parts=2))]
        committed = catalog.commit(KEY, refs, requests=[RequestRow("tenant", "id", "put", KEY, "f", "{}", 9.0)])
        before = everything(catalog)
    assert [(one.id, one.generation, one.tokens, one.parts) for one in committed.documents] == [
        ("a", 3, 4, ((1, 0),)),
        ("b", 4, 8, ((2, 0), (1, 1))),
    ]
    assert committed.documents[0].metadata == {"é": 1.5, "ok": True}
    with Catalog.open(path) as catalog:
        assert everything(catalog) == before
        assert [row.ref for row in catalog.segments(KEY)] == refs
        assert catalog.memories() == [replace(MEMORY, next_generation=5)]
        assert catalog.request("tenant", "id") == RequestRow("tenant", "id", "put", KEY, "f", "{}", 9.0)
        assert catalog.request("other", "id") is None


def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    with Catalog.open(tmp_path / "catalog.sqlite") as catalog:
        catalog.create_memory(MEMORY)
        modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()}
    assert modes == {f"catalog.sqlite{part}": 0o600 for part in ("", "-wal", "-reserve")}


def test_a_name_is_unique_within_a_tenant_until_the_memory_is_deleted(catalog: Catalog) -> None:
    with pytest.raises(AlreadyExists):
        catalog.create_memory(replace(MEMORY, key="other"))
    catalog.create_memory(replace(MEMORY, key="foreign", tenant="another"))
    catalog.commit(KEY, [segment("s", part("a"))])
    catalog.delete_memory(KEY)
    assert [row.key for row in catalog.memories()] == ["foreign"] and catalog.deleted_memories() == [KEY]
    catalog.create_memory(replace(MEMORY, key="again"))
    catalog.forget_memory(KEY)
    catalog.forget_memory("again")  # Not deleted: stays.
    assert [row.key for row in catalog.memories()] == ["again", "foreign"] and catalog.deleted_memories() == []
    assert catalog.segments(KEY) == [] and catalog.documents(KEY) == []


def test_an_id_in_use_is_refused_and_nothing_of_the_commit_happens(catalog: Catalog) -> None:
    catalog.commit(KEY, [segment("s1", part("a", 1))])
    before = everything(catalog)
    with pytest.raises(AlreadyExists, match="REPLACE"):
        catalog.commit(
            KEY, [segment("s2", part("b", 2), part("a", 3))], requests=[RequestRow("t", "id", "put", KEY, "", "")]
        )
    assert everything(catalog) == before and catalog.request("t", "id") is None


def test_a_replaced_document_is_gone_in_the_same_step(catalog: Catalog) -> None:
    catalog.commit(KEY, [segment("s1", part("a", 1))])
    catalog.commit(KEY, [segment("s2", part("a", 2))], replaced={"a", "never there"})
    assert [(row.id, row.generation) for row in catalog.documents(KEY)] == [("a", 2)]
    assert catalog.dead_documents(KEY) == [("a", 1)]


def test_an_incomplete_document_is_not_committed(catalog: Catalog) -> None:
    for headers in ([part("a", parts=2)], [part("a", parts=2), part("a", parts=2)]):
        with pytest.raises(Internal, match="not be whole"):
            catalog.commit(KEY, [segment("s", *headers)])
    assert catalog.documents(KEY) == [] and catalog.segments(KEY) == []


def test_a_deleted_document_keeps_its_bytes_until_compaction(catalog: Catalog) -> None:
    committed = catalog.commit(KEY, [segment("s1", part("a", 1), part("b", 2))])
    a, b = committed.documents
    catalog.tombstone(KEY, [a.pk], [RequestRow("t", "id", "delete", KEY, "", "null")])
    assert [row.id for row in catalog.documents(KEY)] == ["b"] and catalog.request("t", "id") is not None
    assert [one.header.document for row in catalog.segments(KEY) for one in row.ref.parts] == ["a", "b"]
    (row,) = catalog.compact(KEY, [segment("s2", part("b", 2))], [committed.segments[0].pk])
    assert catalog.documents(KEY) == [replace(b, parts=((row.pk, 0),))]
    assert catalog.segments(KEY) == [row] and catalog.dead_documents(KEY) == []


def test_compaction_cannot_lose_or_double_a_live_document(catalog: Catalog) -> None:
    committed = catalog.commit(KEY, [segment("s1", part("a", 1), part("b", 2))])
    before = everything(catalog)
    with pytest.raises(Internal):
        catalog.compact(KEY, [segment("s2", part("b", 2))], [committed.segments[0].pk])
    with pytest.raises(Internal):
        catalog.compact(KEY, [segment("s2", part("b", 2))], [])
    assert everything(catalog) == before


def test_a_document_deleted_while_it_is_compacted_stays_deleted(catalog: Catalog) -> None:
    committed = catalog.commit(KEY, [segment("s1", part("a", 1))])
    catalog.tombstone(KEY, [committed.documents[0].pk])
    (row,) = catalog.compact(KEY, [segment("s2", part("a", 1))], [committed.segments[0].pk])
    assert catalog.documents(KEY) == [] and catalog.dead_documents(KEY) == [("a", 1)]
    catalog.compact(KEY, (), [row.pk])
    assert catalog.segments(KEY) == [] and catalog.dead_documents(KEY) == []


def test_adopting_takes_only_what_is_alive_and_every_part_once(catalog: Catalog) -> None:
    catalog.commit(KEY, [segment("s1", part("a", 1))])
    found = [segment("s2", part("a", 5), part("dead", 6)), segment("s3", part("a", 5), part("b", 7))]
    adopted = catalog.adopt(KEY, found, {("a", 5), ("b", 7)})
    assert [(row.id, row.generation) for row in catalog.documents(KEY)] == [("a", 5), ("b", 7)]
    assert adopted.documents[0].parts == ((2, 0),)
    documents = [[one.header.document for one in row.ref.parts] for row in catalog.segments(KEY)]
    assert documents == [["a"], ["a", ""], ["", "b"]]
    assert catalog.memories()[0].next_generation == 8


def test_old_requests_and_finished_operations_are_forgotten(catalog: Catalog) -> None:
    week = 7 * 86_400.0
    catalog.record([RequestRow("t", one, "put", KEY, "", "", at) for one, at in [("old", 10.0), ("new", 30.0)]])
    done = Operation("done", "name", OperationKind.VERIFY, OperationState.DONE, 3, 3, "all well", 10.0, 10.0)
    running = replace(done, id="running", state=OperationState.RUNNING)
    for one in (done, running, replace(running, done=2)):
        catalog.save_operation("tenant", one)
    assert catalog.operations() == [("tenant", done), ("tenant", replace(running, done=2))]
    catalog.prune(20.0 + week)
    assert catalog.request("t", "old") is None and catalog.request("t", "new") is not None
    assert catalog.operations() == [("tenant", replace(running, done=2))]


def test_the_hook_is_called_after_every_transaction_and_not_after_a_failed_one(tmp_path: Path) -> None:
    calls: list[int] = []
    with Catalog.open(tmp_path / "catalog.sqlite", on_commit=lambda: calls.append(1)) as catalog:
        assert len(calls) == 1
        catalog.create_memory(MEMORY)
        with pytest.raises(AlreadyExists):
            catalog.create_memory(replace(MEMORY, key="other"))
        assert len(calls) == 2


def test_a_backup_is_a_whole_catalogue(catalog: Catalog, tmp_path: Path) -> None:
    catalog.commit(KEY, [segment("s1", part("a", 1))])
    for _ in range(2):
        catalog.backup(tmp_path / "backup.sqlite")
    assert stat.S_IMODE((tmp_path / "backup.sqlite").stat().st_mode) == 0o600
    with Catalog.open(tmp_path / "backup.sqlite") as copy:
        assert everything(copy) == everything(catalog)


def test_a_catalogue_in_ram_needs_no_file() -> None:
    with Catalog.open(None) as catalog:
        catalog.create_memory(MEMORY)
        assert catalog.memories() == [MEMORY]


def test_threads_share_one_catalogue(catalog: Catalog) -> None:
    def commit(worker: int) -> None:
        for number in range(10):
            catalog.commit(KEY, [segment(f"s{worker}.{number}", part(f"{worker}.{number}", 1 + worker * 10 + number))])

    threads = [threading.Thread(target=commit, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(catalog.documents(KEY)) == 40


# --- Failure ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_changes_nothing_and_passes(catalog: Catalog) -> None:
    before = everything(catalog)
    pages = catalog._db.query("PRAGMA page_count")[0][0]
    catalog._db.query(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(ResourceExhausted, match="free space"):
        for number in range(1, 500):
            catalog.commit(KEY, [segment(f"s{number}", part(f"{number}", number))])
            before = everything(catalog)
    assert everything(catalog) == before
    catalog._db.query("PRAGMA max_page_count = 1000000")
    catalog.commit(KEY, [segment("after", part("after", 1000))])


def test_deleting_works_on_a_full_disk_and_makes_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with Catalog.open(disk / "catalog.sqlite") as catalog:
            catalog.create_memory(MEMORY)
            number = 0
            with pytest.raises(ResourceExhausted):
                while True:
                    number += 1
                    headers = [part(f"{number}.{one}", number) for one in range(50)]
                    catalog.commit(KEY, [segment(f"s{number}", *headers)])
            while True:  # Not a page is left.
                try:
                    with (disk / "ballast").open("ab", buffering=0) as file:
                        file.write(bytes(4096))
                except OSError:
                    break
            documents = [row.pk for row in catalog.documents(KEY)]
            catalog.tombstone(KEY, documents)
            catalog.compact(KEY, (), [row.pk for row in catalog.segments(KEY)])
            assert catalog.documents(KEY) == [] == catalog.segments(KEY)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("code", "error"),
    [("SQLITE_IOERR_FSYNC", "StorageFailed"), ("SQLITE_BUSY", "FailedPrecondition"), ("SQLITE_CORRUPT", "DataLoss")],
)
def test_each_result_code_has_its_error(code: str, error: str) -> None:
    cause = sqlite3.OperationalError("told so")
    cause.sqlite_errorcode = getattr(sqlite3, code)
    assert type(database._storage_error(cause)).__name__ == error


def test_a_second_process_is_kept_out(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="another process"):
        Catalog.open(tmp_path / "catalog.sqlite")


def test_a_catalogue_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    Catalog.open(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(FailedPrecondition, match="upgrade"):
        Catalog.open(path)


def test_a_catalogue_of_version_1_is_brought_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "catalog.sqlite"
    with monkeypatch.context() as before:
        before.setattr(database, "SCHEMA", schema.SCHEMA[:1])
        before.setattr(database, "DIGESTED", schema._DIGESTED_1)
        with Catalog.open(path) as catalog:
            catalog.create_memory(MEMORY)
            catalog.commit(KEY, [segment("s1", part("a", 1))])
            with catalog._db.transaction():
                catalog._db.insert("operations", ("one", "t", "m", "verify", "done", 1, 2, "so", 3.0, 4.0))
    for _ in range(2):
        with Catalog.open(path) as catalog:
            ((tenant, operation),) = catalog.operations()
            assert (tenant, operation.id, operation.message, operation.snapshot) == ("t", "one", "so", "")
            assert [one.id for one in catalog.documents(KEY)] == ["a"]
            catalog.save_operation("t", replace(operation, snapshot="s"))
            catalog.save_operation("t", operation)


def test_a_restored_memory_comes_with_all_its_documents_or_not_at_all(catalog: Catalog) -> None:
    refs = [segment("s1", part("a", 1), part("b", 2)), segment("s2", part("a", 3), part("c", 4))]
    row = replace(MEMORY, key="other", name="other", next_generation=9)
    catalog.restore(row, refs, [("a", 3), ("b", 2)])
    assert catalog.memories()[-1].next_generation == 9
    assert [(one.id, one.generation) for one in catalog.documents("other")] == [("a", 3), ("b", 2)]
    assert sorted(catalog.dead_documents("other")) == [("a", 1), ("c", 4)]
    with pytest.raises(AlreadyExists):
        catalog.restore(replace(row, key="third"), refs, [("a", 3)])
    with pytest.raises(Internal):  # Two of a document's parts are missing.
        catalog.restore(replace(row, key="fourth", name="fourth"), [segment("s1", part("a", 1, parts=3))], [("a", 1)])
    assert {one.key for one in catalog.memories()} == {KEY, "other"}


def test_a_row_changed_behind_our_back_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    with Catalog.open(path) as catalog:
        catalog.create_memory(MEMORY)
        catalog.commit(KEY, [segment("s1", part("a", 1))])
    for statement in (
        "UPDATE documents SET tokens = 5",
        "DELETE FROM requests",
        "INSERT INTO requests VALUES ('t', 'id', 'put', 'k', 'f', 'a', 1.0)",
        "UPDATE state SET digest = digest + 1",
        "DROP TRIGGER parts_insert",
        "DROP INDEX documents_alive",
    ):
        sound = path.read_bytes()
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA recursive_triggers = OFF")
            db.create_function("fold", -1, lambda digest, *_: digest)
            changed = db.execute(statement).rowcount != 0
        db.close()
        if changed:
            with pytest.raises(DataLoss, match="fot verify --rebuild-catalog"):
                Catalog.open(path)
        path.write_bytes(sound)
    Catalog.open(path).close()


@pytest.mark.parametrize("damage", [flip_bit, truncate, zero_page])
def test_damage_at_rest_is_noticed_or_harmless(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    path = tmp_path / "catalog.sqlite"
    with Catalog.open(path) as catalog:
        catalog.create_memory(MEMORY)
        for number in range(1, 60):
            catalog.commit(KEY, [segment(f"s{number}", part(f"document {number}", number))])
        before = everything(catalog)
    sound = path.read_bytes()
    noticed = 0
    for seed in range(120):
        what = damage(path, random.Random(seed))
        try:
            with Catalog.open(path) as catalog:
                # Bytes no row uses (freed pages, the header's statistics) may change; what is read must not.
                assert everything(catalog) == before, what
        except FotError as error:
            assert isinstance(error, DataLoss | FailedPrecondition), (what, error)
            noticed += 1
        for leftover in tmp_path.iterdir():
            leftover.unlink()
        path.write_bytes(sound)
    assert noticed > 10
