"""A full disk refuses writes and nothing else; a failing one makes the store read-only for good."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from memory_service import verbs
from memory_service.errors import FotError, ResourceExhausted, Unavailable
from memory_service.settings import StoreOptions
from memory_service.storage.vfs import StorageFailed
from memory_service.store.store import Store
from memory_service.types.documents import Document
from memory_service.types.operations import OperationKind, OperationState
from tests.memory_service.faults import FaultVfs
from tests.memory_service.oracle import (
    ME,
    MODEL,
    attend,
    document,
    error,
    everything_in_small_pieces,
    finish,
    put,
    reference,
    refused,
    spec_of,
)

SPEC = spec_of(dim=8)
OPTIONS = StoreOptions(background=False)
QUERIES = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
OLD = document("old", 30, SPEC, "old")
SMALL = document("small", 20, SPEC, "small")
LARGE = document("large", 200, SPEC, "large")  # Three parts, staged in files.
NEWER = document("old", 40, SPEC, "newer")


class DiskFull(Exception):
    """An operation ended because the disk was full."""


def _compact(store: Store) -> None:
    done = finish(store, "m", OperationKind.COMPACT)
    if done.state is not OperationState.DONE:
        raise DiskFull(done.message)


@dataclass(frozen=True)
class Step:
    """A change that may be repeated, and the documents there are after it."""

    name: str
    do: Callable[[Store], object]
    after: tuple[Document, ...]


STEPS = (
    Step("put a small one", lambda store: put(store, "m", SMALL, request_id="1"), (OLD, SMALL)),
    Step("put a large one", lambda store: put(store, "m", LARGE, request_id="2"), (OLD, SMALL, LARGE)),
    Step("replace", lambda store: put(store, "m", NEWER, replacing=True, request_id="3"), (NEWER, SMALL, LARGE)),
    Step("delete", lambda store: store.run(ME, verbs.DeleteDocument("m", "small", request_id="4")), (NEWER, LARGE)),
    Step("compact", _compact, (NEWER, LARGE)),
    Step("create", lambda store: store.run(ME, verbs.CreateMemory("n", SPEC)), (NEWER, LARGE)),
)


def holds(store: Store, documents: tuple[Document, ...]) -> bool:
    """Whether these documents are there, and no other, every byte of them."""
    infos = store.run(ME, verbs.ListDocuments("m")).items
    if {one.id: one.tokens for one in infos} != {one.id: one.tokens for one in documents}:
        return False
    for one in documents:
        got = store.run(ME, verbs.Fetch("m", one.id, 7, 0, one.tokens))
        assert torch.equal(got.keys, one.keys[1])
        assert torch.equal(got.values, one.values[1])
    keys, values = (torch.cat([getattr(one, which)[0] for one in documents], 1) for which in ("keys", "values"))
    assert error(attend(store, "m", 3, QUERIES), reference(QUERIES, keys, values)) <= 1e-5
    return True


@pytest.fixture
def disk(tmp_path: Path) -> FaultVfs:
    """A directory with one document, about to fail."""
    root = tmp_path / "data"
    with Store.open(root, OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        put(store, "m", OLD)
    return FaultVfs(root)


def calls_of(root: Path) -> dict[str, int]:
    """How often the steps call each operation when nothing fails."""
    copy = root.with_name("dry")
    shutil.copytree(root, copy)
    vfs = FaultVfs(copy)
    with everything_in_small_pieces(SPEC.bytes_per_token), Store.open(copy, OPTIONS, vfs) as store:
        vfs.calls.clear()
        for step in STEPS:
            step.do(store)
    return dict(vfs.calls)


WRITES = ("create", "allocate", "pwrite", "make_directory", "rename")
SYNCS = ("fsync", "fdatasync", "fsync_directory")


def test_a_full_disk_at_any_write_refuses_that_change_only(disk: FaultVfs, tmp_path: Path) -> None:
    calls = calls_of(disk.root)
    failures = 0
    for operation in WRITES:
        for nth in range(1, calls.get(operation, 0) + 1):
            root = tmp_path / f"{operation}-{nth}"
            shutil.copytree(disk.root, root)
            vfs = FaultVfs(root)
            with everything_in_small_pieces(SPEC.bytes_per_token), Store.open(root, OPTIONS, vfs) as store:
                vfs.fail(operation, nth=nth, error=errno.ENOSPC, times=10_000)
                failures += walk_on_a_full_disk(store, vfs, f"{operation} {nth}")
            with Store.open(root, OPTIONS) as store:
                assert holds(store, STEPS[-1].after), f"{operation} {nth}"
                known = {ref.path for one in store._memories.all() for ref in one.segments.values()}
                assert {path.name for path in root.rglob("*.safetensors")} == known, f"{operation} {nth}"
            shutil.rmtree(root)
    assert failures >= sum(calls.get(operation, 0) for operation in WRITES) // 2


def walk_on_a_full_disk(store: Store, vfs: FaultVfs, note: str) -> int:
    """Take all steps; where the disk is full, nothing changes and reads go on, and with room the same works."""
    before: tuple[Document, ...] = (OLD,)
    failures = 0
    for step in STEPS:
        try:
            step.do(store)
        except (ResourceExhausted, DiskFull) as problem:
            failures += 1
            assert "disk" in str(problem), (note, step.name, problem)
            # A delete is in the catalogue before it is in the log.
            assert holds(store, before) or (step.name == "delete" and holds(store, step.after)), (note, step.name)
            assert store.ready, note
            vfs.heal()
            step.do(store)
        except FotError as problem:
            raise AssertionError(f"{note}: {step.name} ended with {problem!r}") from problem
        assert holds(store, step.after), (note, step.name)
        before = step.after
    return failures


def test_a_full_catalogue_refuses_commits_until_there_is_room(tmp_path: Path) -> None:
    with Store.open(tmp_path / "data", OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        put(store, "m", OLD)
        database = store._catalog._db._db
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")
        refusals = 0
        stored = [OLD]
        for number in range(200):
            one = document(f"x{number}", 1, SPEC, number, {"text": "x" * 2000})
            try:
                put(store, "m", one, request_id=str(number))
                stored.append(one)
            except ResourceExhausted as problem:
                assert problem.code == "DISK_FULL"
                refusals += 1
                assert holds(store, tuple(stored))
            if refusals == 3:
                break
        assert refusals == 3
        assert len(list(tmp_path.rglob("*.safetensors"))) == len(stored)  # What could not be committed is gone again.
        store.run(ME, verbs.DeleteDocument("m", "old"))
        database.execute("PRAGMA max_page_count = 100000")
        put(store, "m", SMALL)
        assert holds(store, (*stored[1:], SMALL))


def test_room_made_by_deletes_is_used_without_a_restart(disk: FaultVfs) -> None:
    with everything_in_small_pieces(SPEC.bytes_per_token), Store.open(disk.root, OPTIONS, disk) as store:
        put(store, "m", LARGE)
        disk.fail("create", error=errno.ENOSPC, times=10_000)
        disk.fail("pwrite", nth=50, error=errno.ENOSPC, times=10_000)
        assert isinstance(refused(store, verbs.PutDocument("m", SMALL, MODEL)), ResourceExhausted)
        before = sum(path.stat().st_size for path in disk.root.rglob("*.safetensors"))
        store.run(ME, verbs.DeleteDocument("m", "large"))
        assert finish(store, "m", OperationKind.COMPACT).state is OperationState.DONE  # Nothing to write: all dead.
        assert sum(path.stat().st_size for path in disk.root.rglob("*.safetensors")) < before
        disk.heal()
        put(store, "m", SMALL)
        assert holds(store, (OLD, SMALL))


def test_an_upload_a_full_disk_cannot_hold_is_refused_before_a_byte_is_sent(disk: FaultVfs) -> None:
    with everything_in_small_pieces(SPEC.bytes_per_token), Store.open(disk.root, OPTIONS, disk) as store:
        disk.fail("create", error=errno.ENOSPC, times=10_000)
        found = refused(store, verbs.BeginUpload("m", "large", 5000, MODEL))
        assert isinstance(found, ResourceExhausted)
        disk.heal()
        assert list((disk.root / "staging").iterdir()) == []


@pytest.mark.parametrize("operation", [*SYNCS, "pwrite"])
def test_an_io_error_at_any_sync_or_write_makes_the_store_read_only_for_good(
    disk: FaultVfs, tmp_path: Path, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    count = calls_of(disk.root).get(operation, 0)
    failed = 0
    for nth in range(1, count + 1):
        root = tmp_path / str(nth)
        shutil.copytree(disk.root, root)
        vfs = FaultVfs(root)
        allowed: list[tuple[Document, ...]] = [(OLD,)]
        with everything_in_small_pieces(SPEC.bytes_per_token), Store.open(root, OPTIONS, vfs) as store:
            vfs.fail(operation, nth=nth, error=errno.EIO)
            for step in STEPS:
                try:
                    step.do(store)
                except (StorageFailed, DiskFull):
                    failed += 1
                    allowed.append(step.after)
                    break
                allowed = [step.after]
            else:
                raise AssertionError(f"{operation} {nth} failed and nobody heard of it")
            assert store.read_only_reason, (nth, step.name)
            assert not store.ready
            vfs.heal()
            for verb in (
                verbs.PutDocument("m", document("z", 1, SPEC, 1), MODEL),
                verbs.DeleteDocument("m", "old"),
                verbs.CreateMemory("o", SPEC),
                verbs.StartOperation("m", OperationKind.COMPACT),
            ):
                found = refused(store, verb)
                assert isinstance(found, Unavailable), (nth, found)
                assert found.code == "READ_ONLY"
            assert any(holds(store, one) for one in allowed), (nth, step.name)
        with Store.open(root, OPTIONS) as store:
            assert any(holds(store, one) for one in allowed), (nth, step.name)
            put(store, "m", document("z", 1, SPEC, 1))
        shutil.rmtree(root)
    assert failed == count
    assert count or operation == "fsync"


def test_sessions_and_attention_go_on_when_the_store_is_read_only(disk: FaultVfs) -> None:
    with Store.open(disk.root, OPTIONS, disk) as store:
        disk.fail("fdatasync", error=errno.EIO)
        with pytest.raises(StorageFailed):
            put(store, "m", SMALL)
        session = store.run(ME, verbs.OpenSession("m", MODEL))
        assert store.run(ME, verbs.RenewSession("m", session.id)).tokens == (0, 0)
        assert holds(store, (OLD,))


def test_a_failed_background_sync_of_an_upload_ends_it(disk: FaultVfs) -> None:
    with everything_in_small_pieces(SPEC.bytes_per_token), Store.open(disk.root, OPTIONS, disk) as store:
        disk.fail("fdatasync", error=errno.EIO)
        with pytest.raises(StorageFailed):
            put(store, "m", LARGE)
        assert store.read_only_reason
        assert holds(store, (OLD,))
