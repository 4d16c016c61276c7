"""Snapshots in every place a memory can be, by the same calls with the same errors; and by `fot snapshot`."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
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
from memory_service.server.auth import TokenFile
from memory_service.settings import StoreOptions
from memory_service.types.callers import Role
from tests.command import Fot
from tests.memory_service.clusters import services, target
from tests.memory_service.faults import flip_bit, truncate
from tests.memory_service.places import PLACES, client_at, serving

SPEC = MemorySpec(Fingerprint("tiny"), (3,), 2, 8, DType.F32)
WHO = ("acme-admin", "acme-write", "acme-read", "rival-admin")
QUERIES = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "POLL_S", 0.01)
    monkeypatch.setattr(work, "POLL_S", 0.01)


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


def test_snapshots_are_verified_where_they_lie_whoever_serves_them(fot: Fot, data: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with Client.open(data, options=StoreOptions(background=False, snapshots=kept)) as client:
        for name in ("one", "two"):
            client.wait(client.memory("notes").snapshot(name), 30)
    shutil.copytree(kept, tmp_path / "copied")
    before = contents_of(tmp_path / "copied")
    whole = fot("snapshot", "verify", tmp_path / "copied")
    assert whole.code == 0
    assert [line.split()[:3] for line in whole.out.splitlines()[1:3]] == [
        ["one", "default", "notes"],
        ["two", "default", "notes"],
    ]
    assert whole.out.splitlines()[-1].startswith("2 snapshots, ")
    assert whole.out.endswith(": all is well.\n")
    assert contents_of(tmp_path / "copied") == before  # Nothing was written.
    segment = next((tmp_path / "copied/default/two").glob("seg-*"))
    block = bytearray(segment.read_bytes())
    block[-1] ^= 1
    segment.write_bytes(block)
    told = fot("snapshot", "verify", tmp_path / "copied")
    assert told.code == 1
    assert f"Damaged: default/two: {segment.name}: chunk 0 of part 0 does not match its checksum\n" in told.out
    assert told.out.endswith(": 1 damaged.\n")
    assert fot("snapshot", "verify", tmp_path / "copied", "--id", "one").code == 0
    first, second = fot("snapshot", "verify", tmp_path / "copied", "--json").json
    assert (first["problem"], first["documents"], first["tokens"]) == ("", 3, 18)
    assert second["problem"].startswith(segment.name)


@pytest.mark.parametrize("name", ["snapshot.json", "contents.json", "memory.json", "seg-"])
@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
def test_damage_to_any_file_of_a_snapshot_is_told(
    fot: Fot, data: Path, name: str, damage: Callable[..., object]
) -> None:
    fot("snapshot", "create", "notes", "--id", "one", "--target", data)
    path = next(path for path in sorted((data / "snapshots/default/one").iterdir()) if path.name.startswith(name))
    sound = path.read_bytes()
    path.unlink()  # A segment is linked to the memory's own.
    path.write_bytes(sound)
    if damage is Path.unlink:
        path.unlink()
    else:
        damage(path, random.Random(7))
        assert path.read_bytes() != sound
    told = fot("snapshot", "verify", data)
    assert told.code == 1
    if name == "snapshot.json" and damage is Path.unlink:
        assert "there is no snapshot under" in told.err  # Without its description it is none.
    else:
        assert "1 damaged" in told.out


def test_parts_of_other_shards_are_named_and_an_empty_root_is_no_success(fot: Fot, tmp_path: Path) -> None:
    with services(2, tmp_path) as addresses, Client.open(target(addresses)) as client:
        keeper = ("--target", target(addresses))
        assert fot("heal", *keeper).code == 0
        filled(client)
        assert fot("snapshot", "create", "notes", "--id", "one", *keeper).code == 0
    told = fot("snapshot", "verify", tmp_path / "service-0")
    assert told.code == 0
    (part,) = fot("snapshot", "verify", tmp_path / "service-0", "--json").json
    assert f"of default/one, the parts of shards {part['missing'][0]} are not under this root" in told.out
    assert fot("snapshot", "verify", tmp_path / "service-0", "--id", "none").err == (
        f"fot: there is no snapshot 'none' under {tmp_path}/service-0/snapshots\n"
    )
    (tmp_path / "empty").mkdir()
    nothing = fot("snapshot", "verify", tmp_path / "empty")
    assert (nothing.code, nothing.err) == (1, f"fot: there is no snapshot under {tmp_path}/empty\n")
    assert "there is no directory" in fot("snapshot", "verify", tmp_path / "none").err


def contents_of(root: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and the moment of its last change."""
    return {str(one): (one.stat().st_size, one.stat().st_mtime_ns) for one in sorted(root.rglob("*"))}
