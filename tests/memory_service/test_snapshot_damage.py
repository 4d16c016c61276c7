"""A snapshot is not believed: damaged, forged or moved elsewhere, it is refused in a sentence and leaves nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memory_service import verbs
from memory_service.checksums import crc32
from memory_service.errors import DataLoss, NotFound
from memory_service.settings import StoreOptions
from memory_service.storage.parts import PartHeader, decode_header, encode_header
from memory_service.store.store import Store
from memory_service.types.callers import Identity, Role
from memory_service.types.operations import OperationKind, OperationState
from tests.memory_service.faults import flip_bit, truncate, zero_page
from tests.memory_service.kept import SPEC, done, failed, filled, kept, look, names
from tests.memory_service.oracle import ME, everything_in_small_pieces, finish, refused

QUIET = StoreOptions(background=False)
RESTORE = verbs.RestoreSnapshot("one", "n")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot `one` of a filled memory, under a root of its own; and another tenant's, `theirs`."""
    root = tmp_path_factory.mktemp("template")
    options = replace(QUIET, snapshots=root / "snapshots")
    with everything_in_small_pieces(SPEC.bytes_per_token), Store.open(root / "data", options) as store:
        filled(store)
        done(store, verbs.CreateSnapshot("m", "one"))
        other = Identity("other", Role.ADMIN)
        store.run(other, verbs.CreateMemory("secret", SPEC))
        done(store, verbs.CreateSnapshot("secret", "theirs"), other)
    return root / "snapshots"


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "snapshots")
    return tmp_path / "snapshots"


@pytest.fixture
def store(root: Path, tmp_path: Path) -> Iterator[Store]:
    with (
        everything_in_small_pieces(SPEC.bytes_per_token),
        Store.open(tmp_path / "data", replace(QUIET, snapshots=root)) as found,
    ):
        yield found


def refuses(store: Store, told: str = "") -> str:
    """The restore fails, says why, and leaves nothing behind."""
    assert store._files is not None
    message = failed(store, RESTORE)
    assert told in message
    assert "n" not in names(store)
    assert len(store._files.memory_keys()) == len(names(store))
    assert store.read_only_reason is None
    return message


# --- At rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [flip_bit, truncate, zero_page])
def test_damage_to_any_file_is_found_before_anything_appears(
    store: Store, root: Path, damage: Callable[[Path, random.Random], str]
) -> None:
    for seed, path in enumerate(sorted((root / "default/one").iterdir())):
        if path.name == "memory.json":  # Nothing depends on it while the description is sound.
            continue
        sound = path.read_bytes()
        what = damage(path, random.Random(seed))
        if path.read_bytes() != sound:
            message = refuses(store)
            assert "snapshot one is damaged" in message, what
            if path.name.startswith("seg-"):
                assert path.name in message
        path.write_bytes(sound)
    done(store, RESTORE)


