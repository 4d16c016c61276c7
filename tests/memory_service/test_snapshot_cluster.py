"""A cluster's snapshot is one part a shard under one id; restored, every replica has it again."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from memory_service import (
    AlreadyExists,
    Client,
    FailedPrecondition,
    FotError,
    InvalidArgument,
    Memory,
    NotFound,
    OperationState,
    Unavailable,
)
from memory_service.client import connection
from memory_service.cluster.caretaker import Caretaker
from memory_service.cluster.place import ClusterPlace
from memory_service.cluster.snapshots import HOLD_S
from memory_service.store import snapshots
from memory_service.types.operations import Operation
from memory_service.verbs import GetMemory, RestoreSnapshot
from tests.memory_service.clusters import LAYER, SPEC, Service, drawn, restartable, target, until
from tests.memory_service.places import QUIET

IDS = [f"doc-{number}" for number in range(8)]
QUERIES = torch.randn(4, 3, SPEC.head_dim, generator=torch.Generator().manual_seed(7))
OWN, SHARED = "own roots", "one root"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "POLL_S", 0.01)


@pytest.fixture(params=[OWN, SHARED])
def pairs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Service]]:
    """Two shards of two replicas each, with snapshots in their own directories or all under one root."""
    options = QUIET if request.param == OWN else replace(QUIET, snapshots=tmp_path / "snapshots")
    with restartable(tmp_path, 4, options) as found:
        yield found


def of(found: Sequence[Service]) -> str:
    return target([one.address for one in found], "replicas=2")


def filled(client: Client) -> Memory:
    memory = client.memory("m", SPEC)
    for number, name in enumerate(IDS):
        memory.put(name, *drawn(number, 3 + number), metadata={"number": number})
    return memory


def look(memory: Memory) -> tuple[Any, ...]:
    """Documents with their generations, and an answer."""
    answer = memory.attend(LAYER, QUERIES, top_k=5)
    return list(memory.documents()), answer.output.tolist(), answer.lse.tolist(), answer.coverage


def begin_at(client: Client, turn: int) -> None:
    """Which replica of each shard the client asks first; by chance otherwise."""
    cast(ClusterPlace, client.connection.place).router.health._turn = turn


def ended(client: Client, operation: Operation) -> Operation:
    found = client.wait(operation, 30)
    assert found.state is OperationState.DONE, found
    return found


def test_a_clusters_memory_is_kept_and_comes_back_in_every_replica(pairs: list[Service]) -> None:
    with Client.open(of(pairs)) as client, Caretaker.open(of(pairs)) as keeper:
        begin_at(client, 0)  # Replicas have commit times of their own: look where the snapshot is taken.
        memory = filled(client)
        before, info = look(memory), memory.info()
        begun = ended(client, memory.snapshot("one"))
        assert (begun.snapshot, begun.memory) == ("one", "m")
        assert begun.message.startswith("snapshot one holds 8 documents of 2 shards, ")
        (told,) = client.snapshots("m")
        assert told == client.snapshot("one")
        assert (told.documents, told.tokens, told.shards, told.missing) == (8, info.tokens, ("s0", "s1"), ())
        memory.delete(IDS[0])
        memory.put("later", *drawn(99, 4))
        assert ended(client, memory.snapshot("one")).snapshot == "one"  # The same id again: the same snapshot.
        with pytest.raises(AlreadyExists):
            client.restore("one")
        client.delete("m")
        told = ended(client, client.restore("one"))
        assert told.message.startswith(f"memory m holds 8 documents again, {info.tokens} tokens")
        keeper.heal()
        again = client.memory("m")
        assert again.info().created_at == info.created_at
        assert look(again) == before
        status = keeper.status()
        assert status.whole
        assert [replica.documents for shard in status.shards for replica in shard.replicas] == [
            shard.replicas[0].documents for shard in status.shards for _ in shard.replicas
        ]
        with pytest.raises(FailedPrecondition, match="restore it as 'm'"):
            client.restore("one", "other")
        # Whoever dies now, another replica of its shard has all of it.
        for one in pairs[::2]:
            one.stop()
        documents = [(one.id, one.generation, dict(one.metadata)) for one in again.documents()]
        assert documents == [(one.id, one.generation, dict(one.metadata)) for one in before[0]]
        answer = again.attend(LAYER, QUERIES, top_k=5)
        assert torch.allclose(answer.output, torch.tensor(before[1]), atol=1e-6)


@pytest.mark.parametrize("pairs", [OWN], indirect=True)
def test_replicas_without_the_snapshot_answer_nothing_until_they_have_its_memory(pairs: list[Service]) -> None:
    with Client.open(of(pairs)) as client, Caretaker.open(of(pairs)) as keeper:
        memory = filled(client)
        ended(client, memory.snapshot("one"))
        client.delete("m")
        told = ended(client, client.restore("one"))
        assert "healed" in told.message
        status = keeper.status()
        for shard in status.shards:
            assert sorted(replica.behind for replica in shard.replicas) == [False, True]
        for _ in range(8):  # Whichever replica is asked first.
            with Memory.open(of(pairs), "m") as again:
                assert len(list(again.documents())) == len(IDS)
        assert keeper.heal().copied == len(IDS)
        assert "healed" in ended(client, client.operation(told.id)).message
        assert keeper.status().whole, "looking at the operation again must not make anyone lack anything"


@pytest.mark.parametrize("pairs", [SHARED], indirect=True)
def test_listings_join_shards_and_say_what_is_missing(pairs: list[Service]) -> None:
    with Client.open(of(pairs)) as client:
        memory = filled(client)
        for name in ("one", "two", "three"):
            ended(client, memory.snapshot(name))
        assert [one.id for one in client.snapshots()] == ["one", "three", "two"]
        roots = {one.options.snapshots or one.directory / "snapshots" for one in pairs}
        for root in roots:
            shutil.rmtree(root / "default/two@s1", ignore_errors=True)
            for path in root.glob("default/three@s0/snapshot.json"):
                path.write_text("{}")
        found = {one.id: one for one in client.snapshots()}
        assert (found["one"].missing, found["two"].missing, found["three"].missing) == ((), ("s1",), ("s0",))
        assert found["three"].problem.startswith("shard s0: ")
        client.delete("m")
        for name, told in (("two", "lacks its parts of shards s1"), ("three", "shards s0")):
            with pytest.raises(FailedPrecondition, match=told):
                client.restore(name)
        client.delete_snapshot("two")
        assert {one.id for one in client.snapshots()} == {"one", "three"}
        with pytest.raises(NotFound):
            client.delete_snapshot("two")
        with pytest.raises(NotFound):
            client.snapshot("two")
        with pytest.raises(InvalidArgument):
            client.snapshot("../one")
        ended(client, client.restore("one"))


@pytest.mark.parametrize("pairs", [OWN], indirect=True)
def test_a_damaged_part_fails_the_restore_and_says_what_to_do(pairs: list[Service]) -> None:
    with Client.open(of(pairs)) as client, Caretaker.open(of(pairs)) as keeper:
        ended(client, filled(client).snapshot("one"))
        client.delete("m")
        (part,) = [path for one in pairs for path in one.directory.glob("snapshots/default/one@s1")]
        segment = next(part.glob("seg-*"))
        data = bytearray(segment.read_bytes())
        data[-1] ^= 1
        segment.write_bytes(data)
        told = client.wait(client.restore("one"), 30)
        assert told.state is OperationState.FAILED
        assert segment.name in told.message
        assert "delete memory m" in told.message
        client.delete("m")
        with pytest.raises(Unavailable, match="heal the cluster, then restore"):
            client.restore("one")
        keeper.heal()
        data[-1] ^= 1
        segment.write_bytes(data)
        ended(client, client.restore("one"))


@pytest.mark.parametrize("pairs", [OWN], indirect=True)
def test_a_replica_that_is_away_or_behind_takes_no_part(pairs: list[Service]) -> None:
    with Client.open(of(pairs)) as client, Caretaker.open(of(pairs)) as keeper:
        memory = filled(client)
        pairs[0].stop()
        ended(client, memory.snapshot("one"))
        pairs[0].start()
        ended(client, memory.snapshot("two"))  # It is back, but may lack writes.
        assert not (pairs[0].directory / "snapshots").exists()
        client.delete("m")
        pairs[0].stop()
        with pytest.raises(Unavailable, match=pairs[0].address):
            client.run(RestoreSnapshot("one"), 1.0)
        pairs[0].start()
        keeper.heal()
        ended(client, client.restore("one"))
        keeper.heal()
        assert len(list(client.memory("m").documents())) == len(IDS)


@pytest.mark.parametrize("pairs", [OWN], indirect=True)
def test_a_process_that_is_just_coming_back_is_waited_for(pairs: list[Service]) -> None:
    """By what concerns every process, as by what concerns a document; and R = 1 is no worse than one service."""
    with Client.open(target([one.address for one in pairs])) as client:
        memory = filled(client)
        tokens = memory.info().tokens
        for step in (
            lambda: ended(client, memory.snapshot("one")),
            lambda: client.delete("m"),
            lambda: client.memory("other", SPEC),
            lambda: ended(client, client.restore("one")),
            lambda: ended(client, client.memory("m").start("compact")),
            lambda: client.delete_snapshot("one"),
        ):
            pairs[1].stop()
            with pytest.raises(Unavailable):
                client.connection.run(GetMemory("nothing"), 0.3)  # From now on the line pauses between attempts.
            back = threading.Timer(0.3, pairs[1].start)
            back.start()
            try:
                step()
            finally:
                back.join()
        assert client.memory("m").info().tokens == tokens
        assert [one.name for one in client.memories()] == ["m", "other"]
        assert list(client.snapshots()) == []


class Writer:
    """Stores documents one after the other, each once the one before is acknowledged; deletes every third of them."""

    def __init__(self, memory: Memory):
        self._memory = memory
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.failures: list[BaseException] = []
        self.written = 0

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._memory.put(f"w{self.written:04}", *drawn(self.written, 2))
                self.written += 1
                if self.written % 3 == 0:
                    self._memory.delete(f"w{self.written - 1:04}")
        except BaseException as error:
            self.failures.append(error)


def kept_at(root: Path, name: str) -> set[str]:
    """The documents that the parts of a snapshot hold."""
    parts = [json.loads(path.read_text()) for path in root.glob(f"default/{name}@*/contents.json")]
    return {document for part in parts for document, _ in part["documents"]}


@pytest.mark.parametrize("pairs", [SHARED], indirect=True)
def test_all_shards_are_kept_as_of_one_moment(pairs: list[Service], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is in, is in with every write that was acknowledged before it, whichever shard took that."""
    note = snapshots._note
    late = iter([0.0, 0.3] * 3)  # Of two shards one is slow to note what it has.

    def slow(*asked: Any) -> Any:
        time.sleep(next(late))
        return note(*asked)

    monkeypatch.setattr(snapshots, "_note", slow)
    root = pairs[0].options.snapshots
    assert root is not None
    with Client.open(of(pairs)) as client:
        memory = client.memory("m", SPEC)
        with Writer(memory) as writer:
            for turn in range(3):
                before = writer.written
                until(lambda wanted=before + 20: writer.written >= wanted)
                ended(client, memory.snapshot(f"turn-{turn}"))
        assert writer.failures == []
    for turn in range(3):
        kept = kept_at(root, f"turn-{turn}")
        last = max(int(name[1:]) for name in kept)
        deleted = {f"w{number:04}" for number in range(last) if number % 3 == 2}
        assert kept == {f"w{number:04}" for number in range(last + 1)} - deleted, f"turn {turn}"
        assert last >= 18 * (turn + 1)


