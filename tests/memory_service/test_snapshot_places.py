"""Snapshots in every place a memory can be, by the same calls with the same errors; and by `fot snapshot`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_service import (
    AlreadyExists,
    Client,
    DType,
    FailedPrecondition,
    Fingerprint,
    InvalidArgument,
    Memory,
    MemorySpec,
    NotFound,
    OperationState,
    PermissionDenied,
)
from memory_service.cli import work
from memory_service.client import connection
from memory_service.cluster import caretaker
from memory_service.server.auth import TokenFile
from memory_service.types import Role
from tests.memory_service.clusters import services, target
from tests.memory_service.places import PLACES, client_at, serving
from tests.memory_service.test_cli import Fot

SPEC = MemorySpec(Fingerprint("tiny"), (3,), 2, 8, DType.F32)
WHO = ("acme-admin", "acme-write", "acme-read", "rival-admin")
QUERIES = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "POLL_S", 0.01)
    monkeypatch.setattr(work, "POLL_S", 0.01)
    monkeypatch.setattr(caretaker, "_SETTLE_S", 0.05)


@pytest.fixture(params=[place for place in PLACES if place != "memory"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Client]:
    with client_at(request.param, tmp_path) as found:
        yield found


def filled(client: Client) -> Memory:
    memory = client.memory("notes", SPEC)
    generator = torch.Generator().manual_seed(2)
    for number in range(3):
        keys, values = torch.randn(2, 1, 2, 5 + number, 8, generator=generator)
        memory.put(f"d{number}", keys, values, token_ids=list(range(5 + number)), metadata={"n": number})
    return memory


def look(memory: Memory) -> tuple[Any, ...]:
    answer = memory.attend(3, QUERIES, top_k=4)
    return list(memory.documents()), answer.output.tolist(), answer.lse.tolist()


def test_a_memory_is_kept_deleted_and_restored_by_the_same_calls_everywhere(client: Client) -> None:
    memory = filled(client)
    before = look(memory)
    kept = memory.wait(memory.snapshot("one"), 30)
    assert (kept.state, kept.snapshot, kept.memory) == (OperationState.DONE, "one", "notes")
    unnamed = client.wait(memory.snapshot(), 30)
    assert unnamed.snapshot.startswith("20")
    assert [one.id for one in memory.snapshots()] == [unnamed.snapshot, "one"]
    assert client.snapshot("one").documents == 3
    assert "snapshot" in {str(one.kind) for one in memory.operations()}
    with pytest.raises(AlreadyExists, match="there is a memory 'notes' already"):
        client.restore("one")
    client.delete("notes")
    assert [one.id for one in client.snapshots("notes")] == [unnamed.snapshot, "one"]
    assert client.wait(client.restore("one"), 30).state is OperationState.DONE
    assert look(client.memory("notes")) == before
    assert client.wait(client.restore("one", "copy"), 30).memory == "copy"
    assert look(client.memory("copy")) == before
    client.delete_snapshot("one")
    for ask in (client.snapshot, client.restore, client.delete_snapshot):
        with pytest.raises(NotFound, match="no snapshot 'one'"):
            ask("one")
        with pytest.raises(InvalidArgument, match="a snapshot's id"):
            ask("../one")
    with pytest.raises(InvalidArgument, match="a call of its own"):
        memory.start("snapshot")


@pytest.mark.parametrize("place", ["memory", "service"])
def test_in_ram_it_says_why_there_are_none(place: str, tmp_path: Path) -> None:
    with services(1) as (address,), Client.open(":memory:" if place == "memory" else f"grpc://{address}") as client:
        memory = client.memory("notes", SPEC)
        for ask in (
            lambda: memory.snapshot(),
            lambda: list(client.snapshots()),
            lambda: client.snapshot("one"),
            lambda: client.restore("one"),
            lambda: client.delete_snapshot("one"),
        ):
            with pytest.raises(FailedPrecondition, match="a store in RAM has no files") as refused:
                ask()
            assert refused.value.code == "NO_FILES"


def test_over_grpc_a_foreign_snapshot_does_not_exist_and_roles_hold(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "tokens.json")
    token = {name: tokens.create(name, name.split("-")[0], Role(name.split("-")[1])) for name in WHO}
    with serving(tmp_path / "data", tokens=tokens.path) as where:
        open_as = {name: Client.open(where, token=token[name]) for name in WHO}
        memory = filled(open_as["acme-admin"])
        memory.wait(memory.snapshot("one"), 30)
        told = []
        for name in ("one", "two"):
            for ask in ("snapshot", "delete_snapshot", "restore"):
                with pytest.raises(NotFound) as refused:
                    getattr(open_as["rival-admin"], ask)(name)
                told.append((refused.value.code, refused.value.message.replace(name, "?"), refused.value.metadata))
        assert told[:3] == told[3:]
        assert list(open_as["rival-admin"].snapshots()) == []
        assert [one.id for one in open_as["acme-read"].snapshots()] == ["one"]
        writer = open_as["acme-write"]
        for denied in (writer.memory("notes").snapshot, lambda: writer.restore("one", "n")):
            with pytest.raises(PermissionDenied):
                denied()
        with pytest.raises(PermissionDenied):
            writer.delete_snapshot("one")
        for client in open_as.values():
            client.close()


# --- fot snapshot ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fot:
    return Fot(monkeypatch, capsys)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    with Client.open(tmp_path / "data") as client:
        filled(client)
    return tmp_path / "data"


def test_the_command_keeps_lists_restores_and_deletes(fot: Fot, data: Path) -> None:
    place = ("--target", data)
    assert fot("snapshot", "list", *place).out == "No snapshots yet: fot snapshot create.\n"
    made = fot("snapshot", "create", "notes", "--id", "one", *place)
    assert made.out.startswith("Snapshot one holds 3 documents: segments linked 3, copied 0; ")
    table = fot("snapshot", "list", *place).out.splitlines()
    assert table[0].split() == ["snapshot", "memory", "taken", "documents", "tokens", "size"]
    assert table[1].split()[:2] == ["one", "notes"]
    (listed,) = fot("snapshot", "list", "notes", *place, "--json").json
    assert (listed["id"], listed["documents"], listed["problem"]) == ("one", 3, "")
    refused = fot("snapshot", "restore", "one", *place)
    assert (refused.code, refused.err) == (
        1,
        "fot: there is a memory 'notes' already; restore under another name, or delete that one first\n",
    )
    assert fot("snapshot", "restore", "one", "--as", "copy", *place).out == (
        "Memory copy holds 3 documents again, 18 tokens.\n"
    )
    restored = fot("snapshot", "restore", "one", "--as", "more", *place, "--json")
    assert (restored.json["kind"], restored.json["state"], restored.json["snapshot"]) == ("restore", "done", "one")
    assert fot("snapshot", "delete", "one", *place, "--yes").out == "Deleted snapshot one.\n"
    assert fot("snapshot", "restore", "one", *place).err == "fot: no snapshot 'one'\n"


def test_a_snapshot_that_is_damaged_fails_with_the_files_name(fot: Fot, data: Path, tmp_path: Path) -> None:
    place = ("--target", data, "--snapshots", tmp_path / "kept")
    fot("snapshot", "create", "notes", "--id", "one", *place)
    segment = next((tmp_path / "kept/default/one").glob("seg-*"))
    block = bytearray(segment.read_bytes())
    segment.unlink()  # It is linked to the memory's own.
    block[-1] ^= 1
    segment.write_bytes(block)
    failed = fot("snapshot", "restore", "one", "--as", "copy", *place)
    assert failed.code == 1
    assert f"the restore of memory copy failed: snapshot one is damaged: {segment.name}: chunk 0" in failed.err
    assert fot("snapshot", "restore", "one", "--as", "copy", *place, "--json").json["state"] == "failed"
    assert "copy" not in fot("memory", "ls", "--target", data).out
    (tmp_path / "kept/default/one/snapshot.json").write_text("{}")
    assert "damaged: snapshot.json is damaged" in fot("snapshot", "list", *place).out


def test_the_command_restores_a_cluster_and_brings_it_to_every_replica(fot: Fot, tmp_path: Path) -> None:
    with services(2, tmp_path) as addresses:
        place = ("--target", target(addresses, "replicas=2"))
        with Client.open(place[1]) as client:
            filled(client)
            assert fot("snapshot", "create", "notes", "--id", "one", *place).code == 0
            client.delete("notes")
        done = fot("snapshot", "restore", "one", *place)
        assert done.out.startswith("Memory notes holds 3 documents again")
        assert fot("status", *place).code == 0
