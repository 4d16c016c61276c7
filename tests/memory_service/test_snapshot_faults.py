"""The disk fails, fills up or loses its power at any step of a snapshot or a restore: it is whole, or it is not."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from memory_service import verbs
from memory_service.errors import FotError
from memory_service.settings import StoreOptions
from memory_service.storage.vfs import CannotLink, OsVfs, Vfs, storage_error
from memory_service.store.recovery import rebuild_catalog
from memory_service.store.store import Store
from memory_service.types.operations import OperationState
from tests.memory_service.faults import FaultVfs, State
from tests.memory_service.kept import SPEC, done, kept, look, names, run
from tests.memory_service.oracle import ME, document, everything_in_small_pieces, put
from tests.memory_service.test_power_loss import Hasty, different

# Operation -> every which call of it fails in its turn.
STRIDES = {"create": 2, "pwrite": 1, "pread": 5, "fdatasync": 1}
MORE = {"create": 1, "link": 1, "fsync_directory": 1, "rename": 1, "unlink": 2, "make_directory": 1}
CREATE, RESTORE = verbs.CreateSnapshot("m", "one"), verbs.RestoreSnapshot("one", "n")


class Disks(FaultVfs):
    """Data and snapshots on one disk, or on two; failing where told."""

    def __init__(self, root: Path, two: bool):
        super().__init__(root)
        self.two = two
        self.failed_in_data = False

    def _step(self, operation: str, path: Path) -> None:
        try:
            super()._step(operation, path)
        except FotError:
            self.failed_in_data = self.root / "data" in (path, *path.parents)
            raise

    def link(self, source: Path, target: Path) -> None:
        if self.two and ("snapshots" in source.parts) != ("snapshots" in target.parts):
            raise CannotLink("another disk")
        try:
            super().link(source, target)
        except FotError:
            self.failed_in_data = self.root / "data" in target.parents
            raise


@pytest.fixture(autouse=True, scope="module")
def _small_pieces() -> Iterator[None]:
    with everything_in_small_pieces(SPEC.bytes_per_token):
        yield


def options(root: Path) -> StoreOptions:
    return StoreOptions(background=False, snapshots=root / "snapshots")


def opened(root: Path, vfs: Vfs | None = None) -> Store:
    return Store.open(root / "data", options(root), vfs)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small memory with a replaced and a deleted document, and a snapshot of it, `zero`."""
    root = tmp_path_factory.mktemp("template")
    with opened(root) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        for name, tokens in (("a", 20), ("b", 30), ("c", 60)):
            put(store, "m", document(name, tokens, SPEC, name))
        put(store, "m", document("b", 25, SPEC, "b2"), replacing=True)
        done(store, verbs.CreateSnapshot("m", "zero"))
        store.run(ME, verbs.DeleteDocument("m", "a"))
    return root


@pytest.mark.parametrize("two", [False, True], ids=["one disk", "two disks"])
def test_any_failing_operation_ends_a_snapshot_or_a_restore_cleanly(template: Path, tmp_path: Path, two: bool) -> None:
    failures = 0
    for operation, stride in (STRIDES if two else STRIDES | MORE).items():
        nth = 1
        while fault_is_met(template, tmp_path / f"{operation}-{nth}", operation, nth, two):
            nth, failures = nth + stride, failures + 1
    assert failures >= 20


def fault_is_met(template: Path, root: Path, operation: str, nth: int, two: bool) -> bool:
    """Keep and restore a memory with one operation failing; whether there were so many."""
    error = errno.EIO if (nth + len(operation)) % 2 else errno.ENOSPC
    note = f"{operation} {nth} {errno.errorcode[error]}"
    shutil.copytree(template, root)
    vfs = Disks(root, two)
    with opened(root, vfs) as store:
        before = look(store)
        vfs.fail(operation, nth=nth, error=error)
        states = [ended(store, verb) for verb in (CREATE, RESTORE)]
        met = any(fault.seen >= fault.nth for fault in vfs._faults)
        vfs.heal()
        there = [("one" in kept(store)) == (states[0] is OperationState.DONE)]
        there += [("n" in names(store)) == (states[1] is OperationState.DONE)]
        assert all(there), (note, states)
        assert states.count(OperationState.DONE) == 2 or met, note
        assert look(store) == before, note
        # Only what is written into the data directory can make the store doubt its disk.
        assert store.read_only_reason is None or vfs.failed_in_data, note
    with opened(root, Hasty()) as store:
        for state, found in zip(states, ("one" in kept(store), "n" in names(store)), strict=True):
            assert found or state is not OperationState.DONE, (note, states)
        if "one" not in kept(store):
            done(store, CREATE)
        if "n" not in names(store):
            done(store, RESTORE)
        assert look(store, "n") == before, note
        known = {ref.path for one in store._memories.all() for ref in one.segments.values()}
        assert {path.name for path in (root / "data/memories").rglob("seg-*")} == known, note
        assert {path.name for path in (root / "snapshots/default").iterdir()} == {"zero", "one"}, note
    shutil.rmtree(root)
    return met