@pytest.mark.parametrize("pairs", [OWN], indirect=True)
def test_a_shard_that_takes_no_part_keeps_no_writer_waiting(pairs: list[Service]) -> None:
    with Client.open(of(pairs)) as client, Caretaker.open(of(pairs)) as keeper:
        memory = filled(client)
        for one in pairs[2:]:  # No file can be put below a file.
            (one.directory / "snapshots").write_text("")
        began = time.monotonic()
        told = None
        with suppress(FotError):
            told = client.wait(memory.snapshot("one"), 30)
        assert told is None or told.state is OperationState.FAILED
        memory.put("later", *drawn(50, 3))
        assert time.monotonic() - began < HOLD_S
        for one in pairs[2:]:
            (one.directory / "snapshots").unlink()
        for snapshot in list(client.snapshots()):
            with pytest.raises(FailedPrecondition, match="of another moment"):
                memory.snapshot(snapshot.id)
            client.delete_snapshot(snapshot.id)
        ended(client, memory.snapshot("one"))
        assert client.snapshot("one").documents == len(IDS) + 1
        assert keeper.status().whole


def test_the_same_id_from_any_client_is_the_same_snapshot(pairs: list[Service]) -> None:
    with Client.open(of(pairs)) as client:
        memory = filled(client)
        begun = ended(client, memory.snapshot("one"))
        memory.put("later", *drawn(50, 3))
    for turn in range(4):
        with Client.open(of(pairs)) as other:
            begin_at(other, turn)
            assert ended(other, other.memory("m").snapshot("one")).created_at == begun.created_at
            assert other.snapshot("one").documents == len(IDS)
    parts = {path for one in pairs for path in one.directory.parent.rglob("default/one@*") if path.is_dir()}
    assert len(parts) == 2