def test_every_byte_of_the_keys_is_checked_and_the_chunk_is_named(store: Store, root: Path) -> None:
    path = max((root / "default/one").glob("seg-*"), key=lambda one: one.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert f"{path.name}: chunk 0 of part 0 does not match its checksum" in refuses(store)


@pytest.mark.parametrize("name", ["contents.json", "seg-"])
def test_a_missing_file_is_named(store: Store, root: Path, name: str) -> None:
    path = next(one for one in sorted((root / "default/one").iterdir()) if one.name.startswith(name))
    path.unlink()
    told = failed(store, RESTORE)
    assert f"{path.name} is missing" in told
    assert "n" not in names(store)


def test_a_damaged_description_is_listed_with_its_problem(store: Store, root: Path) -> None:
    (root / "default/one/snapshot.json").write_text("{")
    (found,) = store.run(ME, verbs.ListSnapshots()).items
    assert (found.id, found.memory, found.problem) == ("one", "", "snapshot.json is damaged")
    assert store.run(ME, verbs.ListSnapshots("m")).items == ()
    assert isinstance(refused(store, RESTORE), DataLoss)
    store.run(ME, verbs.DeleteSnapshot("one"))
    assert not (root / "default/one").exists()


def test_what_is_half_made_by_others_is_no_snapshot_and_is_left_alone(store: Store, root: Path) -> None:
    (root / "default/one/snapshot.json").unlink()
    assert kept(store) == []
    assert isinstance(refused(store, RESTORE), NotFound)
    filled(store)
    assert "another process" in failed(store, verbs.CreateSnapshot("m", "one"))
    assert (root / "default/one/contents.json").exists()


# --- Forged ---------------------------------------------------------------------------------------------------------


def forge(directory: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change description and contents, and make all checksums right again."""
    told = json.loads((directory / "snapshot.json").read_bytes())
    del told["crc32"]
    contents = json.loads((directory / "contents.json").read_bytes())
    change(told, contents)
    block = json.dumps(contents, separators=(",", ":")).encode()
    if "contents_bytes" in told:
        told |= {"contents_bytes": len(block), "contents_crc32": crc32(block)}
    (directory / "contents.json").write_bytes(block)
    whole = told | {"crc32": crc32(json.dumps(told).encode())}
    (directory / "snapshot.json").write_bytes(json.dumps(whole, indent=1).encode())


def _segment(place: int, value: object) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(_: dict[str, Any], contents: dict[str, Any]) -> None:
        contents["segments"][0][place] = value

    return change


def _set(which: int, name: str, value: object) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda *both: both[which].update({name: value})


FORGERIES: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "a path out of the directory": _segment(0, "../../other/theirs/contents.json"),
    "an absolute path": _segment(0, "/etc/passwd"),
    "a path into the store": _segment(0, "seg-" + "0" * 28 + ".safetensors/../../../LOCK"),
    "a name that is a number": _segment(0, 7),
    "a vast segment": _segment(1, 1 << 62),
    "a negative length": _segment(1, -1),
    "another header": _segment(3, 1),
    "another length": lambda told, contents: (
        contents["segments"][0].__setitem__(1, contents["segments"][0][1] + 1),
        told.update(bytes=told["bytes"] + 1),
    )[0],
    "a segment twice": lambda told, contents: (
        contents["segments"].append(contents["segments"][0]),
        told.update(bytes=told["bytes"] + contents["segments"][0][1]),
    )[0],
    "a document twice": lambda told, contents: (
        contents["documents"].append(contents["documents"][0]),
        told.update(documents=told["documents"] + 1),
    )[0],
    "a document that is not there": lambda told, contents: (
        contents["documents"].append(["ghost", 1]),
        told.update(documents=told["documents"] + 1),
    )[0],
    "a document in an older state": lambda told, contents: contents["documents"][1].__setitem__(1, 2),
    "a deletion of a live document": lambda told, contents: contents["deleted"].append(contents["documents"][0]),
    "a vast generation": _set(1, "next_generation", 1 << 70),
    "a generation that is text": _set(1, "next_generation", "7"),
    "more tokens": _set(0, "tokens", 1 << 40),
    "vast contents": _set(0, "bytes", 1 << 62),
    "a time that is none": _set(0, "created_at", float("nan")),
    "a memory of no name": _set(0, "memory", "../../x"),
    "an index nobody can build": lambda told, contents: told.update(spec=told["spec"].replace('"none"', '"../../x"')),
    "another tenant": _set(0, "tenant", "other"),
    "another id": _set(0, "id", "two"),
    "another shard": lambda told, contents: told.update(shard="s0", shards=["s0"]),
    "a shard that is a path": lambda told, contents: told.update(shards=["../x"]),
    "no documents at all": lambda told, contents: told.pop("documents"),
    "contents that are a list": lambda told, contents: contents.update(documents=None),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_description_is_refused(store: Store, root: Path, name: str) -> None:
    forge(root / "default/one", FORGERIES[name])
    assert "damaged" in refuses(store)


def test_a_forgery_that_changes_nothing_is_a_snapshot(store: Store, root: Path) -> None:
    forge(root / "default/one", lambda told, contents: None)
    done(store, RESTORE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("document", ""),
        ("document", "x" * 600),
        ("generation", -1),
        ("generation", "5"),
        ("generation", 1 << 80),
        ("first_token", 3),
        ("document_tokens", 1 << 40),
        ("committed_at", "now"),
        ("metadata", {"x": [1]}),
        ("request_id", 5),
    ],
)
def test_a_forged_segment_is_refused(store: Store, root: Path, name: str, value: object) -> None:
    directory = root / "default/one"
    path = min(directory.glob("seg-*"), key=lambda one: one.stat().st_size)
    data = path.read_bytes()
    spec, ref = decode_header(path.name, data[: ref_bytes(data)])
    headers = [change(part.header, name, value) for part in ref.parts]
    block, forged = encode_header(path.name, spec, headers, room=ref.header_bytes)
    path.write_bytes(block + data[ref.header_bytes :])

    def tell(told: dict[str, Any], contents: dict[str, Any]) -> None:
        for one in contents["segments"]:
            if one[0] == path.name:
                one[3] = forged.header_crc

    forge(directory, tell)
    assert "damaged" in refuses(store)


def ref_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def change(header: PartHeader, name: str, value: object) -> PartHeader:
    return replace(header, **{name: value})  # type: ignore[arg-type]


# --- Moved and linked -----------------------------------------------------------------------------------------------


def test_a_foreign_snapshot_in_ones_own_directory_is_refused(store: Store, root: Path) -> None:
    shutil.copytree(root / "other/theirs", root / "default/theirs")
    (root / "default/linked").symlink_to(root / "other/theirs")
    for name in ("theirs", "linked"):
        told = refused(store, verbs.RestoreSnapshot(name))
        assert isinstance(told, DataLoss)
        assert "secret" not in told.message
        assert store.run(ME, verbs.GetSnapshot(name)).memory == ""


def test_a_renamed_directory_says_so(store: Store, root: Path) -> None:
    (root / "default/one").rename(root / "default/uno")
    assert "keeps its name" in refused(store, verbs.RestoreSnapshot("uno")).message


@pytest.mark.parametrize("name", ["snapshot.json", "contents.json", "seg-"])
@pytest.mark.parametrize("kind", ["symlink", "pipe", "directory"])
@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_neither_followed_nor_waited_for(
    store: Store, root: Path, tmp_path: Path, name: str, kind: str
) -> None:
    path = next(one for one in sorted((root / "default/one").iterdir()) if one.name.startswith(name))
    moved = tmp_path / "moved"
    path.rename(moved)
    if kind == "symlink":
        path.symlink_to(moved)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    refuses(store)
    moved.unlink()


def test_what_is_restored_does_not_change_with_its_snapshot(store: Store, root: Path) -> None:
    done(store, RESTORE)
    before = look(store, "n")
    store.run(ME, verbs.DeleteSnapshot("one"))
    assert look(store, "n") == before
    assert finish(store, "n", OperationKind.VERIFY).state is OperationState.DONE
