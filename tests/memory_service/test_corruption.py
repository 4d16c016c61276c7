"""Damage to any file at rest is found before a byte of it is served, or can do no harm.

Every trial copies a directory that holds every kind of file, damages one file and asks for everything.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_service import verbs
from memory_service.errors import DataLoss, FotError
from memory_service.settings import StoreOptions
from memory_service.storage.vfs import OsVfs
from memory_service.store.recovery import rebuild_catalog
from memory_service.store.store import Store
from memory_service.types.answers import Partial
from memory_service.types.operations import OperationKind, OperationState
from memory_service.types.questions import Engine
from memory_service.types.scopes import Scope
from tests.memory_service.faults import flip_bit, truncate, zero_page
from tests.memory_service.oracle import (
    ME,
    Source,
    attend,
    check_top_tokens,
    document,
    error,
    everything_in_small_pieces,
    finish,
    put,
    reference,
    scores_of,
    spec_of,
    warm,
)

SPEC = spec_of(dim=8, factory="IVF4,SQ8")
OPTIONS = StoreOptions(background=False)
QUERIES = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
KEPT = {
    one.id: one
    for one in (
        document("a", 300, SPEC, "a", {"n": 1}),  # Five parts, staged in files.
        document("b", 40, SPEC, "b", {"n": 2}),
        document("c", 30, SPEC, "c", {"text": "ü" * 50}),
        document("d", 25, SPEC, "d2"),
    )
}
Damage = Callable[[Path, random.Random], str]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory as a closed store leaves it, and as a killed one does: with transactions in the WAL alone."""
    root = tmp_path_factory.mktemp("template") / "closed"
    killed = root.with_name("killed")
    with everything_in_small_pieces(SPEC.bytes_per_token):
        with Store.open(root, OPTIONS) as store:
            store.run(ME, verbs.CreateMemory("m", SPEC))
            put(store, "m", document("e", 20, SPEC, "e"))
            for one in ("a", "b", "c"):
                put(store, "m", KEPT[one])
            put(store, "m", document("d", 35, SPEC, "d1"))
            assert finish(store, "m", OperationKind.COMPACT).state is OperationState.DONE
        with Store.open(root, OPTIONS) as store:
            put(store, "m", KEPT["d"], replacing=True)
            store.run(ME, verbs.DeleteDocument("m", "e"))
            assert finish(store, "m", OperationKind.INDEX).state is OperationState.DONE
            shutil.copytree(root, killed)
    assert (killed / "catalog.sqlite-wal").stat().st_size > 10_000
    return {"closed": root, "killed": killed}


def swap_blocks(path: Path, dice: random.Random) -> str:
    """Let two blocks of 512 bytes change places; returns what was done."""
    data = path.read_bytes()
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    one, two = dice.randrange(len(blocks)), dice.randrange(len(blocks))
    blocks[one], blocks[two] = blocks[two], blocks[one]
    path.write_bytes(b"".join(blocks))
    return f"blocks {one} and {two} of {path.name} swapped"


def remove(path: Path, _: random.Random) -> str:
    path.unlink()
    return f"{path.name} removed"


def grow(path: Path, dice: random.Random) -> str:
    """Append bytes of something else."""
    with path.open("ab") as file:
        file.write(dice.randbytes(1 + dice.randrange(5000)))
    return f"{path.name} grown"


DAMAGES: list[Damage] = [flip_bit] * 6 + [truncate, zero_page, swap_blocks, remove, grow]


def kind_of(path: Path) -> str:
    if path.suffix == ".safetensors":
        return "segment"
    if "indexes" in path.parts:
        return "sidecar"
    return path.name


def files_by_kind(root: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size):
        found.setdefault(kind_of(path), []).append(path)
    return found


def ask_everything(store: Store) -> list[DataLoss]:
    """Compare every byte and answer with what was stored; what is damaged may only say so."""
    told: list[DataLoss] = []
    page = store.run(ME, verbs.ListDocuments("m"))
    assert {info.id: (info.tokens, dict(info.metadata)) for info in page.items} == {
        one.id: (one.tokens, dict(one.metadata)) for one in KEPT.values()
    }
    for one in KEPT.values():
        for place, layer in enumerate(SPEC.layers):
            try:
                got = store.run(ME, verbs.Fetch("m", one.id, layer, 0, one.tokens))
            except DataLoss as problem:
                told.append(problem)
                continue
            assert torch.equal(got.keys, one.keys[place])
            assert torch.equal(got.values, one.values[place])
            assert torch.equal(got.token_ids, one.token_ids)  # type: ignore[arg-type]
    for top_k in (0, 8):
        try:
            answer = attend(store, "m", 3, QUERIES, top_k=top_k)
        except DataLoss as problem:
            told.append(problem)
            continue
        assert error(answer, expected(top_k)) <= 1e-5
    return told


