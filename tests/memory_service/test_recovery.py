"""A crash is finished; an acknowledgement survives a power loss at any point; a rebuild loses nothing."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from memory_service.errors import DataLoss, FotError
from memory_service.storage import segments
from memory_service.storage.catalog import Catalog
from memory_service.storage.memory_file import MemoryFile
from memory_service.storage.parts import SegmentRef
from memory_service.storage.records import MemoryRow
from memory_service.storage.segments import SegmentFiles
from memory_service.storage.tombstones import Tombstone, Tombstones
from memory_service.storage.vfs import File, OsVfs, Vfs
from memory_service.store import recovery
from memory_service.store.recovery import rebuild_catalog, recover
from tests.memory_service.faults import FaultVfs, flip_bit
from tests.memory_service.storage import KEY, SPEC, stage, visible


@dataclass
class Shelf:
    """The storage under a store, with the store's orders of steps and nothing else."""

    root: Path
    vfs: Vfs
    catalog: Catalog
    files: SegmentFiles

    @staticmethod
    def open(root: Path, vfs: Vfs, on_commit: Callable[[], None] | None = None) -> Shelf:
        catalog = Catalog.open(root / "catalog.sqlite", vfs=vfs, on_commit=on_commit)
        files = SegmentFiles(root, vfs)
        try:
            recover(catalog, files)
        except BaseException:
            catalog.close()
            files.close()
            raise
        return Shelf(root, vfs, catalog, files)

    def close(self) -> None:
        self.files.close()
        self.catalog.close()

    def create(self, key: str = KEY, name: str = "name") -> None:
        self.files.create_memory(key, MemoryFile("tenant", name, SPEC, 1.0))
        self.catalog.create_memory(MemoryRow(key, "tenant", name, SPEC, 1.0))

    def seal(self, *documents: tuple[str, int, int]) -> list[SegmentRef]:
        parts = [part for one in documents for part in stage(self.files, *one, ranges=_halves(one[2]))]
        return self.files.seal(KEY, SPEC, parts)

    def put(self, *documents: tuple[str, int, int]) -> None:
        """(id, generation, tokens) of each; replaces what is there."""
        self.catalog.commit(KEY, self.seal(*documents), replaced={one for one, _, _ in documents})

    def delete(self, document: str) -> None:
        (row,) = (one for one in self.catalog.documents(KEY) if one.id == document)
        self.catalog.tombstone(KEY, [row.pk])
        self.files.tombstones.add([Tombstone(KEY, document, row.generation)])

    def compact(self) -> None:
        old = self.catalog.segments(KEY)
        alive = [(row.id, row.generation, row.tokens) for row in self.catalog.documents(KEY)]
        self.catalog.compact(KEY, self.seal(*alive) if alive else (), [row.pk for row in old])
        for row in old:
            self.files.remove(KEY, row.ref.path)

    def delete_memory(self, key: str) -> None:
        self.catalog.delete_memory(key)
        self.files.tombstones.add([Tombstone(key, "", 0)])
        self.files.drop_memory(key)
        self.catalog.forget_memory(key)

    def visible(self) -> dict[str, int]:
        return visible(self.catalog, self.files)


