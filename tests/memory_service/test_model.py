"""A store and a dict, given the same random orders, always agree; and nothing that tidies up changes an answer."""

from __future__ import annotations

import os
import random
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_service import verbs
from memory_service.errors import AlreadyExists, FotError, NotFound, SessionExpired
from memory_service.settings import StoreOptions
from memory_service.storage.parts import PartLayout, part_ranges
from memory_service.storage.vfs import OsVfs
from memory_service.store.recovery import rebuild_catalog
from memory_service.store.store import Store
from memory_service.types.answers import Attended
from memory_service.types.conditions import Compare, Condition
from memory_service.types.documents import Conflict, Document, DocumentInfo
from memory_service.types.operations import OperationKind, OperationState
from memory_service.types.questions import Engine
from memory_service.types.scopes import Scope, SessionScope
from memory_service.types.sessions import SessionAppend
from memory_service.types.specs import DType, MemorySpec
from memory_service.types.uploads import Chunk, Upload
from tests.memory_service.kept import run as wait
from tests.memory_service.oracle import (
    ME,
    MODEL,
    Source,
    attend,
    check_exact,
    check_top_tokens,
    document,
    error,
    everything_in_small_pieces,
    finish,
    put,
    refused,
    scores_of,
    spec_of,
    tensors,
    warm,
)

OPTIONS = StoreOptions(background=False, resident_bytes=64 << 10)
NAMES = [f"d{number}" for number in range(10)]
QUERIES = 2 * torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))


@dataclass
class Memory:
    """What one memory must hold."""

    spec: MemorySpec
    documents: dict[str, Document] = field(default_factory=dict)
    infos: dict[str, DocumentInfo] = field(default_factory=dict)
    sessions: dict[str, list[list[tuple[Tensor, Tensor]]]] = field(default_factory=dict)  # Per layer.
    uploads: dict[str, tuple[Document, Upload, Conflict]] = field(default_factory=dict)