def expected(top_k: int) -> Partial:
    keys, values = (torch.cat([getattr(one, which)[0] for one in KEPT.values()], 1) for which in ("keys", "values"))
    return reference(QUERIES, keys, values, top_k=top_k)


def ask_the_index(store: Store) -> str:
    """The index may find less than the best, but what it finds must be what is stored there."""
    options: dict[str, Any] = {
        "top_k": 8,
        "engine": Engine.INDEX,
        "tokens": True,
        "search": {"nprobe": 4, "candidates": 400},
    }
    answer = attend(store, "m", 3, QUERIES, **options)
    assert answer.tokens is not None
    sources = [Source(one.id, one.keys[0], one.values[0]) for one in KEPT.values()]
    check_top_tokens(answer.tokens, sources, scores_of(QUERIES, torch.cat([one.keys for one in sources], 1)), 8)
    assert error(answer, expected(8)) <= 1e-5
    return answer.engine


def trial(template: Path, directory: Path, kind: str, number: int, seed: int) -> str:
    """Damage one file; returns what became of it: "told at open", "told when read" or "harmless"."""
    dice = random.Random(f"{seed}/{number}")
    shutil.copytree(template, directory)
    path = dice.choice(files_by_kind(directory)[kind])
    before = path.read_bytes()
    done = dice.choice(DAMAGES)(path, dice)
    changed = not path.exists() or path.read_bytes() != before
    note = f"seed {seed}, trial {number} on the {template.name} directory: {done}"
    try:
        try:
            with Store.open(directory, OPTIONS) as store:
                told = ask_everything(store)
                verified = finish(store, "m", OperationKind.VERIFY)
                assert kind == "segment" or not told, told
                if kind == "segment" and changed:
                    assert verified.state is OperationState.FAILED, verified
                    return "told when read" if told else "told when verified"
                assert verified.state is OperationState.DONE, verified
                assert finish(store, "m", OperationKind.INDEX).state is OperationState.DONE
                ask_the_index(store)
                return "harmless"
        except FotError as problem:
            assert isinstance(problem, DataLoss), problem
            assert kind.startswith("catalog"), f"only a damaged catalogue may keep the store from opening: {problem}"
            rebuild_catalog(directory / "catalog.sqlite", directory, OsVfs())
            with Store.open(directory, OPTIONS) as store:
                assert ask_everything(store) == []
            return "told at open"
    except Exception as problem:
        raise AssertionError(note) from problem
    finally:
        shutil.rmtree(directory)


def trials(templates: dict[str, Path], tmp_path: Path, count: int, seed: int) -> dict[str, Counter[str]]:
    """The same number of trials for every kind of file."""
    kinds = [(template, kind) for template in templates.values() for kind in files_by_kind(template)]
    outcomes: dict[str, Counter[str]] = {}
    for number in range(count):
        template, kind = kinds[number % len(kinds)]
        outcome = trial(template, tmp_path / str(number), kind, number, seed)
        outcomes.setdefault(kind, Counter())[outcome] += 1
    return outcomes


def test_damage_to_any_file_is_told_or_does_no_harm(templates: dict[str, Path], tmp_path: Path) -> None:
    outcomes = trials(templates, tmp_path, 165, seed=1)
    assert {"segment", "sidecar", "catalog.sqlite", "catalog.sqlite-wal", "tombstones.log"} <= set(outcomes)
    assert outcomes["segment"]["told when read"] > 5
    assert outcomes["catalog.sqlite"]["told at open"] > 5
    assert outcomes["sidecar"].keys() == outcomes["tombstones.log"].keys() == {"harmless"}


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_much_damage_to_any_file_is_told_or_does_no_harm(templates: dict[str, Path], tmp_path: Path) -> None:
    flips = int(os.environ.get("FOT_SOAK_FLIPS", "1000"))
    seed = int(os.environ.get("FOT_SOAK_SEED", str(time.time_ns() % 1_000_000)))
    print(f"seed {seed}")
    outcomes = trials(templates, tmp_path, flips, seed)
    print({kind: dict(counter) for kind, counter in outcomes.items()})


