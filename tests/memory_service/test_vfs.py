"""The real disk and the failing one."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from memory_service.errors import DataLoss, FailedPrecondition, ResourceExhausted
from memory_service.storage.vfs import CannotLink, OsVfs, StorageFailed, Vfs, replace_file
from tests.memory_service.faults import FaultVfs, flip_bit, truncate, zero_page


def test_a_file_is_allocated_at_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    vfs = OsVfs()
    vfs.make_directory(tmp_path / "a" / "b")
    vfs.close(vfs.create(tmp_path / "a" / "b" / "file", 10_000))
    found = (tmp_path / "a" / "b" / "file").stat()
    assert (found.st_size, stat.S_IMODE(found.st_mode)) == (10_000, 0o600)
    assert found.st_blocks * 512 >= 10_000
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700


def test_bytes_come_back_from_where_they_were_written(tmp_path: Path) -> None:
    vfs = OsVfs()
    file = vfs.create(tmp_path / "file", 8)
    vfs.pwrite(file, b"abc", 5)
    out = bytearray(4)
    vfs.pread(file, memoryview(out), 4)
    vfs.close(file)
    vfs.close(file)
    assert out == b"\0abc"


def test_reading_past_the_end_is_data_loss(tmp_path: Path) -> None:
    vfs = OsVfs()
    file = vfs.create(tmp_path / "file", 8)
    with pytest.raises(DataLoss, match="ends at byte 8"):
        vfs.pread(file, memoryview(bytearray(4)), 6)
    vfs.close(file)


def test_an_existing_file_is_not_created_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(StorageFailed, match="File exists"):
        OsVfs().create(tmp_path / "file", 4)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_size_no_disk_has_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted, match="free disk space"):
        OsVfs().create(tmp_path / "file", 1 << 60)
    assert not (tmp_path / "file").exists()


def test_names_are_sorted_and_missing_things_are_harmless(tmp_path: Path) -> None:
    vfs = OsVfs()
    for name in "cab":
        vfs.close(vfs.create(tmp_path / name, 0))
    assert vfs.list_directory(tmp_path) == ["a", "b", "c"]
    assert vfs.list_directory(tmp_path / "none") == []
    vfs.unlink(tmp_path / "none")
    vfs.remove_directory(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        vfs.file_size(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        vfs.read_file(tmp_path / "none")


def test_a_link_is_a_second_name_of_the_same_file(tmp_path: Path) -> None:
    vfs = OsVfs()
    (tmp_path / "file").write_bytes(b"mine")
    vfs.link(tmp_path / "file", tmp_path / "other")
    assert (tmp_path / "other").stat().st_ino == (tmp_path / "file").stat().st_ino
    with pytest.raises(StorageFailed, match="File exists"):
        vfs.link(tmp_path / "file", tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        vfs.link(tmp_path / "none", tmp_path / "third")
    (tmp_path / "symbolic").symlink_to("file")
    for name in ("symbolic", "."):
        with pytest.raises(DataLoss, match="not a regular file"):
            vfs.link(tmp_path / name, tmp_path / "third")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS])
def test_where_links_cannot_be_it_says_so_and_nothing_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "told so")

    (tmp_path / "file").write_bytes(b"mine")
    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(CannotLink):
        OsVfs().link(tmp_path / "file", tmp_path / "other")


def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path: Path) -> None:
    vfs = OsVfs()
    os.mkfifo(tmp_path / "file")
    file = vfs.open(tmp_path / "file")
    with pytest.raises(DataLoss):
        vfs.pread(file, memoryview(bytearray(1)), 0)
    vfs.close(file)


def test_a_small_file_beyond_its_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert OsVfs().read_file(tmp_path / "file", limit=5) == b"12345"
    with pytest.raises(DataLoss, match="longer than 4 bytes"):
        OsVfs().read_file(tmp_path / "file", limit=4)


def test_a_second_holder_of_the_lock_is_told_who_has_it(tmp_path: Path) -> None:
    vfs = OsVfs()
    lock = vfs.lock(tmp_path / "LOCK")
    take = "from memory_service.storage.vfs import OsVfs; OsVfs().lock(Path(sys.argv[1]))"
    script = f"import sys; from pathlib import Path; {take}"
    other = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "LOCK"], capture_output=True, text=True, check=False
    )
    assert "is in use by process" in other.stderr and other.returncode != 0
    with pytest.raises(FailedPrecondition, match="connect to it over gRPC"):
        vfs.lock(tmp_path / "LOCK")
    vfs.close(lock)
    vfs.close(vfs.lock(tmp_path / "LOCK"))


@pytest.mark.parametrize("operation", ["fdatasync", "fsync_directory", "pwrite", "rename"])
def test_an_io_error_while_writing_is_final(tmp_path: Path, operation: str) -> None:
    vfs = FaultVfs(tmp_path)
    vfs.fail(operation, error=errno.EIO)
    with pytest.raises(StorageFailed, match="read-only"):
        replace_file(vfs, tmp_path / "file", b"new")


@pytest.mark.parametrize("operation", ["create", "pwrite", "allocate"])
def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path: Path, operation: str) -> None:
    (tmp_path / "file").write_bytes(b"old")
    vfs = FaultVfs(tmp_path)
    vfs.fail(operation)
    with pytest.raises(ResourceExhausted):
        replace_file(vfs, tmp_path / "file", b"newer")
    assert vfs.list_directory(tmp_path) == ["file"]
    assert vfs.read_file(tmp_path / "file") == b"old"
    replace_file(vfs, tmp_path / "file", b"newer")
    assert vfs.read_file(tmp_path / "file") == b"newer"


def test_a_replaced_file_is_old_or_new_after_a_power_loss_and_new_once_acknowledged(tmp_path: Path) -> None:
    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "file").write_bytes(b"old" * 1000)
    vfs = FaultVfs(tmp_path / "live")
    replace_file(vfs, tmp_path / "live" / "file", b"new" * 1000)
    vfs.mark("done")
    seen = set()
    for state in vfs.power_loss_states(subsets=20):
        seen.add((bool(state.marks), state.files["file"][:3]))
        assert state.files["file"] in (b"old" * 1000, b"new" * 1000), state.name
    assert seen == {(False, b"old"), (False, b"new"), (True, b"new")}


def test_without_a_sync_the_simulated_power_loss_does_lose_data(tmp_path: Path) -> None:
    # The harness must be able to fail: the same replacement without its syncs is not safe.
    vfs: Vfs = FaultVfs(tmp_path)
    replace_file(vfs, tmp_path / "file", b"new" * 1000, sync=False)
    assert isinstance(vfs, FaultVfs)
    contents = {state.files.get("file") for state in vfs.power_loss_states(subsets=50)}
    assert None in contents and any(one is not None and one != b"new" * 1000 for one in contents)


def test_a_materialised_state_is_the_directory_it_describes(tmp_path: Path) -> None:
    live, again = tmp_path / "live", tmp_path / "again"
    live.mkdir()
    again.mkdir()
    vfs = FaultVfs(live)
    vfs.make_directory(live / "a" / "b")
    replace_file(vfs, live / "a" / "b" / "file", b"bytes")
    *_, everything = (one for one in vfs.power_loss_states(subsets=0) if one.name.endswith("everything"))
    everything.materialise(again)
    assert (again / "a" / "b" / "file").read_bytes() == b"bytes"
    *_, synced = (one for one in vfs.power_loss_states(subsets=0) if one.name.endswith("synced"))
    assert synced.files == {} and synced.directories == {"."}  # Nobody synced the directory that names "a".


@pytest.mark.parametrize("damage", [flip_bit, truncate, zero_page])
def test_damage_changes_the_file(tmp_path: Path, damage: object) -> None:
    (tmp_path / "file").write_bytes(bytes(range(1, 251)) * 100)
    before = (tmp_path / "file").read_bytes()
    assert callable(damage)
    damage(tmp_path / "file", random.Random(1))
    assert (tmp_path / "file").read_bytes() != before
