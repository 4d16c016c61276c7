"""A snapshot is a memory as it was at one moment; restored, it is that memory again, to the bit."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from memory_service import verbs
from memory_service.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, QuotaExceeded
from memory_service.settings import StoreOptions
from memory_service.shards import Shard, ShardMap
from memory_service.storage.vfs import OsVfs
from memory_service.store import recovery
from memory_service.store.recovery import rebuild_catalog
from memory_service.store.store import Store
from memory_service.types.callers import Identity, Role
from memory_service.types.operations import OperationKind, OperationState
from tests.memory_service.kept import SPEC, TwoDisks, done, failed, filled, kept, look, names, run
from tests.memory_service.oracle import ME, document, everything_in_small_pieces, finish, put, refused

OTHER = Identity("other", Role.ADMIN)
QUIET = StoreOptions(background=False)


@pytest.fixture(autouse=True)
def _small_pieces() -> Iterator[None]:
    with everything_in_small_pieces(SPEC.bytes_per_token):
        yield


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(data: Path) -> Iterator[Store]:
    """A store with one filled memory, `m`."""
    with Store.open(data, QUIET) as found:
        filled(found)
        yield found


def inodes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in directory.glob("seg-*")}


# --- A moment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disks", [1, 2])
def test_a_snapshot_is_the_moment_it_was_taken_whatever_comes_after(tmp_path: Path, disks: int) -> None:
    options = QUIET if disks == 1 else replace(QUIET, snapshots=tmp_path / "other")
    with Store.open(tmp_path / "data", options, TwoDisks(tmp_path / "other")) as store:
        filled(store)
        before = look(store)
        done(store, verbs.CreateSnapshot("m", "one"))
        put(store, "m", document("d0", 90, SPEC, "later"), replacing=True)
        put(store, "m", document("d9", 10, SPEC, "later"))
        store.run(ME, verbs.DeleteDocument("m", "d3"))
        assert finish(store, "m", OperationKind.COMPACT).state is OperationState.DONE
        store.run(ME, verbs.DeleteMemory("m"))
        assert [one.memory for one in store.run(ME, verbs.ListSnapshots()).items] == ["m"]
        told = done(store, verbs.RestoreSnapshot("one"))
        assert (told.memory, told.snapshot, told.done) == ("m", "one", told.total)
        assert look(store) == before


def test_what_is_committed_after_the_call_is_not_in_it_however_long_it_takes(tmp_path: Path) -> None:
    class Slow(TwoDisks):
        going = threading.Event()

        def create(self, path: Path, size: int):  # type: ignore[no-untyped-def]
            if self.other in path.parents:
                assert self.going.wait(10)
            return super().create(path, size)

    other = tmp_path / "other"
    with Store.open(tmp_path / "data", replace(QUIET, snapshots=other), Slow(other)) as store:
        filled(store)
        before = look(store)
        begun = store.run(ME, verbs.CreateSnapshot("m", "one"))
        assert store.run(ME, verbs.CreateSnapshot("m", "one")).id == begun.id
        assert "still being made" in refused(store, verbs.DeleteSnapshot("one")).message
        put(store, "m", document("d9", 10, SPEC, "later"))
        store.run(ME, verbs.DeleteDocument("m", "d0"))
        assert finish(store, "m", OperationKind.COMPACT).state is OperationState.DONE
        assert kept(store) == []
        Slow.going.set()
        assert done(store, verbs.CreateSnapshot("m", "one")).id == begun.id
        done(store, verbs.RestoreSnapshot("one", "again"))
        assert look(store, "again") == before


def test_on_one_disk_a_snapshot_is_links_and_takes_no_room(store: Store, data: Path) -> None:
    told = done(store, verbs.CreateSnapshot("m", "one"))
    mine, theirs = inodes(data / "snapshots/default/one"), inodes(next((data / "memories").iterdir()))
    assert mine.items() <= theirs.items()
    assert f"segments linked {len(mine)}, copied 0" in told.message


def test_on_another_disk_only_what_is_new_is_copied(tmp_path: Path) -> None:
    other = tmp_path / "other"
    with Store.open(tmp_path / "data", replace(QUIET, snapshots=other), TwoDisks(other)) as store:
        filled(store)
        assert "linked 0," in done(store, verbs.CreateSnapshot("m", "one")).message
        put(store, "m", document("d7", 10, SPEC, "new"))
        assert "copied 1;" in done(store, verbs.CreateSnapshot("m", "two")).message
        one, two = inodes(other / "default/one"), inodes(other / "default/two")
        assert one.items() < two.items()
        # A link to a copy that is not what it should be helps nobody.
        victim = other / "default/two" / sorted(two)[0]
        os.truncate(victim, 100)
        store.run(ME, verbs.DeleteSnapshot("one"))
        assert "copied 1;" in done(store, verbs.CreateSnapshot("m", "three")).message
        done(store, verbs.RestoreSnapshot("three", "again"))


def test_segments_without_a_live_document_are_left_out(store: Store, data: Path) -> None:
    done(store, verbs.CreateSnapshot("m", "one"))
    live = {path.name for path in (data / "snapshots/default/one").glob("seg-*")}
    everything = {path.name for path in next((data / "memories").iterdir()).glob("seg-*")}
    assert live < everything


def test_an_empty_memory_can_be_kept_too(store: Store) -> None:
    store.run(ME, verbs.CreateMemory("empty", SPEC))
    done(store, verbs.CreateSnapshot("empty", "nothing"))
    done(store, verbs.RestoreSnapshot("nothing", "again"))
    assert store.run(ME, verbs.GetMemory("again")).documents == 0


def test_a_snapshots_directory_can_be_carried_elsewhere(store: Store, tmp_path: Path) -> None:
    before = look(store)
    done(store, verbs.CreateSnapshot("m", "one"))
    shutil.copytree(tmp_path / "data/snapshots", tmp_path / "elsewhere")
    with Store.open(tmp_path / "data2", replace(QUIET, snapshots=tmp_path / "elsewhere")) as second:
        done(second, verbs.RestoreSnapshot("one"))
        assert look(second) == before


# --- A memory again -------------------------------------------------------------------------------------------------


def test_a_restored_memory_lives_on_as_any_other(store: Store, data: Path) -> None:
    done(store, verbs.CreateSnapshot("m", "one"))
    last = max(one.generation for one in store.run(ME, verbs.ListDocuments("m")).items)
    done(store, verbs.RestoreSnapshot("one", "again"))
    assert put(store, "again", document("d8", 9, SPEC, "x")).generation == last + 1
    before = look(store, "again")
    assert finish(store, "again", OperationKind.VERIFY).state is OperationState.DONE
    assert finish(store, "again", OperationKind.COMPACT).state is OperationState.DONE
    assert look(store, "again") == before
    store.run(ME, verbs.DeleteMemory("again"))
    assert names(store) == ["m"]
    assert look(store)["documents"]


def test_the_deletion_of_the_newest_document_is_counted(store: Store) -> None:
    newest = put(store, "m", document("d8", 9, SPEC, "x")).generation
    store.run(ME, verbs.DeleteDocument("m", "d8"))
    assert finish(store, "m", OperationKind.COMPACT).state is OperationState.DONE
    done(store, verbs.CreateSnapshot("m", "one"))
    done(store, verbs.RestoreSnapshot("one", "again"))
    assert put(store, "again", document("d8", 9, SPEC, "x")).generation == newest + 1


def test_what_is_dead_in_the_segments_never_comes_back(
    store: Store, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compaction puts small documents into one segment; some of it is dead when the snapshot is taken.
    for name in ("dead", "live", "old"):
        put(store, "m", document(name, 9, SPEC, name))
    assert finish(store, "m", OperationKind.COMPACT).state is OperationState.DONE
    store.run(ME, verbs.DeleteDocument("m", "dead"))
    put(store, "m", document("old", 7, SPEC, "new"), replacing=True)
    before = look(store)
    done(store, verbs.CreateSnapshot("m", "one"))
    store.run(ME, verbs.DeleteMemory("m"))
    done(store, verbs.RestoreSnapshot("one"))
    held = [part.header for ref in store._memories.get("default", "m").segments.values() for part in ref.parts]
    assert {"dead", "live", "old"} <= {one.document for one in held}
    assert store.run(ME, verbs.GetStats("m")).dead_bytes > 0
    assert look(store) == before
    store.close()
    # The log of deletions is trimmed of all that no segment needs; then the catalogue is lost.
    with monkeypatch.context() as trimming:
        trimming.setattr(recovery, "SPARE_TOMBSTONES", -1)
        trimming.setattr(recovery, "REPLICA_DAYS", -1.0)
        Store.open(data, QUIET).close()
    for _ in range(2):
        rebuild_catalog(data / "catalog.sqlite", data, OsVfs())
        with Store.open(data, QUIET) as again:
            found = look(again)
            assert (found["documents"], found["bytes"]) == (before["documents"], before["bytes"])


def test_a_taken_name_is_refused_and_another_one_is_free(store: Store) -> None:
    done(store, verbs.CreateSnapshot("m", "one"))
    assert isinstance(refused(store, verbs.RestoreSnapshot("one")), AlreadyExists)
    assert isinstance(refused(store, verbs.RestoreSnapshot("one", "../m")), InvalidArgument)
    done(store, verbs.RestoreSnapshot("one", "again"))
    assert look(store, "again") == look(store)


def test_operations_tell_of_themselves_over_restarts(store: Store, data: Path) -> None:
    begun = done(store, verbs.CreateSnapshot("m"))
    assert begun.kind is OperationKind.SNAPSHOT
    assert begun.snapshot.startswith("20")
    store.close()
    with Store.open(data, QUIET) as again:
        assert again.run(ME, verbs.GetOperation(begun.id)) == begun
        assert again.run(ME, verbs.CreateSnapshot("m", begun.snapshot)) == begun
        for kind in (OperationKind.SNAPSHOT, OperationKind.RESTORE):
            assert isinstance(refused(again, verbs.StartOperation("m", kind)), InvalidArgument)


# --- Names, pages, limits -------------------------------------------------------------------------------------------


def test_an_id_names_one_snapshot(store: Store) -> None:
    done(store, verbs.CreateSnapshot("m", "one"))
    store.run(ME, verbs.CreateMemory("n", SPEC))
    assert isinstance(refused(store, verbs.CreateSnapshot("n", "one")), AlreadyExists)
    for wrong in ("..", "a/b", ".hidden", "a@b", "x" * 64, "a,b", "é"):
        for verb in (verbs.CreateSnapshot("m", wrong), verbs.GetSnapshot(wrong), verbs.RestoreSnapshot(wrong)):
            assert isinstance(refused(store, verb), InvalidArgument)
        assert isinstance(refused(store, verbs.DeleteSnapshot(wrong)), InvalidArgument)
    store.run(ME, verbs.DeleteSnapshot("one"))
    assert isinstance(refused(store, verbs.GetSnapshot("one")), NotFound)
    done(store, verbs.CreateSnapshot("n", "one"))


def test_snapshots_are_listed_in_pages_of_one_memory_or_of_all(store: Store) -> None:
    store.run(ME, verbs.CreateMemory("n", SPEC))
    for number in range(3):
        done(store, verbs.CreateSnapshot("m", f"m{number}"))
    done(store, verbs.CreateSnapshot("n", "n0"))
    page = store.run(ME, verbs.ListSnapshots("m", 2))
    assert [one.id for one in page.items] == ["m0", "m1"]
    assert [one.id for one in store.run(ME, verbs.ListSnapshots("m", 2, page.next)).items] == ["m2"]
    assert kept(store) == ["m0", "m1", "m2", "n0"]
    one = store.run(ME, verbs.GetSnapshot("m0"))
    about = store.run(ME, verbs.GetMemory("m"))
    assert (one.memory, one.documents, one.tokens) == ("m", about.documents, about.tokens)
    assert one.bytes >= about.bytes
    assert (one.shard, one.shards, one.missing, one.problem) == ("", (), (), "")


def test_limits_of_a_tenant_hold(data: Path) -> None:
    with Store.open(data, replace(QUIET, tenant_snapshots=2, tenant_memories=2)) as store:
        filled(store)
        for name in ("one", "two"):
            done(store, verbs.CreateSnapshot("m", name))
        assert isinstance(refused(store, verbs.CreateSnapshot("m", "three")), QuotaExceeded)
        done(store, verbs.RestoreSnapshot("one", "n"))
        assert isinstance(refused(store, verbs.RestoreSnapshot("one", "o")), QuotaExceeded)
        held = store.run(ME, verbs.GetMemory("m")).bytes
    with Store.open(data, replace(QUIET, tenant_bytes=3 * held - 1)) as store:
        assert isinstance(refused(store, verbs.RestoreSnapshot("one", "o")), QuotaExceeded)
    with Store.open(data, replace(QUIET, tenant_bytes=3 * held)) as store:
        done(store, verbs.RestoreSnapshot("one", "o"))


def test_a_foreign_snapshot_is_answered_as_one_that_does_not_exist(store: Store) -> None:
    done(store, verbs.CreateSnapshot("m", "one"))
    for make in (verbs.GetSnapshot, verbs.DeleteSnapshot, verbs.RestoreSnapshot):
        told = []
        for name in ("one", "two"):
            with pytest.raises(NotFound) as caught:
                store.run(OTHER, make(name))
            told.append((caught.value.code, caught.value.message.replace(name, "?")))
        assert told[0] == told[1]
    with pytest.raises(NotFound):
        store.run(OTHER, verbs.CreateSnapshot("m", "one"))
    assert kept(store, OTHER) == []
    store.run(OTHER, verbs.CreateMemory("m", SPEC))
    done(store, verbs.CreateSnapshot("m", "one"), OTHER)  # Ids are a tenant's own.
    store.run(OTHER, verbs.DeleteSnapshot("one"))
    assert kept(store) == ["one"]


def test_tenants_of_any_name_have_directories_of_their_own(store: Store, data: Path) -> None:
    for tenant in ("..", "a/b", "a,b", "=", "é" * 200):
        who = Identity(tenant, Role.ADMIN)
        store.run(who, verbs.CreateMemory("m", SPEC))
        done(store, verbs.CreateSnapshot("m", "one"), who)
        assert kept(store, who) == ["one"]
        done(store, verbs.RestoreSnapshot("one", "n"), who)
    assert len(list((data / "snapshots").iterdir())) == 5
    assert kept(store) == []


def test_in_ram_there_are_no_snapshots_and_it_says_why() -> None:
    with Store.open(None, QUIET) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        every = (verbs.CreateSnapshot("m", "a"), verbs.GetSnapshot("a"), verbs.ListSnapshots())
        for verb in (*every, verbs.DeleteSnapshot("a"), verbs.RestoreSnapshot("a")):
            problem = refused(store, verb)
            assert isinstance(problem, FailedPrecondition)
            assert "in RAM" in problem.message


# --- Cancelled ------------------------------------------------------------------------------------------------------


class Gate(TwoDisks):
    """Files under the other disk are read and written one at a time, as a test lets them."""

    def __init__(self, other: Path):
        super().__init__(other)
        self.arrived, self.go = threading.Event(), threading.Event()

    def pread(self, file, out: memoryview, offset: int) -> None:  # type: ignore[no-untyped-def]
        if file.path.name.startswith("seg-") and offset:
            self.arrived.set()
            assert self.go.wait(10)
        super().pread(file, out, offset)


@pytest.mark.parametrize("what", ["create", "restore", "delete the memory", "close"])
def test_what_is_cancelled_leaves_nothing(tmp_path: Path, what: str) -> None:
    other = tmp_path / "other"
    gate = Gate(other)
    gate.go.set()
    with Store.open(tmp_path / "data", replace(QUIET, snapshots=other), gate) as store:
        filled(store)
        done(store, verbs.CreateSnapshot("m", "one"))
        gate.go.clear()
        gate.arrived.clear()
        store.run(ME, verbs.DeleteDocument("m", "d0"))
        put(store, "m", document("d0", 300, SPEC, "large"))
        verb = verbs.RestoreSnapshot("one", "n") if what == "restore" else verbs.CreateSnapshot("m", "two")
        begun = store.run(ME, verb)
        assert gate.arrived.wait(10)
        if what == "restore":
            assert isinstance(refused(store, verbs.CreateMemory("n", SPEC)), AlreadyExists)
            assert isinstance(refused(store, verbs.DeleteSnapshot("one")), FailedPrecondition)
        if what == "delete the memory":
            store.run(ME, verbs.DeleteMemory("m"))
        elif what == "close":
            threading.Timer(0.05, gate.go.set).start()
            store.close()
        else:
            store.run(ME, verbs.CancelOperation(begun.id))
        gate.go.set()
        if what != "close":
            assert run(store, verbs.GetOperation(begun.id)).state is OperationState.CANCELLED
            assert kept(store) == ["one"]
            assert "n" not in names(store)
    assert [path.name for path in (other / "default").iterdir()] == ["one"]
    memories = [path for path in (tmp_path / "data/memories").iterdir() if any(path.iterdir())]
    assert len(memories) == (what != "delete the memory")
    assert not list((tmp_path / "data/unfinished").iterdir())


def test_what_is_restored_while_the_shard_map_changes_does_not_appear(tmp_path: Path) -> None:
    other = tmp_path / "other"
    gate = Gate(other)
    gate.go.set()
    with Store.open(tmp_path / "data", replace(QUIET, snapshots=other), gate) as store:
        filled(store)
        done(store, verbs.CreateSnapshot("m", "one"))
        gate.go.clear()
        begun = store.run(ME, verbs.RestoreSnapshot("one", "n"))
        store.run(ME, verbs.SetShardMap(ShardMap(1, (Shard("s0", ("a:1",)), Shard("s1", ("b:1",)))), "s0"))
        gate.go.set()
        ended = run(store, verbs.GetOperation(begun.id))
        assert (ended.state, "shard map changed" in ended.message) == (OperationState.FAILED, True)
        assert names(store) == ["m"]
        assert len(list((tmp_path / "data/memories").iterdir())) == 1


# --- Shards ---------------------------------------------------------------------------------------------------------


def test_a_shards_part_is_restored_into_the_same_shard_alone(data: Path, tmp_path: Path) -> None:
    two = ShardMap(1, (Shard("s0", ("a:1",)), Shard("s1", ("b:1",))))
    with Store.open(data, QUIET) as store:
        filled(store)
        done(store, verbs.CreateSnapshot("m", "before"))
        store.run(ME, verbs.SetShardMap(two, "s0"))
        done(store, verbs.CreateSnapshot("m", "one"))
        told = store.run(ME, verbs.GetSnapshot("one"))
        assert (told.shard, told.shards) == ("s0", ("s0", "s1"))
        assert refused(store, verbs.RestoreSnapshot("one", "again")).code == "OTHER_NAME"
        store.run(ME, verbs.DeleteMemory("m"))
        done(store, verbs.RestoreSnapshot("one"))
        assert "as many shards" in failed(store, verbs.RestoreSnapshot("before", "n"))
        moving = replace(two, epoch=2, also=(Shard("s0", ("a:1",)),))
        store.run(ME, verbs.SetShardMap(moving, "s0"))
        for verb in (verbs.RestoreSnapshot("one", "n"), verbs.CreateSnapshot("m", "two")):
            assert refused(store, verb).code == "MOVING"
    options = replace(QUIET, snapshots=data / "snapshots")
    with Store.open(tmp_path / "alone", options) as store:
        assert refused(store, verbs.RestoreSnapshot("one")).code == "OTHER_SHARDS"
        store.run(ME, verbs.SetShardMap(two, "s1"))
        assert refused(store, verbs.RestoreSnapshot("one")).code == "OTHER_SHARDS"
        # One root may serve several shards: an id is each one's own.
        store.run(ME, verbs.CreateMemory("m", SPEC))
        done(store, verbs.CreateSnapshot("m", "one"))
        assert {one.shard for one in store.run(ME, verbs.ListSnapshots()).items if one.id == "one"} == {"s0", "s1"}
        store.run(ME, verbs.DeleteSnapshot("one"))
        assert [(one.id, one.shard) for one in store.run(ME, verbs.ListSnapshots()).items] == [
            ("before", ""),
            ("one", "s0"),
        ]