def _halves(tokens: int) -> list[tuple[int, int]]:
    return [(0, tokens // 2), (tokens // 2, tokens - tokens // 2)]


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    found = Shelf.open(tmp_path, OsVfs())
    found.create()
    yield found
    found.close()


def reopened(shelf: Shelf) -> Shelf:
    shelf.close()
    again = Shelf.open(shelf.root, shelf.vfs)
    shelf.catalog, shelf.files = again.catalog, again.files
    return shelf


# --- Finishing --------------------------------------------------------------------------------------------------------


def test_a_sealed_document_the_catalogue_never_saw_is_adopted_whole(shelf: Shelf) -> None:
    shelf.put(("a", 1, 10))
    shelf.seal(("a", 2, 6), ("b", 3, 60_000))
    assert reopened(shelf).visible() == {"a": 2, "b": 3}
    assert shelf.catalog.memories()[0].next_generation == 4


def test_half_a_document_is_removed(shelf: Shelf) -> None:
    first_half, _ = stage(shelf.files, "a", 1, 10, ranges=_halves(10))
    shelf.files.seal(KEY, SPEC, [first_half])
    assert reopened(shelf).visible() == {}
    assert list(shelf.files.scan(KEY)) == []


def test_what_compaction_left_behind_is_removed_and_brings_nothing_back(shelf: Shelf) -> None:
    shelf.put(("a", 1, 10), ("b", 2, 10))
    shelf.put(("b", 3, 10))
    shelf.delete("a")
    old = [one.path for one in shelf.files.scan(KEY)]
    saved = {path: (shelf.root / "memories" / KEY / path).read_bytes() for path in old}
    shelf.compact()
    for path, data in saved.items():
        (shelf.root / "memories" / KEY / path).write_bytes(data)  # The unlinks did not survive.
    assert reopened(shelf).visible() == {"b": 3}
    assert len(list(shelf.files.scan(KEY))) == 1


def test_a_compaction_that_did_not_commit_is_removed(shelf: Shelf) -> None:
    shelf.put(("a", 1, 10))
    before = shelf.catalog.segments(KEY)
    shelf.seal(("a", 1, 10))
    assert reopened(shelf).visible() == {"a": 1} and shelf.catalog.segments(KEY) == before
    assert [one.path for one in shelf.files.scan(KEY)] == [before[0].ref.path]


def test_a_delete_reaches_the_log_although_it_was_interrupted(shelf: Shelf) -> None:
    shelf.put(("a", 1, 10), ("b", 2, 10))
    shelf.catalog.tombstone(KEY, [shelf.catalog.documents(KEY)[0].pk])
    assert reopened(shelf).files.tombstones.covers(KEY, "a", 1)
    assert not shelf.files.tombstones.covers(KEY, "b", 2)


def test_a_delete_the_catalogue_lost_is_taken_from_the_log(shelf: Shelf) -> None:
    shelf.put(("a", 1, 10), ("b", 2, 10))
    shelf.files.tombstones.add([Tombstone(KEY, "a", 1)])
    assert reopened(shelf).visible() == {"b": 2}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_deleted_memory_is_gone_after_any_step(shelf: Shelf, steps: int) -> None:
    shelf.put(("a", 1, 10))
    shelf.catalog.delete_memory(KEY)
    if steps >= 2:
        shelf.files.tombstones.add([Tombstone(KEY, "", 0)])
    if steps >= 3:
        shelf.files.drop_memory(KEY)
    reopened(shelf)
    assert shelf.catalog.memories() == [] == shelf.catalog.deleted_memories()
    assert shelf.files.memory_keys() == [] and shelf.files.tombstones.covers(KEY, "a", 1)


def test_a_memory_whose_creation_was_interrupted_is_created_or_dropped(shelf: Shelf) -> None:
    shelf.files.create_memory("whole", MemoryFile("tenant", "another", SPEC, 1.0))
    (shelf.root / "memories" / "half").mkdir()
    reopened(shelf)
    assert {row.name for row in shelf.catalog.memories()} == {"name", "another"}
    assert shelf.files.memory_keys() == [KEY, "whole"]


def test_a_missing_or_damaged_segment_is_told_and_others_are_served(shelf: Shelf) -> None:
    shelf.put(("a", 1, 10))
    shelf.put(("b", 2, 10))
    gone, kept = shelf.catalog.segments(KEY)
    (shelf.root / "memories" / KEY / gone.ref.path).unlink()
    report = recover(shelf.catalog, shelf.files)
    assert report.missing == [(KEY, gone.ref.path)]
    shelf.files.verify(KEY, kept.ref)
    with pytest.raises(DataLoss, match="missing"):
        shelf.files.verify(KEY, gone.ref)


def test_a_stranger_that_cannot_be_read_is_left_alone_and_told(shelf: Shelf) -> None:
    shelf.seal(("a", 1, 10))
    path = next((shelf.root / "memories" / KEY).glob("seg-*"))
    path.write_bytes(path.read_bytes()[:100])
    report = recover(shelf.catalog, shelf.files)
    assert len(report.problems) == 1 and path.name in report.problems[0] and path.exists()


# --- Rebuilding -------------------------------------------------------------------------------------------------------


def busy(shelf: Shelf) -> dict[str, int]:
    """A history with everything in it; returns what is visible at its end."""
    shelf.put(("a", 1, 10), ("b", 2, 10), ("c", 3, 60_000))
    shelf.put(("b", 4, 12))
    shelf.delete("a")
    shelf.compact()
    shelf.put(("d", 5, 10), ("a", 6, 8))
    shelf.put(("d", 7, 4))
    shelf.delete("a")
    return {"b": 4, "c": 3, "d": 7}


def test_an_empty_catalogue_beside_segments_is_not_believed(shelf: Shelf) -> None:
    expected = busy(shelf)
    shelf.close()
    (shelf.root / "catalog.sqlite").unlink()
    with pytest.raises(DataLoss, match="--rebuild-catalog"):
        Shelf.open(shelf.root, shelf.vfs)
    rebuild_catalog(shelf.root / "catalog.sqlite", shelf.root, shelf.vfs)
    assert reopened(shelf).visible() == expected


def test_a_rebuilt_catalogue_shows_what_the_old_one_did(shelf: Shelf) -> None:
    expected = busy(shelf)
    memories = shelf.catalog.memories()
    shelf.close()
    flip_bit(shelf.root / "catalog.sqlite", random.Random(1))
    report = rebuild_catalog(shelf.root / "catalog.sqlite", shelf.root, shelf.vfs)
    assert report.adopted == 3 and report.problems == []
    assert list(shelf.root.glob("catalog.sqlite.damaged-*"))
    assert reopened(shelf).visible() == expected and shelf.catalog.memories() == memories


@pytest.mark.parametrize("readable", [True, False], ids=["all segments are readable", "one is not"])
def test_what_a_rebuilt_catalogue_forgot_stays_deleted_after_the_log_was_trimmed(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    expected = busy(shelf) | {"e": 8}
    shelf.put(("e", 8, 10), ("f", 9, 10))
    shelf.delete("f")
    monkeypatch.setattr(recovery, "SPARE_TOMBSTONES", -1)
    monkeypatch.setattr(recovery, "REPLICA_DAYS", -1.0)
    if not readable:
        other = f"{shelf.seal(('z', 99, 4))[0].path}"
        (stray,) = shelf.root.rglob(other)
        stray.write_bytes(b"\x7f" * 8 + stray.read_bytes()[8:])
    lines = dict(shelf.files.tombstones.entries)
    shelf.close()
    for _ in range(3):
        rebuild_catalog(shelf.root / "catalog.sqlite", shelf.root, shelf.vfs)
        assert reopened(shelf).visible() == expected
        assert (dict(shelf.files.tombstones.entries) == lines) or readable
        shelf.close()
    shelf = Shelf.open(shelf.root, shelf.vfs)
    shelf.compact()
    assert reopened(shelf).visible() == expected
    assert not readable or not shelf.files.tombstones.entries  # No segment needs them any more.
    shelf.close()


def test_a_rebuild_between_the_two_copies_of_a_compaction_takes_every_part_once(shelf: Shelf) -> None:
    shelf.put(("a", 1, 10), ("b", 2, 10))
    shelf.put(("c", 3, 10))
    shelf.seal(("b", 2, 10), ("c", 3, 10))
    shelf.close()
    rebuild_catalog(shelf.root / "catalog.sqlite", shelf.root, shelf.vfs)
    assert reopened(shelf).visible() == {"a": 1, "b": 2, "c": 3}
    assert len(shelf.catalog.segments(KEY)) == 2


# --- Power loss -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_parts_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage parts of more than 1000 bytes in files, so that small documents take both ways."""
    monkeypatch.setattr(segments, "SMALL_PART_BYTES", 1000)


@pytest.mark.usefixtures("tiny_parts_on_disk")
def test_every_power_loss_keeps_what_was_acknowledged_and_shows_nothing_half(tmp_path: Path) -> None:
    (tmp_path / "live").mkdir()
    assert _lose_power_everywhere(tmp_path, FaultVfs(tmp_path / "live")) > 150


@pytest.mark.usefixtures("tiny_parts_on_disk")
@pytest.mark.parametrize(
    ("operation", "ending"),
    [
        ("fdatasync", ".safetensors"),
        ("fdatasync", ".part"),
        ("fdatasync", "memory.json.new"),
        ("fdatasync", "tombstones.log"),
        ("fsync_directory", KEY),
        ("fsync_directory", "memories"),
    ],
)
def test_any_forgotten_sync_would_be_noticed(tmp_path: Path, operation: str, ending: str) -> None:
    (tmp_path / "live").mkdir()
    vfs = FaultVfs(tmp_path / "live")
    vfs.forget_syncs(operation, ending)
    with pytest.raises((AssertionError, DataLoss)):
        _lose_power_everywhere(tmp_path, vfs)


def _lose_power_everywhere(tmp_path: Path, vfs: FaultVfs) -> int:
    """Run a history with everything in it, then look at every state a power loss can leave; returns how many."""
    live = vfs.root
    shelf = Shelf.open(live, vfs, lambda: vfs.note_catalog(live / "catalog.sqlite"))
    # (what is visible once acknowledged, the step)
    steps: list[tuple[dict[str, int] | None, Callable[[], None]]] = [
        ({}, shelf.create),
        ({"a": 1, "b": 2}, lambda: shelf.put(("a", 1, 10), ("b", 2, 3))),
        ({"a": 1, "b": 2, "c": 3}, lambda: shelf.put(("c", 3, 17))),
        ({"a": 1, "b": 4, "c": 3}, lambda: shelf.put(("b", 4, 5))),
        ({"b": 4, "c": 3}, lambda: shelf.delete("a")),
        ({"b": 4, "c": 3}, shelf.compact),
        ({"a": 5, "b": 4, "c": 3}, lambda: shelf.put(("a", 5, 4))),
        (None, lambda: shelf.delete_memory(KEY)),
    ]
    history: list[dict[str, int] | None] = [None]
    for after, step in steps:
        step()
        history.append(after)
        vfs.mark("acknowledged")
    shelf.close()
    states = 0
    for number, state in enumerate(vfs.power_loss_states(subsets=1, seed=7)):
        done = len(state.marks)
        allowed = history[done : done + 2]
        for rebuild in (False, True):  # Also if the catalogue is lost with the power.
            directory = tmp_path / f"state{number}"
            directory.mkdir()
            state.materialise(directory)
            if rebuild:
                rebuild_catalog(directory / "catalog.sqlite", directory, Unsynced())
            assert _look(directory) in allowed, (state.name, rebuild, allowed)
            Unsynced().remove_directory(directory)
        states += 1
    return states


def _look(directory: Path) -> dict[str, int] | None:
    """What is visible after recovery; None without the memory."""
    shelf = Shelf.open(directory, Unsynced())
    try:
        known = [row.key for row in shelf.catalog.memories()] == [KEY]
        assert shelf.files.memory_keys() == ([KEY] if known else [])
        assert shelf.visible() == {} or known
        return shelf.visible() if known else None
    finally:
        shelf.close()


class Unsynced(OsVfs):
    """For a look at a state that nobody needs afterwards."""

    def fdatasync(self, file: File) -> None:
        pass

    def fsync_directory(self, path: Path) -> None:
        pass


@pytest.mark.usefixtures("tiny_parts_on_disk")
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_failure_at_any_call_leaves_a_store_that_reopens_whole(tmp_path: Path, error: int) -> None:
    for nth in range(1, 40):
        root = tmp_path / str(nth)
        root.mkdir()
        allowed = _fail_at(root, nth, error)
        assert _look(root) in allowed, nth


def _fail_at(root: Path, nth: int, error: int) -> list[dict[str, int] | None]:
    """Run a short history whose call number `nth` fails; returns what may be visible after it."""
    vfs = FaultVfs(root)
    shelf = Shelf.open(root, vfs)
    vfs.fail("any", nth=nth, error=error)
    visible_after: list[dict[str, int] | None] = [None, {}, {"a": 1}, {"a": 1, "b": 2}, {"b": 2}]
    steps: list[Callable[[], None]] = [
        shelf.create,
        lambda: shelf.put(("a", 1, 10)),
        lambda: shelf.put(("b", 2, 17)),
        lambda: shelf.delete("a"),
    ]
    done = 0
    with suppress(FotError):
        for step in steps:
            step()
            done += 1
    vfs.heal()
    shelf.close()
    return visible_after[done : done + 2]


# --- The tombstone log ------------------------------------------------------------------------------------------------


def test_tombstones_are_read_back_and_a_damaged_line_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "tombstones.log"
    log = Tombstones(path, OsVfs())
    log.add([Tombstone(KEY, "a", 3), Tombstone(KEY, 'b"\n', 1)])
    log.add([Tombstone(KEY, "a", 2), Tombstone("other", "", 0)])
    log.close()
    text = path.read_bytes()
    assert text.rstrip(b"\0").count(b"\n") == 3  # What was covered before costs no line.
    again = Tombstones(path, OsVfs())
    assert again.entries == {(KEY, "a"): 3, (KEY, 'b"\n'): 1, ("other", ""): 0} and again.damaged_lines == 0
    again.close()
    path.write_bytes(text.replace(b'"a",3', b'"a",9'))
    damaged = Tombstones(path, OsVfs())
    assert not damaged.covers(KEY, "a", 3) and damaged.damaged_lines == 1
    damaged.add([Tombstone(KEY, "c", 1)])
    damaged.close()
    assert Tombstones(path, OsVfs()).covers(KEY, "c", 1)


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "tombstones.log"
    log = Tombstones(path, OsVfs())
    log.add([Tombstone(KEY, "a", 1)])
    log.add([Tombstone(KEY, "b", 1)])
    log.close()
    whole = path.read_bytes()
    length = len(whole.rstrip(b"\0"))
    for cut in range(length // 2 + 1, length - 1):
        path.write_bytes(whole[:cut].ljust(len(whole), b"\0"))
        torn = Tombstones(path, OsVfs())
        torn.add([Tombstone(KEY, "c", 1)])
        torn.close()
        again = Tombstones(path, OsVfs())
        assert again.entries == {(KEY, "a"): 1, (KEY, "c"): 1}
        again.close()


def test_deletes_still_reach_the_log_of_a_full_disk(tmp_path: Path) -> None:
    vfs = FaultVfs(tmp_path)
    log = Tombstones(tmp_path / "tombstones.log", vfs)
    vfs.fail("allocate", times=1000)
    log.add(Tombstone(KEY, f"d{number}", 1) for number in range(100))
    assert log.covers(KEY, "d99", 1)


def test_a_failed_line_is_written_with_the_next(tmp_path: Path) -> None:
    vfs = FaultVfs(tmp_path)
    log = Tombstones(tmp_path / "tombstones.log", vfs)
    vfs.fail("pwrite")
    with pytest.raises(FotError):
        log.add([Tombstone(KEY, "a", 1)])
    log.add([Tombstone(KEY, "b", 1)])
    log.close()
    assert set(Tombstones(tmp_path / "tombstones.log", OsVfs()).entries) == {(KEY, "a"), (KEY, "b")}


def test_a_rewritten_log_holds_what_was_kept(tmp_path: Path) -> None:
    log = Tombstones(tmp_path / "tombstones.log", OsVfs())
    log.add(Tombstone(KEY, f"d{number}", 1) for number in range(3000))
    log.rewrite([Tombstone(KEY, "d7", 1)])
    log.add([Tombstone(KEY, "after", 2)])
    log.close()
    assert Tombstones(tmp_path / "tombstones.log", OsVfs()).entries == {(KEY, "d7"): 1, (KEY, "after"): 2}
