"""A service whose disk was lost begins with its snapshots, whole, before it answers; others begin as they are."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from memory_service import Client, Unavailable, verbs
from memory_service.cli import serve
from memory_service.errors import DataLoss, FailedPrecondition, FotError, InvalidArgument
from memory_service.server.server import running
from memory_service.settings import ServerSettings, StoreOptions
from memory_service.shards import Shard, ShardMap
from memory_service.storage.vfs import StorageFailed
from memory_service.store.beginning import NOTE
from memory_service.store.store import Store
from memory_service.types.callers import Identity, Role
from tests.memory_service.kept import SPEC, TwoDisks, done, filled, look, names
from tests.memory_service.oracle import ME, document, put
from tests.memory_service.test_cli import served

OTHER = Identity("other", Role.ADMIN)


def beginning(root: Path, **more: object) -> StoreOptions:
    return StoreOptions(background=False, snapshots=root / "snapshots", begin_from_snapshots=True, **more)  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two snapshots of `m` (`one`, then `two`), one of another tenant's memory; and the data they were taken of."""
    with Store.open(tmp_path / "data", replace(beginning(tmp_path), begin_from_snapshots=False)) as store:
        filled(store)
        done(store, verbs.CreateSnapshot("m", "z-one"))
        put(store, "m", document("d7", 20, SPEC, "7"))
        done(store, verbs.CreateSnapshot("m", "a-two"))
        store.run(OTHER, verbs.CreateMemory("theirs", SPEC))
        done(store, verbs.CreateSnapshot("theirs", "one"), OTHER)
    return tmp_path


@contextmanager
def lost(root: Path, **more: object) -> Iterator[Store]:
    """The store after its disk was lost."""
    shutil.rmtree(root / "data", ignore_errors=True)
    with Store.open(root / "data", beginning(root, **more)) as store:
        yield store