@pytest.mark.parametrize("pairs", [OWN], indirect=True)
def test_parts_of_different_moments_are_not_put_together(pairs: list[Service]) -> None:
    with Client.open(of(pairs)) as client:
        memory = filled(client)
        ended(client, memory.snapshot("one"))
        (part,) = [path for one in pairs for path in one.directory.glob("snapshots/default/one@s1")]
        shutil.rmtree(part)
        with pytest.raises((FailedPrecondition, AlreadyExists), match=r"delete it"):
            memory.snapshot("one")
        memory.put("later", *drawn(50, 3))  # Nobody is held.
        assert client.snapshot("one").missing == ("s1",)
        client.delete_snapshot("one")
        ended(client, memory.snapshot("one"))
        assert client.snapshot("one").documents == len(IDS) + 1


@pytest.mark.parametrize("pairs", [OWN], indirect=True)
def test_another_layout_of_shards_is_told_what_to_do(pairs: list[Service], tmp_path: Path) -> None:
    with Client.open(of(pairs)) as client:
        ended(client, filled(client).snapshot("one"))
    roots = [one.options.snapshots or one.directory / "snapshots" for one in pairs]
    gathered = tmp_path / "gathered"
    for root in roots:
        if root.exists():
            shutil.copytree(root, gathered, dirs_exist_ok=True)
    options = replace(QUIET, snapshots=gathered)
    with restartable(tmp_path / "three", 3, options) as three, restartable(tmp_path / "two", 2, options) as two:
        with Client.open(target([one.address for one in three])) as client:
            with pytest.raises(FailedPrecondition, match="the same shards") as refused:
                client.restore("one")
            assert refused.value.code == "OTHER_SHARDS"
        # As many shards, fewer replicas: nobody is left to be healed.
        with Client.open(target([one.address for one in two])) as client:
            ended(client, client.restore("one"))
            assert {one.id for one in client.memory("m").documents()} == set(IDS)
