"""A cluster of real processes that are killed with -9, or hang, while it is read and written."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from memory_service import AlreadyExists, Coverage, Memory, NotFound, Unavailable
from memory_service.cli.main import app
from memory_service.client.connection import Connection
from memory_service.cluster.directory import Seeds, tell
from memory_service.cluster.opening import Reach
from memory_service.cluster.options import ClusterOptions
from memory_service.cluster.place import ClusterPlace, Lines
from memory_service.places.remote import Line
from memory_service.shards import Shard, ShardMap
from memory_service.types.documents import Document
from memory_service.verbs import GetDocument, ListDocuments, PutDocument
from tests.memory_service.clusters import LAYER, SPEC, Process, drawn, processes, target, until

# Three processes that all import torch at the same time take a minute where many others do so.
pytestmark = pytest.mark.timeout(300)

KEPT = {f"d{number}": number for number in range(8)}
QUERIES = torch.randn(4, 3, SPEC.head_dim, generator=torch.Generator().manual_seed(7))


def tokens_of(seed: int) -> int:
    return 2 + seed % 5


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Process]]:
    """Two processes that hold the same shard s0, and one that holds s1 alone; documents in both."""
    with processes(tmp_path_factory.mktemp("cluster"), 3) as found:
        lines = Lines(Reach("test", None, None).address)
        tell(map_of(found), lines.place)
        lines.close()
        with opened(found) as memory:
            for name, seed in KEPT.items():
                memory.put(name, *drawn(seed, tokens_of(seed)))
        yield found


def map_of(found: Sequence[Process]) -> ShardMap:
    a, b, c = (one.address for one in found)
    return ShardMap(1, (Shard("s0", (a, b)), Shard("s1", (c,))))


def opened(found: Sequence[Process], **given: Any) -> Memory:
    return Memory.open(target([one.address for one in found]), "m", SPEC, **given)


def fot(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.output


class Load:
    """Readers and a writer in threads: what they did, and everything that went wrong."""

    def __init__(self, memory: Memory):
        self.memory = memory
        self.written: dict[str, int] = {}
        self.problems: list[object] = []
        self.done = [0, 0, 0]
        self._stop = threading.Event()
        with Memory.open(":memory:", "m", SPEC) as one:
            for name, seed in KEPT.items():
                one.put(name, *drawn(seed, tokens_of(seed)))
            self._wanted = [one.attend(LAYER, QUERIES, top_k=top_k) for top_k in (0, 5)]
        work = (lambda: self._read(0), lambda: self._read(5), self._write)
        self._threads = [threading.Thread(target=self._run, args=each) for each in enumerate(work)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def goes_on(self, requests: int = 8) -> None:
        """Wait until everybody did that many requests more."""
        before = list(self.done)
        until(lambda: self.problems or all(now >= then + requests for now, then in zip(self.done, before, strict=True)))
        assert self.problems == []

    def _run(self, number: int, work: Callable[[], None]) -> None:
        try:
            while not self._stop.wait(0.01):  # A process that starts needs the core too.
                work()
                self.done[number] += 1
        except BaseException as error:
            self.problems.append(error)

    def _read(self, top_k: int) -> None:
        found = self.memory.attend(LAYER, QUERIES, top_k=top_k, scope=list(KEPT))
        wanted = self._wanted[top_k > 0]
        if found.coverage != wanted.coverage or not torch.allclose(found.output, wanted.output, atol=1e-5):
            self.problems.append(("read", found.coverage))

    def _write(self) -> None:
        seed = self.done[2]
        name = f"w{seed}"
        self.memory.put(name, *drawn(seed, tokens_of(seed)))
        self.written[name] = seed
        if seed % 3 == 2:
            gone = f"w{seed - 1}"
            self.memory.delete(gone)
            del self.written[gone]
            with pytest.raises(NotFound):
                self.memory.get(gone)
        if self.memory.get(name).tokens != tokens_of(seed):
            self.problems.append(("written", name))


def test_a_replica_killed_under_load_fails_nothing_and_is_healed(three: list[Process]) -> None:
    where = target([one.address for one in three])
    with opened(three) as memory:
        with Load(memory) as load:
            load.goes_on()
            three[0].kill()
            load.goes_on()
            code, told = fot("status", "--target", where)
            assert code == 1
            assert "down" in told
            three[0].start()
            three[0].wait()
            load.goes_on()
            code, told = fot("heal", "--target", where, "--json")
            assert (code, json.loads(told)["away"], json.loads(told)["behind"]) == (0, [], [])
            assert json.loads(told)["copied"] > 0
            load.goes_on()
        assert load.problems == []
        assert fot("heal", "--target", where)[0] == 0
        code, told = fot("status", "--target", where, "--json")
        assert code == 0
        held = KEPT | load.written
        assert json.loads(told)["documents"] == len(held)
        assert [(one.id, one.tokens) for one in memory.documents()] == [
            (name, tokens_of(held[name])) for name in sorted(held)
        ]
        # What the killed one holds now, asked by itself, is what the other holds.
        lines = Lines(Reach("test", None, None).address)
        both = [lines.place(one.address).run(ListDocuments("m", None, 1000), 10.0).items for one in three[:2]]
        assert [(one.id, one.generation) for one in both[0]] == [(one.id, one.generation) for one in both[1]]
        lines.close()
        for name in load.written:
            memory.delete(name)


def test_a_killed_shard_fails_by_name_or_is_left_out_and_comes_back_whole(three: list[Process]) -> None:
    lost = [name for name in KEPT if map_of(three).owner("m", name).id == "s1"]
    left = sum(tokens_of(KEPT[name]) for name in KEPT if name not in lost)
    everything = sum(map(tokens_of, KEPT.values()))
    with opened(three) as memory, opened(three, on_missing="degrade") as lenient:
        whole = memory.attend(LAYER, QUERIES, top_k=6)
        lenient.info()
        three[2].kill()
        with pytest.raises(Unavailable, match="s1") as raised:
            memory.attend(LAYER, QUERIES, timeout_s=1.0)
        assert raised.value.metadata["shards"] == "s1"
        for top_k in (0, 6):
            found = lenient.attend(LAYER, QUERIES, top_k=top_k)
            assert found.coverage == Coverage(left, everything, missing=("s1",))
            assert torch.allclose(
                found.output, memory.attend(LAYER, QUERIES, top_k=top_k, scope=sorted(set(KEPT) - set(lost))).output
            )
        three[2].start()
        three[2].wait()
        again = memory.attend(LAYER, QUERIES, top_k=6)
        assert again.coverage == Coverage(everything, everything)
        assert torch.allclose(again.output, whole.output, atol=1e-5)
        until(lambda: lenient.attend(LAYER, QUERIES).coverage == Coverage(everything, everything))


def test_a_process_that_hangs_costs_seconds_not_the_deadline(three: list[Process]) -> None:
    lines = Lines(Reach("test", None, None).address, Line(0.0, 2000, 200, alive_ms=300, answer_ms=300))
    directory = Seeds("test", [one.address for one in three], 1, lines.place)
    place = ClusterPlace(directory, lines, ClusterOptions())
    mine = next(name for name in KEPT if map_of(three).owner("m", name).id == "s0")
    try:
        place.router.health._turn = 0
        connection = Connection(place, 30.0)
        assert connection.run(GetDocument("m", mine)).id == mine
        with three[0].frozen():
            began = time.monotonic()
            assert connection.run(GetDocument("m", mine)).id == mine
            put = PutDocument("m", Document(mine, *drawn(KEPT[mine], tokens_of(KEPT[mine]))), SPEC.fingerprint)
            with pytest.raises(AlreadyExists):
                connection.run(put)
            assert time.monotonic() - began < 10.0
    finally:
        place.close()