def test_every_memory_comes_back_as_it_was_in_its_newest_snapshot(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Store.open(root / "data", beginning(root)) as store:  # It has a catalogue: nothing begins.
        before = look(store)
        store.run(ME, verbs.DeleteDocument("m", "d0"))
        assert "d0" not in {one.id for one in store.run(ME, verbs.ListDocuments("m")).items}
    with caplog.at_level(logging.INFO, "memory_service"), lost(root) as store:
        assert store.ready
        assert look(store) == before
        assert (names(store), names(store, OTHER)) == (["m"], ["theirs"])
        assert not (root / "data" / NOTE).exists()
        # As an empty store could, it can still be told where it belongs.
        assert store.run(ME, verbs.GetShardMap()).map is None
        told = ShardMap(1, (Shard("s0", ("a:1",)), Shard("s1", ("b:1",))))
        assert store.run(ME, verbs.SetShardMap(told, "s0")).shard == "s0"
        put(store, "m", document("d8", 20, SPEC, "8"))
    restored = [one.fields for one in caplog.records if one.getMessage() == "restored from a snapshot"]  # type: ignore[attr-defined]
    assert [(one["memory"], one["snapshot"]) for one in restored] == [("m", "a-two"), ("theirs", "one")]
    assert all(one["taken"].startswith("20") for one in restored)


@pytest.mark.parametrize("name", ["snapshot.json", "contents.json", "seg-"])
def test_where_the_newest_is_damaged_the_one_before_is_taken_and_the_log_says_so(
    root: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = next(one for one in sorted((root / "snapshots/default/a-two").iterdir()) if one.name.startswith(name))
    shutil.copyfile(path, root / "sound")
    path.unlink()  # It may be linked elsewhere.
    path.write_bytes((root / "sound").read_bytes()[:-9])
    with caplog.at_level(logging.ERROR, "memory_service"), lost(root) as store:
        assert [one.id for one in store.run(ME, verbs.ListDocuments("m")).items] == ["d0", "d1", "d3"]
    assert "damaged; " in caplog.text
    assert any(one.levelno == logging.ERROR for one in caplog.records)


def test_a_memory_without_a_whole_snapshot_is_not_left_out_in_silence(root: Path) -> None:
    for name in ("z-one", "a-two"):
        (root / "snapshots/default" / name / "contents.json").write_text("{}")
    for _ in range(2):  # What has begun goes on at the next start, asked or not.
        with pytest.raises(DataLoss, match="no snapshot of memory m of tenant default is whole"), lost(root):
            pass
    with pytest.raises(DataLoss), Store.open(root / "data", replace(beginning(root), begin_from_snapshots=False)):
        pass
    (root / "snapshots/default/a-two/memory.json").write_text("{}")
    (root / "snapshots/default/a-two/snapshot.json").write_text("{}")
    with pytest.raises(DataLoss, match="does not say which memory"), lost(root):
        pass
    shutil.rmtree(root / "snapshots/default/a-two")
    shutil.copytree(root / "snapshots/default/z-one", root / "snapshots/default/y-one")
    for name in ("z-one", "y-one"):
        (root / "snapshots/default" / name / "snapshot.json").write_text("{}")
    with pytest.raises(DataLoss, match="no snapshot of memory m of tenant default is whole"), lost(root):
        pass
    shutil.rmtree(root / "snapshots/default")
    with Store.open(root / "data", beginning(root)) as store:
        assert names(store, OTHER) == ["theirs"]


def test_a_beginning_that_was_cut_off_goes_on(root: Path) -> None:
    class Failing(TwoDisks):
        left = 4

        def link(self, source: Path, target: Path) -> None:
            self.left -= 1
            if self.left < 0:
                raise StorageFailed("the disk failed")
            super().link(source, target)

    shutil.rmtree(root / "data")
    failing = Failing(root / "nowhere")
    with pytest.raises(FotError):
        while True:
            Store.open(root / "data", beginning(root), failing).close()
            failing.left = 0
            shutil.rmtree(root / "data")
    # Who looks for the snapshots elsewhere must not take what is there for all there is.
    with pytest.raises(FailedPrecondition, match="still being filled from the snapshots in"):
        Store.open(root / "data", StoreOptions(background=False))
    with Store.open(root / "data", replace(beginning(root), begin_from_snapshots=False)) as store:
        assert (names(store), names(store, OTHER)) == (["m"], ["theirs"])
        assert len(store.run(ME, verbs.ListDocuments("m")).items) == 4


def test_without_snapshots_it_begins_empty_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with lost(tmp_path) as store:
        assert names(store) == []
    assert "no snapshots to begin from" in caplog.text
    with pytest.raises(InvalidArgument, match="in RAM"):
        Store.open(None, beginning(tmp_path))


def test_a_lost_catalogue_is_rebuilt_and_not_begun_anew(root: Path) -> None:
    (root / "data/catalog.sqlite").unlink()
    with pytest.raises(DataLoss, match="--rebuild-catalog"):
        Store.open(root / "data", beginning(root))
    assert not (root / "data" / NOTE).exists()


def test_of_several_shards_under_one_root_it_must_be_said_whose(root: Path) -> None:
    shutil.rmtree(root / "snapshots")
    with Store.open(root / "data", replace(beginning(root), begin_from_snapshots=False)) as store:
        for epoch, shard in enumerate(("s0", "s1"), start=1):
            both = ShardMap(epoch, (Shard("s0", ("a:1",)), Shard("s1", ("b:1",))))
            store.run(ME, verbs.SetShardMap(both, shard))
            put(store, "m", document(f"of-{shard}", 5, SPEC, shard))
            done(store, verbs.CreateSnapshot("m", "one"))
    with pytest.raises(FailedPrecondition, match="--begin-from-shard"), lost(root):
        pass
    with lost(root, begin_from_shard="s0") as store:
        found = {one.id for one in store.run(ME, verbs.ListDocuments("m")).items}
        assert "of-s0" in found
        assert "of-s1" not in found


def test_until_it_has_begun_a_service_says_that_it_is_not_ready(root: Path) -> None:
    shutil.rmtree(root / "data")
    with Store.open(root / "data", beginning(root), begin=False) as store:
        assert store.beginning
        settings = ServerSettings(listen="127.0.0.1:0", drain_grace_s=0.0)
        with running(store, settings) as address, grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for service in ("", "read"):
                told = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
                assert told == health_pb2.HealthCheckResponse.NOT_SERVING
            with (
                Client.open(f"grpc://{address}", timeout_s=1.0) as client,
                pytest.raises(Unavailable, match="being filled from snapshots"),
            ):
                list(client.memories())
            store.begin()
            with Client.open(f"grpc://{address}") as client:
                assert [one.name for one in client.memories()] == ["m"]
    shutil.rmtree(root / "data")
    # Stopped before it has begun, it leaves the rest to the next start.
    Store.open(root / "data", beginning(root), begin=False).close()
    with Store.open(root / "data", replace(beginning(root), begin_from_snapshots=False)) as store:
        assert names(store) == ["m"]


def test_a_service_that_cannot_begin_ends_with_the_reason(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (root / "snapshots/default").glob("*/contents.json"):
        os.truncate(path, 3)
    shutil.rmtree(root / "data")
    sent: list[int] = []
    monkeypatch.setattr(serve.os, "kill", lambda process, number: sent.append(number))
    failed: list[FotError] = []
    with Store.open(root / "data", beginning(root), begin=False) as store:
        serve._begin(store, failed)
        assert not store.ready
    assert sent == [signal.SIGTERM]
    assert "no snapshot of memory m" in failed[0].message


def test_a_killed_server_leaves_whole_snapshots_and_memories_and_another_begins_with_them(root: Path) -> None:
    where = ("--listen", "127.0.0.1:0", "--snapshots", root / "snapshots")
    with served(root / "data", *where) as (process, line), Client.open(line.split()[-1]) as client:
        memory = client.memory("m")
        wanted = [one.id for one in memory.documents()]
        for number in range(3):
            memory.snapshot(f"zz-{number}")
            client.restore("a-two", f"again-{number}")
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    with Store.open(root / "data", replace(beginning(root), begin_from_snapshots=False)) as store:
        before = look(store)
        for one in store.run(ME, verbs.ListSnapshots()).items:
            if one.id.startswith("zz"):
                done(store, verbs.RestoreSnapshot(one.id, f"of-{one.id}"))
        for name in names(store):
            assert look(store, name) == before
        assert not list((root / "data/unfinished").iterdir())
    shutil.rmtree(root / "data")
    with served(root / "data", *where, "--begin-from-snapshots") as (process, line):
        with Client.open(line.split()[-1]) as client:
            assert [one.id for one in client.memory("m").documents()] == wanted
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert "restored from a snapshot" in process.stderr.read()