class Model:
    """Gives orders to a store and remembers what they must lead to."""

    def __init__(self, directory: Path, seed: int):
        self.directory = directory
        self.dice = random.Random(seed)
        self.memories: dict[str, Memory] = {}
        self.gone: list[str] = []  # Session ids that must be unknown.
        self.snapshots: dict[str, tuple[str, Memory]] = {}  # Id -> the memory's name and what it held.
        self.did: Counter[str] = Counter()
        self.turn = 0
        self.store = Store.open(directory, OPTIONS)

    def step(self) -> str:
        """One random order; its name."""
        self.turn += 1
        orders: list[tuple[int, Callable[[], str]]] = [
            (2, self.create),
            (1, self.drop),
            (20, self.put),
            (8, self.begin),
            (12, self.send),
            (8, self.commit),
            (2, self.abort),
            (10, self.delete),
            (4, self.open_session),
            (12, self.append),
            (3, self.close_session),
            (20, self.ask),
            (4, self.ask_the_index),
            (6, self.fetch),
            (6, self.list),
            (4, self.warm),
            (3, self.compact),
            (5, self.index),
            (1, self.verify),
            (3, self.snapshot),
            (3, self.restore),
            (1, self.drop_snapshot),
            (2, self.restart),
            (1, self.rebuild),
        ]
        (order,) = self.dice.choices([one for _, one in orders], [weight for weight, _ in orders])
        done = order()
        self.did[done] += 1
        return done

    # --- Memories -----------------------------------------------------------------------------------------------------

    def create(self) -> str:
        name = self.dice.choice("xyz")
        if name in self.memories:
            info = self.store.run(ME, verbs.CreateMemory(name, self.memories[name].spec))
            assert info.documents == len(self.memories[name].documents)
            return "create again"
        spec = spec_of(self.dice.choice([DType.F32, DType.BF16]), dim=8, factory=self.dice.choice(["Flat", "IVF4,SQ8"]))
        self.store.run(ME, verbs.CreateMemory(name, spec))
        self.memories[name] = Memory(spec)
        return "create"

    def drop(self) -> str:
        if len(self.memories) < 3 or self.dice.random() < 0.7:
            return "nothing"
        name = self.dice.choice(sorted(self.memories))
        self.store.run(ME, verbs.DeleteMemory(name))
        self.gone += self.memories.pop(name).sessions
        return "drop"

    def pick(self) -> tuple[str, Memory]:
        if not self.memories:
            self.create()
        name = self.dice.choice(sorted(self.memories))
        return name, self.memories[name]

    # --- Documents ----------------------------------------------------------------------------------------------------

    def made(self, memory: Memory) -> Document:
        metadata = {"n": self.dice.randrange(5)} if self.dice.random() < 0.8 else {}
        tokens = self.dice.choice([1, 7, 30, 90, 200])
        return document(self.dice.choice(NAMES), tokens, memory.spec, f"{self.turn}", metadata)

    def remember(self, memory: Memory, one: Document, info: DocumentInfo) -> None:
        assert (info.id, info.tokens, dict(info.metadata)) == (one.id, one.tokens, dict(one.metadata))
        assert all(info.generation > known.generation for known in memory.infos.values())
        memory.documents[one.id], memory.infos[one.id] = one, info

    def put(self) -> str:
        name, memory = self.pick()
        one = self.made(memory)
        replacing = self.dice.random() < 0.5
        if one.id in memory.documents and not replacing:
            assert isinstance(refused(self.store, verbs.PutDocument(name, one, MODEL)), AlreadyExists)
            return "put refused"
        request = str(self.turn) if self.dice.random() < 0.5 else ""
        info = put(self.store, name, one, replacing=replacing, request_id=request)
        self.remember(memory, one, info)
        if request:
            assert put(self.store, name, one, replacing=replacing, request_id=request) == info
        return "put"

    def begin(self) -> str:
        name, memory = self.pick()
        one = self.made(memory)
        conflict = self.dice.choice(list(Conflict))
        verb = verbs.BeginUpload(name, one.id, one.tokens, MODEL, one.metadata, conflict, f"u{self.turn}")
        if conflict is Conflict.FAIL and one.id in memory.documents:
            assert isinstance(refused(self.store, verb), AlreadyExists)
            return "begin refused"
        upload = self.store.run(ME, verb)
        assert self.store.run(ME, verb).id == upload.id
        assert upload.parts == len(part_ranges(memory.spec, one.tokens))
        memory.uploads[upload.id] = (one, upload, conflict)
        return "begin"

    def send(self) -> str:
        """Some of the chunks an upload misses, in any order."""
        name, memory = self.pick()
        if not memory.uploads:
            return "nothing"
        key = self.dice.choice(list(memory.uploads))
        one, *_ = memory.uploads[key]
        missing = self.store.run(ME, verbs.GetUpload(name, key)).missing
        wanted = [(part, chunk) for part, first, count in missing for chunk in range(first, first + count)]
        self.dice.shuffle(wanted)
        for part, chunk in wanted[: self.dice.randrange(1, 4)]:
            self.store.write_chunk(ME, name, key, chunk_of(one, memory.spec, part, chunk))
        return "send"

    def commit(self) -> str:
        name, memory = self.pick()
        if not memory.uploads:
            return "nothing"
        key = self.dice.choice(list(memory.uploads))
        one, _, conflict = memory.uploads[key]
        if self.store.run(ME, verbs.GetUpload(name, key)).missing:
            assert refused(self.store, verbs.CommitUpload(name, key)).code == "INCOMPLETE"
            return "commit refused"
        if conflict is Conflict.FAIL and one.id in memory.documents:
            assert isinstance(refused(self.store, verbs.CommitUpload(name, key)), AlreadyExists)
            return "commit refused"
        info = self.store.run(ME, verbs.CommitUpload(name, key))
        assert self.store.run(ME, verbs.CommitUpload(name, key)) == info
        self.remember(memory, one, info)
        del memory.uploads[key]
        return "commit"

    def abort(self) -> str:
        name, memory = self.pick()
        for key in list(memory.uploads)[:1]:
            self.store.run(ME, verbs.AbortUpload(name, key))
            assert isinstance(refused(self.store, verbs.GetUpload(name, key)), NotFound)
            del memory.uploads[key]
        return "abort"

    def delete(self) -> str:
        name, memory = self.pick()
        one = self.dice.choice(NAMES)
        if one not in memory.documents:
            assert isinstance(refused(self.store, verbs.DeleteDocument(name, one)), NotFound)
            return "delete refused"
        for _ in range(self.dice.choice([1, 2])):
            self.store.run(ME, verbs.DeleteDocument(name, one, f"x{self.turn}"))
        del memory.documents[one], memory.infos[one]
        return "delete"

    # --- Sessions -----------------------------------------------------------------------------------------------------

    def open_session(self) -> str:
        name, memory = self.pick()
        memory.sessions[self.store.run(ME, verbs.OpenSession(name, MODEL)).id] = [[] for _ in memory.spec.layers]
        return "open"

    def append(self) -> str:
        name, memory = self.pick()
        if not memory.sessions:
            return "nothing"
        key = self.dice.choice(list(memory.sessions))
        told = memory.sessions[key]
        lengths = [sum(keys.shape[1] for keys, _ in layer) for layer in told]
        places = [0, 1] if lengths[0] == lengths[1] else [lengths.index(min(lengths))]
        if self.dice.random() < 0.3:
            places = places[:1]
        keys, values = (one[: len(places)] for one in tensors(memory.spec, self.dice.randrange(1, 60), self.turn))
        layers = tuple(memory.spec.layers[place] for place in places)
        one = SessionAppend(key, layers, lengths[places[0]], keys, values)
        for _ in range(self.dice.choice([1, 1, 2])):  # A retry is harmless.
            self.store.run(ME, verbs.AppendSessions(name, (one,)))
        for number, place in enumerate(places):
            told[place].append((keys[number], values[number]))
        return "append"

    def close_session(self) -> str:
        name, memory = self.pick()
        if not memory.sessions:
            return "nothing"
        key = self.dice.choice(list(memory.sessions))
        self.store.run(ME, verbs.CloseSession(name, key))
        del memory.sessions[key]
        assert isinstance(refused(self.store, verbs.RenewSession(name, key)), SessionExpired)
        return "close"

    # --- Questions ----------------------------------------------------------------------------------------------------

    def scope(self, memory: Memory, layer: int) -> tuple[Scope, list[Source]]:
        """A random scope, and the tokens it stands for."""
        documents = None if self.dice.random() < 0.5 else tuple(n for n in memory.documents if self.dice.random() < 0.5)
        where = Condition("n", Compare.LT, (self.dice.randrange(5),)) if self.dice.random() < 0.4 else None
        sources = [
            Source(one.id, one.keys[layer], one.values[layer])
            for one in memory.documents.values()
            if (documents is None or one.id in documents) and (where is None or where.matches(one.metadata))
        ]
        sessions = []
        for key in list(memory.sessions):
            if self.dice.random() < 0.5 and memory.sessions[key][layer]:
                until = self.dice.choice([None, 1, 40])
                sessions.append(SessionScope(key, until))
                keys, values = (torch.cat(one, 1)[:, :until] for one in zip(*memory.sessions[key][layer], strict=True))
                sources.append(Source(f"session:{key}", keys, values))
        return Scope(documents, where, tuple(sessions)), sources

    def ask(self) -> str:
        name, memory = self.pick()
        layer = self.dice.randrange(2)
        scope, sources = self.scope(memory, layer)
        top_k = self.dice.choice([0, 1, 8, 300])
        check_exact(
            self.store, name, memory.spec, sources, scope, QUERIES, layer=memory.spec.layers[layer], top_k=top_k
        )
        return "ask"

    def ask_the_index(self) -> str:
        """Whatever the index finds must be in scope and be weighed as it is stored; enough candidates find the best."""
        name, memory = self.pick()
        layer = self.dice.randrange(2)
        scope, sources = self.scope(memory, layer)
        more: dict[str, Any] = {"tokens": True, "top_k": 8, "engine": Engine.INDEX, "search": {"candidates": 16_000}}
        if not sources or refuses(self.store, name, memory.spec.layers[layer], scope, more):
            return "index refused"
        if memory.spec.index.factory == "IVF4,SQ8":
            more["search"] = {"candidates": 16_000, "nprobe": 4}
        answer = attend(self.store, name, memory.spec.layers[layer], QUERIES, scope, **more)
        assert answer.tokens is not None
        scores = scores_of(QUERIES, torch.cat([one.keys for one in sources], 1))
        check_top_tokens(answer.tokens, sources, scores, 8)
        return "ask the index"

    def fetch(self) -> str:
        name, memory = self.pick()
        if not memory.documents:
            return "nothing"
        one = memory.documents[self.dice.choice(sorted(memory.documents))]
        place, first = self.dice.randrange(2), self.dice.randrange(one.tokens)
        count = self.dice.randrange(1, one.tokens + 1)
        got = self.store.run(ME, verbs.Fetch(name, one.id, memory.spec.layers[place], first, count))
        assert torch.equal(got.keys, one.keys[place, :, first : first + count])
        assert torch.equal(got.values, one.values[place, :, first : first + count])
        assert torch.equal(got.token_ids, one.token_ids[first : first + count])  # type: ignore[index]
        return "fetch"

    def list(self) -> str:
        names = [one.name for one in self.store.run(ME, verbs.ListMemories()).items]
        assert names == sorted(self.memories)
        for name, memory in self.memories.items():
            found: list[DocumentInfo] = []
            token = ""
            while True:
                page = self.store.run(ME, verbs.ListDocuments(name, page_size=3, page_token=token))
                found += page.items
                token = page.next
                if not token:
                    break
            assert found == [memory.infos[one] for one in sorted(memory.infos)]
            info = self.store.run(ME, verbs.GetMemory(name))
            assert (info.documents, info.tokens) == (len(found), sum(one.tokens for one in found))
        for key in self.gone[-3:]:
            assert isinstance(refused(self.store, verbs.RenewSession(names[0], key)), NotFound) if names else True
        return "list"

    # --- What must not change anything --------------------------------------------------------------------------------

    def warm(self) -> str:
        warm(self.store, self.pick()[0])
        return "warm"

    def _finish(self, kind: OperationKind) -> str:
        name, _ = self.pick()
        done = finish(self.store, name, kind)
        assert done.state is OperationState.DONE, done
        return kind.value

    def compact(self) -> str:
        return self._finish(OperationKind.COMPACT)

    def index(self) -> str:
        return self._finish(OperationKind.INDEX)

    def verify(self) -> str:
        return self._finish(OperationKind.VERIFY)

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> str:
        name, memory = self.pick()
        one = f"s{self.turn}"
        assert wait(self.store, verbs.CreateSnapshot(name, one)).state is OperationState.DONE
        self.snapshots[one] = (name, Memory(memory.spec, dict(memory.documents), dict(memory.infos)))
        return "snapshot"

    def restore(self) -> str:
        """Under a free name what the snapshot held comes back, whatever became of the memory since."""
        if not self.snapshots:
            return "nothing"
        one = self.dice.choice(sorted(self.snapshots))
        _, held = self.snapshots[one]
        name = self.dice.choice("xyz")
        if name in self.memories:
            assert isinstance(refused(self.store, verbs.RestoreSnapshot(one, name)), AlreadyExists)
            if self.dice.random() < 0.5:
                return "restore refused"
            self.store.run(ME, verbs.DeleteMemory(name))
            self.gone += self.memories.pop(name).sessions
        assert wait(self.store, verbs.RestoreSnapshot(one, name)).state is OperationState.DONE
        self.memories[name] = Memory(held.spec, dict(held.documents), dict(held.infos))
        self.list()
        return "restore"

    def drop_snapshot(self) -> str:
        listed = [one.id for one in self.store.run(ME, verbs.ListSnapshots(page_size=1000)).items]
        assert listed == sorted(self.snapshots)
        for one in listed[:-4]:
            self.store.run(ME, verbs.DeleteSnapshot(one))
            del self.snapshots[one]
        return "drop snapshots"

    def restart(self) -> str:
        self.store.close()
        self.store = Store.open(self.directory, OPTIONS)
        for memory in self.memories.values():
            self.gone += memory.sessions
            memory.sessions, memory.uploads = {}, {}
        return "restart"

    def rebuild(self) -> str:
        self.store.close()
        rebuild_catalog(self.directory / "catalog.sqlite", self.directory, OsVfs())
        self.restart()
        return "rebuild"