def ended(store: Store, verb: verbs.CreateSnapshot | verbs.RestoreSnapshot) -> OperationState:
    try:
        return run(store, verb).state
    except FotError:
        return OperationState.FAILED


# --- Power ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["one disk", "two disks"])
def disk(request: pytest.FixtureRequest, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Disks:
    """The log of a snapshot, a restore, and the deletion of both."""
    root = tmp_path_factory.mktemp("power")
    shutil.copytree(template, root, dirs_exist_ok=True)
    vfs = Disks(root, request.param)
    with opened(root, vfs) as store:
        steps: list[tuple[str, Callable[[], object]]] = [
            ("kept", lambda: done(store, CREATE)),
            ("restored", lambda: done(store, RESTORE)),
            ("deleted", lambda: store.run(ME, verbs.DeleteSnapshot("one"))),
        ]
        for label, step in steps:
            step()
            vfs.mark(label)
    return vfs


def test_after_a_power_loss_at_any_point_all_that_is_there_is_whole(disk: Disks, tmp_path: Path) -> None:
    looked_at = 0
    for state in different(disk.power_loss_states(subsets=0 if disk.two else 1, seed=3)):
        directory = tmp_path / str(looked_at)
        directory.mkdir()
        try:
            look_at(state, directory)
        except Exception as problem:
            raise AssertionError(f"after {state.marks[-1:]}, {state.name}") from problem
        shutil.rmtree(directory)
        looked_at += 1
    assert looked_at >= 40


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_after_a_power_loss_whatever_mixture_survives_is_whole(disk: Disks, tmp_path: Path) -> None:
    subsets, seed = int(os.environ.get("FOT_SOAK_MIXTURES", "20")), time.time_ns() % 1_000_000
    print(f"seed {seed}")
    for number, state in enumerate(different(disk.power_loss_states(subsets, seed))):
        (tmp_path / str(number)).mkdir()
        look_at(state, tmp_path / str(number))
        shutil.rmtree(tmp_path / str(number))


def look_at(state: State, root: Path) -> None:
    state.materialise(root)
    marks = state.marks
    with opened(root, Hasty()) as store:
        if "kept" in marks and "restored" not in marks:
            assert "one" in kept(store), "an acknowledged snapshot is gone"
        assert "deleted" not in marks or "one" not in kept(store), "a deleted snapshot came back"
        if "restored" in marks:
            assert "n" in names(store)
        assert {path.name for path in (root / "snapshots/default").iterdir()} == {"zero", *kept(store)}
        if "one" in kept(store):
            done(store, verbs.RestoreSnapshot("one", "o"))
        for name in {"n", "o"} & set(names(store)):
            assert look(store, name) == look(store), name
        known = {ref.path for one in store._memories.all() for ref in one.segments.values()}
        assert {path.name for path in (root / "data/memories").rglob("seg-*")} == known


def test_a_rebuilt_catalogue_knows_a_restored_memory_whole_or_not_at_all(disk: Disks, tmp_path: Path) -> None:
    for number, state in enumerate(different(disk.power_loss_states(subsets=0))):
        if number % 6:
            continue
        root = tmp_path / str(number)
        root.mkdir()
        state.materialise(root)
        rebuild_catalog(root / "data/catalog.sqlite", root / "data", Hasty())
        with opened(root, Hasty()) as store:
            if "n" in names(store):
                assert look(store, "n")["bytes"] == look(store)["bytes"], state.name
            assert "n" in names(store) or "restored" not in state.marks
        shutil.rmtree(root)


# --- A disk that is not the store's ---------------------------------------------------------------------------------


def test_a_snapshot_disk_that_is_full_or_fails_leaves_the_store_as_it_was(template: Path, tmp_path: Path) -> None:
    class Elsewhere(OsVfs):
        error = errno.ENOSPC

        def pwrite(self, file, data, offset):  # type: ignore[no-untyped-def]
            if "snapshots" in file.path.parts:
                raise storage_error(OSError(self.error, "told so"), "write", file.path)
            super().pwrite(file, data, offset)

        def link(self, source: Path, target: Path) -> None:
            raise CannotLink("another disk")

    root = tmp_path / "root"
    shutil.copytree(template, root)
    vfs = Elsewhere()
    with opened(root, vfs) as store:
        told = run(store, verbs.CreateSnapshot("m", "two"))
        assert (told.state, "--snapshots" in told.message) == (OperationState.FAILED, True)
        vfs.error = errno.EIO
        told = run(store, verbs.CreateSnapshot("m", "two"))
        assert (told.state, "cannot be used" in told.message) == (OperationState.FAILED, True)
        assert store.read_only_reason is None
        put(store, "m", document("d8", 5, SPEC, "8"))
        assert kept(store) == ["zero"]
    with Store.open(root / "data", replace(options(root), snapshots=root / "data/LOCK")) as store:
        with pytest.raises(FotError):
            store.run(ME, verbs.ListSnapshots())
        put(store, "m", document("d9", 5, SPEC, "9"))