def test_an_undamaged_copy_answers_everything(templates: dict[str, Path], tmp_path: Path) -> None:
    for name, template in templates.items():
        shutil.copytree(template, tmp_path / name)
        with Store.open(tmp_path / name, OPTIONS) as store:
            assert ask_everything(store) == []
            assert ask_the_index(store).startswith("index:IVF")
            assert finish(store, "m", OperationKind.VERIFY).state is OperationState.DONE


def test_a_damaged_document_leaves_the_others_readable(templates: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(templates["closed"], root)
    with Store.open(root, OPTIONS) as store:
        memory = store._memories.get("default", "m")
        ((segment, _),) = memory.documents["d"].row.parts
        path = root / "memories" / memory.row.key / memory.segments[segment].path
    with path.open("r+b") as file:
        file.seek(-200, os.SEEK_END)  # Within d's own bytes.
        byte = file.read(1)
        file.seek(-200, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    with Store.open(root, OPTIONS) as store:
        told = ask_everything(store)
        assert len(told) == 4  # d's two layers and both questions over everything.
        assert all(path.name in problem.message for problem in told)
        kept = [KEPT[name] for name in "abc"]
        keys, values = (torch.cat([getattr(one, which)[0] for one in kept], 1) for which in ("keys", "values"))
        answer = attend(store, "m", 3, QUERIES, Scope(("a", "b", "c")))
        assert error(answer, reference(QUERIES, keys, values)) <= 1e-5
        done = finish(store, "m", OperationKind.VERIFY)
        assert done.state is OperationState.FAILED
        assert path.name in done.message
        # Damage is not copied on under a new checksum, and the rest is not held up.
        warm(store, "m")
        memory = store._memories.get("default", "m")
        assert not memory.documents["d"].spans
        assert memory.documents["a"].spans
        store.run(ME, verbs.DeleteDocument("m", "d"))
        finish(store, "m", OperationKind.COMPACT)
        assert finish(store, "m", OperationKind.VERIFY).state is OperationState.DONE


@pytest.mark.parametrize("damage", [flip_bit, truncate, zero_page, swap_blocks, remove])
def test_a_damaged_sidecar_heals_with_the_same_exact_answers(
    templates: dict[str, Path], tmp_path: Path, damage: Damage
) -> None:
    root = tmp_path / "data"
    shutil.copytree(templates["closed"], root)
    for path in files_by_kind(root)["sidecar"]:
        damage(path, random.Random(7))
    with Store.open(root, OPTIONS) as store:
        assert store.run(ME, verbs.GetStats("m")).indexed_tokens == 0
        assert ask_everything(store) == []
        assert finish(store, "m", OperationKind.INDEX).state is OperationState.DONE
        assert ask_the_index(store).startswith("index:IVF")
    with Store.open(root, OPTIONS) as store:
        assert store.run(ME, verbs.GetStats("m")).indexed_tokens == sum(one.tokens for one in KEPT.values())
        assert ask_the_index(store).startswith("index:IVF")


def test_segments_that_changed_places_are_told(templates: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(templates["closed"], root)
    one, two, *_ = files_by_kind(root)["segment"]
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    with Store.open(root, OPTIONS) as store:
        assert ask_everything(store)


def test_a_flipped_wal_does_not_cost_what_compaction_just_rewrote(tmp_path: Path) -> None:
    """The transaction that named the new segments is lost, and the old ones are gone: the new ones must be kept."""
    root, copy = tmp_path / "data", tmp_path / "copy"
    with Store.open(root, OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        for one in KEPT.values():
            put(store, "m", one)
    with Store.open(root, OPTIONS) as store:
        before = len((root / "catalog.sqlite-wal").read_bytes()) if (root / "catalog.sqlite-wal").exists() else 0
        finish(store, "m", OperationKind.COMPACT)
        shutil.copytree(root, copy)
    wal = copy / "catalog.sqlite-wal"
    data = bytearray(wal.read_bytes())
    data[before + 100] ^= 1
    wal.write_bytes(data)
    with Store.open(copy, OPTIONS) as store:
        assert ask_everything(store) == []