def refuses(store: Store, memory: str, layer: int, scope: Scope, more: dict[str, Any]) -> bool:
    try:
        attend(store, memory, layer, QUERIES, scope, **more)
    except FotError as problem:
        assert "no index covers" in problem.message, problem
        return True
    return False


def chunk_of(one: Document, spec: MemorySpec, part: int, chunk: int) -> Chunk:
    """A chunk of a document's part as it travels."""
    first, tokens = part_ranges(spec, one.tokens)[part]
    piece = slice(first, first + tokens)
    assert one.token_ids is not None
    planes = (one.keys[:, :, piece], one.values[:, :, piece], one.token_ids[piece].to(torch.int32))
    payload = b"".join(plane.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for plane in planes)
    assert len(payload) == PartLayout.of(spec, tokens).nbytes
    data = payload[chunk << 20 : (chunk + 1) << 20]
    return Chunk(part, chunk << 20, zlib.crc32(data), data)


def run(directory: Path, orders: int, seed: int) -> Counter[str]:
    """Give so many orders; a failure names the seed and the order it happened at."""
    trace: list[str] = []
    with everything_in_small_pieces(spec_of(dim=8).bytes_per_token):
        model = Model(directory, seed)
        try:
            for _ in range(orders):
                trace.append(model.step())
            model.restart()
            model.list()
        except BaseException as problem:
            raise AssertionError(f"seed {seed}, order {len(trace) + 1}, after {trace[-12:]}") from problem
        finally:
            model.store.close()
    return model.did


