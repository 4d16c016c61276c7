"""The power fails at every point of a scenario: whatever the disk kept, the store opens and is right.

Kills cannot see a missing sync, for the operating system survives them. Here only what was synced survives for sure,
and of everything else any mixture may.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from memory_service import verbs
from memory_service.settings import StoreOptions
from memory_service.storage.vfs import File, OsVfs, Vfs
from memory_service.store.store import Store
from memory_service.types.documents import Document
from memory_service.types.operations import OperationKind, OperationState
from tests.memory_service.faults import FaultVfs, State
from tests.memory_service.oracle import (
    ME,
    attend,
    document,
    error,
    everything_in_small_pieces,
    finish,
    put,
    reference,
    spec_of,
)

SPEC = spec_of(dim=8)
OPTIONS = StoreOptions(background=False)
QUERIES = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
Content = dict[str, dict[str, str]]  # Memory -> document -> which of `MADE` it holds.

SIZES = {"a1": 20, "b1": 200, "c1": 30, "b2": 60, "d1": 15, "x1": 10}  # b1 has three parts, staged in files.
MADE: dict[str, Document] = {name: document(name[0], size, SPEC, name) for name, size in SIZES.items()}


def step_put(memory: str, name: str) -> Callable[[Store], None]:
    return lambda store: _discard(put(store, memory, MADE[name], replacing=True))


def _discard(_: object) -> None:
    pass


def _compact(store: Store) -> None:
    assert finish(store, "m", OperationKind.COMPACT).state is OperationState.DONE


# What is done, and what must be there once it is acknowledged.
SCENARIO: list[tuple[str, Callable[[Store], None], Content]] = [
    ("create m", lambda store: _discard(store.run(ME, verbs.CreateMemory("m", SPEC))), {"m": {}}),
    ("put a", step_put("m", "a1"), {"m": {"a": "a1"}}),
    ("put b", step_put("m", "b1"), {"m": {"a": "a1", "b": "b1"}}),
    ("put c", step_put("m", "c1"), {"m": {"a": "a1", "b": "b1", "c": "c1"}}),
    ("replace b", step_put("m", "b2"), {"m": {"a": "a1", "b": "b2", "c": "c1"}}),
    ("delete a", lambda store: store.run(ME, verbs.DeleteDocument("m", "a")), {"m": {"b": "b2", "c": "c1"}}),
    ("compact", _compact, {"m": {"b": "b2", "c": "c1"}}),
    ("put a again", step_put("m", "a1"), {"m": {"a": "a1", "b": "b2", "c": "c1"}}),
    (
        "create n",
        lambda store: _discard(store.run(ME, verbs.CreateMemory("n", SPEC))),
        {"m": {"a": "a1", "b": "b2", "c": "c1"}, "n": {}},
    ),
    ("put x", step_put("n", "x1"), {"m": {"a": "a1", "b": "b2", "c": "c1"}, "n": {"x": "x1"}}),
    ("delete n", lambda store: store.run(ME, verbs.DeleteMemory("n")), {"m": {"a": "a1", "b": "b2", "c": "c1"}}),
    ("delete c", lambda store: store.run(ME, verbs.DeleteDocument("m", "c")), {"m": {"a": "a1", "b": "b2"}}),
    ("compact again", _compact, {"m": {"a": "a1", "b": "b2"}}),
]
AFTER: list[Content] = [{}, *(content for *_, content in SCENARIO)]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> FaultVfs:
    """The log of the whole scenario."""
    root = tmp_path_factory.mktemp("scenario")
    vfs = FaultVfs(root)
    with everything_in_small_pieces(SPEC.bytes_per_token), Store.open(root, OPTIONS, vfs) as store:
        for name, do, _ in SCENARIO:
            do(store)
            vfs.mark(name)
    return vfs


def different(states: Iterator[State]) -> Iterator[State]:
    """Leaves out what differs from no state before it."""
    seen = set()
    for state in states:
        key = hash((len(state.marks), tuple(sorted(state.files.items())), tuple(sorted(state.directories))))
        if key not in seen:
            seen.add(key)
            yield state


def holds(store: Store) -> Content:
    """What the store has, every byte of it compared."""
    content: Content = {}
    for memory in store.run(ME, verbs.ListMemories()).items:
        documents = content[memory.name] = {}
        for info in store.run(ME, verbs.ListDocuments(memory.name)).items:
            (version,) = [name for name, one in MADE.items() if (one.id, one.tokens) == (info.id, info.tokens)]
            documents[info.id] = version
            for place, layer in enumerate(SPEC.layers):
                got = store.run(ME, verbs.Fetch(memory.name, info.id, layer, 0, info.tokens))
                assert torch.equal(got.keys, MADE[version].keys[place])
                assert torch.equal(got.values, MADE[version].values[place])
                assert torch.equal(got.token_ids, MADE[version].token_ids)  # type: ignore[arg-type]
        if documents:
            keys, values = (
                torch.cat([getattr(MADE[one], which)[0] for one in documents.values()], 1)
                for which in ("keys", "values")
            )
            assert error(attend(store, memory.name, 3, QUERIES), reference(QUERIES, keys, values)) <= 1e-5
    return content


def look(state: State, directory: Path, vfs: Vfs | None = None) -> None:
    """Open what is left: it holds what was acknowledged, and perhaps what was under way, whole."""
    state.materialise(directory)
    with Store.open(directory, OPTIONS, vfs) as store:
        found = holds(store)
        allowed = AFTER[len(state.marks) : len(state.marks) + 2]
        assert found in allowed, f"{state.name}: {found} is none of {allowed}"
        known = {ref.path for one in store._memories.all() for ref in one.segments.values()}
        assert {path.name for path in directory.rglob("*.safetensors")} == known, state.name


def look_at_all(disk: FaultVfs, tmp_path: Path, subsets: int, seed: int) -> int:
    """Every state, opened; how many they were."""
    looked_at = 0
    for state in different(disk.power_loss_states(subsets=subsets, seed=seed)):
        directory = tmp_path / str(looked_at)
        directory.mkdir()
        try:
            look(state, directory, Hasty())
        except Exception as problem:
            raise AssertionError(f"after {state.marks[-1:]}, {state.name}") from problem
        shutil.rmtree(directory)
        looked_at += 1
    return looked_at


class Hasty(OsVfs):
    """Syncs nothing: what a state holds does not depend on it, and it takes most of the time."""

    def fsync(self, file: File) -> None:
        pass

    def fdatasync(self, file: File) -> None:
        pass

    def fsync_directory(self, path: Path) -> None:
        pass


def test_the_store_is_right_after_a_power_loss_at_any_point(disk: FaultVfs, tmp_path: Path) -> None:
    assert look_at_all(disk, tmp_path, subsets=1, seed=1) >= 200


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_the_store_is_right_whatever_mixture_survives(disk: FaultVfs, tmp_path: Path) -> None:
    subsets, seed = int(os.environ.get("FOT_SOAK_MIXTURES", "20")), time.time_ns() % 1_000_000
    print(f"seed {seed}")
    print(f"{look_at_all(disk, tmp_path, subsets, seed)} states")


def test_a_second_power_loss_during_recovery_changes_nothing(disk: FaultVfs, tmp_path: Path) -> None:
    states = list(different(disk.power_loss_states(subsets=1, seed=2)))
    for number, first in enumerate(random.Random(3).sample(states, 12)):
        directory = tmp_path / str(number)
        directory.mkdir()
        first.materialise(directory)
        again = FaultVfs(directory)
        again.log.clear()
        with Store.open(directory, OPTIONS, again) as store:
            holds(store)
        for turn, second in enumerate(different(again.power_loss_states(subsets=1, seed=4))):
            inside = tmp_path / f"{number}-{turn}"
            inside.mkdir()
            try:
                look(State(second.name, first.marks, second.files, second.directories), inside, Hasty())
            except Exception as problem:
                raise AssertionError(f"after {first.name}, then {second.name}") from problem
            shutil.rmtree(inside)


def test_a_sync_left_out_would_be_noticed(tmp_path: Path) -> None:
    """The same look at a store that does not sync its data: some state must be wrong, or the look sees nothing."""

    class Careless(FaultVfs):
        def fdatasync(self, file: File) -> None:
            pass

    root = tmp_path / "scenario"
    root.mkdir()
    vfs = Careless(root)
    with everything_in_small_pieces(SPEC.bytes_per_token), Store.open(root, OPTIONS, vfs) as store:
        for name, do, _ in SCENARIO[:3]:
            do(store)
            vfs.mark(name)
    wrong = 0
    for number, state in enumerate(different(vfs.power_loss_states(subsets=0))):
        directory = tmp_path / str(number)
        directory.mkdir()
        try:
            look(state, directory)
        except Exception:
            wrong += 1
    assert wrong