@pytest.mark.parametrize("seed", [1, 2])
def test_a_thousand_random_orders_agree_with_a_dict(tmp_path: Path, seed: int) -> None:
    did = run(tmp_path / "data", 1000, seed)
    often = ("put", "commit", "delete", "ask", "append", "compact", "restart", "rebuild", "snapshot", "restore")
    assert min(did[name] for name in often) >= 3
    assert did["ask the index"] >= 5


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_very_many_random_orders_agree_with_a_dict(tmp_path: Path) -> None:
    orders = int(os.environ.get("FOT_SOAK_OPS", "200000"))
    seed = int(os.environ.get("FOT_SOAK_SEED", str(time.time_ns() % 1_000_000)))
    print(f"seed {seed}")
    did: Counter[str] = Counter()
    # Request ids and old rows pile up in a catalogue for a week: a fresh directory for every 5,000 orders.
    for first in range(0, orders, 5000):
        did += run(tmp_path / str(first), min(5000, orders - first), seed + first)
    print(dict(did))


# --- Recall and exactness stay what they were (T18) -------------------------------------------------------------------

CLUSTERED = spec_of(DType.BF16, heads=1, dim=16, factory="IVF32,SQ8")


def clustered(name: str, tokens: int, seed: int) -> Document:
    """Keys around a few dozen centres, as attention keys lie."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    picked = torch.randint(0, 24, (2, 1, tokens), generator=generator)
    keys = centres[picked] + torch.randn(2, 1, tokens, 16, generator=generator)
    values = torch.randn(2, 1, tokens, 16, generator=generator)
    return Document(name, keys.bfloat16(), values.bfloat16())


@contextmanager
def indexed(directory: Path) -> Iterator[list[Store]]:
    """A store with an index over five documents; put another one in its place to have that closed instead."""
    store = Store.open(directory, StoreOptions(background=False))
    box = [store]
    try:
        store.run(ME, verbs.CreateMemory("m", CLUSTERED))
        for number in range(6):
            put(store, "m", clustered(f"d{number}", 2000 + 100 * number, number))
        store.run(ME, verbs.DeleteDocument("m", "d3"))
        assert finish(store, "m", OperationKind.INDEX).state is OperationState.DONE
        yield box
    finally:
        box[0].close()


def reopen(box: list[Store], directory: Path) -> None:
    box[0].close()
    box[0] = Store.open(directory, StoreOptions(background=False))


def rebuild_index(box: list[Store], directory: Path) -> None:
    """Without its sidecars."""
    box[0].close()
    for path in (directory / "indexes").rglob("*"):
        if path.is_file():
            path.unlink()
    box[0] = Store.open(directory, StoreOptions(background=False))
    finish(box[0], "m", OperationKind.INDEX)


def rebuild(box: list[Store], directory: Path) -> None:
    box[0].close()
    rebuild_catalog(directory / "catalog.sqlite", directory, OsVfs())
    box[0] = Store.open(directory, StoreOptions(background=False))
    finish(box[0], "m", OperationKind.INDEX)


def compact(box: list[Store], _: Path) -> None:
    assert finish(box[0], "m", OperationKind.COMPACT).state is OperationState.DONE


def warm_up(box: list[Store], _: Path) -> None:
    warm(box[0], "m")


@pytest.mark.parametrize("change", [reopen, compact, warm_up, rebuild_index, rebuild])
def test_recall_and_exact_answers_are_the_same_after(
    tmp_path: Path, change: Callable[[list[Store], Path], None]
) -> None:
    queries = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(2))
    with indexed(tmp_path / "data") as box:

        def answers() -> tuple[Attended, Attended, Attended]:
            approximate: dict[str, Any] = {
                "engine": Engine.INDEX,
                "measure": True,
                "search": {"nprobe": 3, "candidates": 48},
            }
            return (
                attend(box[0], "m", 3, queries),
                attend(box[0], "m", 7, queries, top_k=16, tokens=True),
                attend(box[0], "m", 7, queries, top_k=16, **approximate),
            )

        before = answers()
        change(box, tmp_path / "data")
        after = answers()
    for old, new in zip(before[:2], after[:2], strict=True):
        assert error(new, old.partial) <= 1e-6
        assert old.coverage == new.coverage
    tokens = [one[1].tokens for one in (before, after)]
    assert tokens[0] is not None
    assert tokens[1] is not None
    assert torch.equal(tokens[0].offset.sort(2).values, tokens[1].offset.sort(2).values)
    measured = [one[2].measured for one in (before, after)]
    assert measured[0] is not None
    assert measured[1] is not None
    assert 0.5 < measured[0].recall < 1  # A perfect recall could not get worse unseen.
    assert measured[1].recall == pytest.approx(measured[0].recall, abs=1e-3)
    assert measured[1].captured_mass == pytest.approx(measured[0].captured_mass, abs=1e-3)


def test_an_index_from_before_a_rebuild_is_not_mistaken_for_one_of_newer_documents(tmp_path: Path) -> None:
    root = tmp_path / "data"
    with Store.open(root, OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", CLUSTERED))
        for name in ("a", "b"):
            put(store, "m", clustered(name, 400, ord(name)))
        assert finish(store, "m", OperationKind.INDEX).state is OperationState.DONE
        store.run(ME, verbs.DeleteDocument("m", "b"))
        assert finish(store, "m", OperationKind.COMPACT).state is OperationState.DONE
    rebuild_catalog(root / "catalog.sqlite", root, OsVfs())
    with Store.open(root, OPTIONS) as store:
        put(store, "m", clustered("c", 300, 9))  # With the key in the catalogue that b had.
        queries = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(2))
        every = {"nprobe": 32, "candidates": 16_000}
        found = attend(store, "m", 3, queries, top_k=16, engine=Engine.INDEX, measure=True, search=every)
        assert found.engine.endswith("+exact")  # The newer document is not in the index.
        assert found.measured is not None
        assert found.measured.recall == 1.0
