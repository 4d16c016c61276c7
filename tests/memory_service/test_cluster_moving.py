"""Shards added and removed while the cluster is read and written: nothing is wrong, lost or doubled."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_service import Memory, NotFound
from memory_service.cluster import caretaker as caretaking
from memory_service.cluster.caretaker import Caretaker
from memory_service.cluster.opening import Reach
from memory_service.errors import FailedPrecondition, FotError, InvalidArgument, StaleMap
from memory_service.places.remote import RemotePlace
from memory_service.shards import Shard, ShardMap
from memory_service.verbs import GetDocument, GetShardMap, ListDocuments
from tests.memory_service.clusters import LAYER, SPEC, Service, drawn, restartable, target

IDS = [f"d{number}" for number in range(24)]


def shards(*runs: list[Service]) -> tuple[Shard, ...]:
    return tuple(Shard(f"s{number}", tuple(one.address for one in run)) for number, run in enumerate(runs))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stopped here does not come back within a second."""
    monkeypatch.setattr(caretaking, "_LINE", replace(caretaking._LINE, patience_s=0.2))


@pytest.fixture
def four(tmp_path: Path) -> Iterator[list[Service]]:
    with restartable(tmp_path, 4) as found:
        yield found


@contextmanager
def cluster(found: list[Service]) -> Iterator[tuple[Memory, Caretaker]]:
    """A memory over these services, a shard each, with documents in it."""
    where = target([one.address for one in found])
    with Memory.open(where, "m", SPEC) as memory, Caretaker.open(where) as keeper:
        for number, name in enumerate(IDS):
            memory.put(name, *drawn(number, 3), metadata={"number": number})
        yield memory, keeper


def lines(one: Service) -> RemotePlace:
    return RemotePlace(Reach("test", None, None).address(one.address))


def held(one: Service) -> list[str]:
    """What a process holds, whoever owns it."""
    place = lines(one)
    try:
        return [info.id for info in place.run(ListDocuments("m", None, 1000), 10.0).items]
    except NotFound:
        return []
    finally:
        place.close()


def test_a_new_shard_takes_its_part_and_nothing_else_moves(four: list[Service]) -> None:
    with cluster(four[:2]) as (memory, keeper):
        before = memory.attend(LAYER, torch.ones(2, 1, 8), top_k=9, tokens=True)
        moved = keeper.move(shards(four[:1], four[1:2], four[2:3]))
        assert 3 <= moved.copied <= 13
        assert moved.deleted == moved.copied
        held_now = [held(one) for one in four[:3]]
        assert sorted(name for names in held_now for name in names) == sorted(IDS)
        assert len(held_now[2]) == moved.copied
        status = keeper.status()
        assert (status.epoch, status.moving, status.whole, status.documents) == (4, False, True, len(IDS))
        # The client knew the old map.
        after = memory.attend(LAYER, torch.ones(2, 1, 8), top_k=9, tokens=True)
        assert torch.allclose(before.output, after.output, atol=1e-6)
        assert before.coverage == after.coverage
        memory.put("d0", *drawn(50, 5), replace=True)
        memory.delete("d1")
        assert (memory.info().documents, memory.info().tokens) == (23, 23 * 3 + 2)
        back = keeper.move(shards(four[:1], four[1:2]))
        assert back.copied == len(held_now[2]) - ("d1" in held_now[2])
        assert held(four[2]) == []
        assert memory.get("d0").tokens == 5
        assert [one.id for one in memory.documents()] == sorted(set(IDS) - {"d1"})
        # And out again: what left a shard once may come back to it.
        keeper.move(shards(four[:1], four[1:2], four[2:3]))
        assert memory.info().documents == 23
        assert keeper.move(shards(four[:1], four[1:2], four[2:3])).copied == 0


def test_readers_and_writers_notice_nothing_of_a_move(four: list[Service]) -> None:
    problems: list[object] = []
    stop = threading.Event()
    all_four = shards(four[:1], four[1:2], four[2:3], four[3:])
    layouts = [all_four, (all_four[0], all_four[3]), (all_four[1],)]
    where = target([one.address for one in four[:2]])
    with cluster(four[:2]) as (_, keeper):

        def read() -> None:
            with Memory.open(where, "m") as memory:
                while not stop.wait(0.005):
                    found = memory.attend(LAYER, torch.ones(2, 1, 8), where="number < 12", top_k=100, tokens=True)
                    assert found.tokens is not None
                    if found.coverage.in_scope != 36 or (found.tokens.source >= 0).sum() != 2 * 36:
                        problems.append(("read", found.coverage, found.tokens.sources))

        def write() -> None:
            with Memory.open(where, "m") as memory:
                number = 0
                while not stop.wait(0.005):
                    name = f"w{number % 7}"
                    memory.put(name, *drawn(number, 2), replace=True, metadata={"number": 100})
                    if memory.get(name).tokens != 2:
                        problems.append(("write", name))
                    memory.delete(name)
                    try:
                        memory.get(name)
                        problems.append(("deleted", name))
                    except NotFound:
                        pass
                    number += 1

        def guarded(work: object) -> None:
            try:
                work()  # type: ignore[operator]
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=guarded, args=(work,)) for work in (read, write)]
        for thread in threads:
            thread.start()
        try:
            for layout in layouts:
                keeper.move(layout)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert problems == []
        assert keeper.status().documents in (len(IDS), len(IDS) + 1)


@pytest.mark.parametrize("stops_at", [3, 4])
def test_a_move_that_was_cut_off_goes_on(four: list[Service], stops_at: int) -> None:
    wanted = shards(four[:1], four[1:2], four[2:3])
    with cluster(four[:2]) as (memory, keeper):
        cut_off(keeper, wanted, stops_at)
        assert memory.info().documents == len(IDS)
        assert keeper.status().moving
        with pytest.raises(FailedPrecondition, match="another move"):
            keeper.move(shards(four[3:]))
        memory.put("d0", *drawn(60, 9), replace=True)
        keeper.move(wanted)
        assert not keeper.status().moving
        assert memory.get("d0").tokens == 9
        assert memory.info().documents == len(IDS)


def cut_off(keeper: Caretaker, wanted: tuple[Shard, ...], epoch: int) -> None:
    """Begin to move, and end as if killed before the map of this epoch is told."""
    tell = caretaking.tell

    def cut(new: ShardMap, *rest: Any, **more: Any) -> Any:
        if new.epoch == epoch:
            raise KeyboardInterrupt
        return tell(new, *rest, **more)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(caretaking, "tell", cut)
        keeper.move(wanted)


@pytest.mark.parametrize(("epoch", "lost"), [(3, 1), (4, 1), (4, 2)])
def test_a_service_that_comes_back_elsewhere_while_documents_move_is_found(
    four: list[Service], epoch: int, lost: int
) -> None:
    with cluster(four[:2]) as (memory, keeper):
        whole = memory.attend(LAYER, torch.ones(2, 1, 8))
        cut_off(keeper, shards(four[:1], four[1:2], four[2:3]), epoch)
        four[lost].stop()
        moved = Service(four[lost].directory)
        moved.start()
        try:
            three = [*four[:lost], moved, *four[lost + 1 : 3]]
            with pytest.raises(FailedPrecondition, match="use `move`"):
                keeper.publish(shards(three[:1], three[1:2]))
            keeper.publish(shards(three[:1], three[1:2], three[2:]))
            assert keeper.status().moving
            assert memory.attend(LAYER, torch.ones(2, 1, 8)).coverage == whole.coverage
            memory.put("new", *drawn(70, 4))
            memory.delete("d3")
            keeper.move(shards(three[:1], three[1:2], three[2:]))
            status = keeper.status()
            assert (status.moving, status.whole, status.documents) == (False, True, len(IDS))
            assert [one.id for one in memory.documents()] == sorted({*IDS, "new"} - {"d3"})
            assert sorted(name for one in three for name in held(one)) == sorted({*IDS, "new"} - {"d3"})
        finally:
            moved.stop()


def test_an_empty_replica_is_filled_while_documents_move(four: list[Service], tmp_path: Path) -> None:
    where = target([one.address for one in four[:2]], "replicas=2")
    with Memory.open(where, "m", SPEC) as memory, Caretaker.open(where) as keeper:
        for number, name in enumerate(IDS):
            memory.put(name, *drawn(number, 3))
        cut_off(keeper, shards(four[:2], four[2:]), 3)
        four[1].stop()
        empty = Service(tmp_path / "another")
        empty.start()
        try:
            keeper.publish(shards([four[0], empty], four[2:]), empty=[empty.address])
            memory.put("new", *drawn(70, 4))
            keeper.move(shards([four[0], empty], four[2:]))
            assert keeper.heal().behind == ()
            status = keeper.status()
            assert (status.moving, status.whole, status.documents) == (False, True, len(IDS) + 1)
            assert held(empty) == held(four[0])
            assert sorted([*held(empty), *held(four[2])]) == sorted([*IDS, "new"])
        finally:
            empty.stop()


def test_what_moved_to_a_service_that_is_lost_is_carried_once_more(four: list[Service]) -> None:
    with cluster(four[:1]) as (memory, keeper):
        whole = memory.attend(LAYER, torch.ones(2, 1, 8))
        cut_off(keeper, shards(four[:1], four[1:2]), 4)
        assert keeper.map.switched
        assert held(four[1]) != []
        four[1].stop()
        keeper.publish(shards(four[:1], four[2:3]), empty=[four[2].address])
        assert not keeper.map.switched
        assert memory.attend(LAYER, torch.ones(2, 1, 8)).coverage == whole.coverage
        keeper.move(shards(four[:1], four[2:3]))
        assert not keeper.status().moving
        assert sorted([*held(four[0]), *held(four[2])]) == sorted(IDS)
        assert held(four[2]) != []
        assert torch.allclose(memory.attend(LAYER, torch.ones(2, 1, 8)).output, whole.output, atol=1e-6)


def test_a_process_answers_only_those_who_know_its_map(four: list[Service]) -> None:
    with cluster(four[:2]) as (_, keeper):
        place = lines(four[0])
        mine = next(name for name in IDS if keeper.map.owner("m", name).id == "s0")
        assert place.run(GetDocument("m", mine), 5.0, 1).id == mine
        keeper.move(shards(four[:1], four[1:2], four[2:3]))
        with pytest.raises(StaleMap) as raised:
            place.run(GetDocument("m", mine), 5.0, 3)
        assert raised.value.metadata["epoch"] == "4"
        place.close()


def test_a_process_remembers_its_map_over_a_restart(four: list[Service]) -> None:
    with cluster(four[:2]):
        four[0].stop()
        four[0].start()
        place = lines(four[0])
        member = place.run(GetShardMap(), 5.0)
        place.close()
        assert member.map is not None
        assert (member.map.epoch, member.map.ids, member.shard, member.behind) == (1, ("s0", "s1"), "s0", False)


def test_new_addresses_of_the_same_shards_move_nothing(four: list[Service]) -> None:
    with cluster(four[:2]) as (memory, keeper):
        with pytest.raises(FailedPrecondition, match="use `move`"):
            keeper.publish(shards(four[:1]))
        keeper.publish(shards(four[:1], [four[1], four[2]]), empty=[four[2].address])
        assert not keeper.status().whole
        keeper.heal()
        assert keeper.status().whole
        four[1].stop()
        assert [one.id for one in memory.documents()] == sorted(IDS)


def test_a_shard_that_comes_back_elsewhere_is_found(four: list[Service]) -> None:
    with cluster(four[:2]) as (memory, keeper):
        mine = [name for name in IDS if keeper.map.owner("m", name).id == "s1"]
        four[1].stop()
        moved = Service(four[1].directory)
        moved.start()
        try:
            keeper.publish(shards(four[:1], [moved]))
            began = time.monotonic()
            # Only the dead address is asked, by a map that nobody there can call old.
            assert memory.get(mine[0]).tokens == 3
            memory.put(mine[1], *drawn(70, 4), replace=True)
            assert memory.attend(LAYER, torch.ones(2, 1, 8)).coverage.searched == 3 * len(IDS) + 1
            assert time.monotonic() - began < 5.0
        finally:
            moved.stop()


def test_a_name_stands_for_the_same_processes_before_and_after(four: list[Service]) -> None:
    with cluster(four[:2]) as (_, keeper):
        for wrong in (shards(four[:1], four[2:3]), shards(four[1:2], four[2:3])):
            with pytest.raises(InvalidArgument):
                keeper.move(wrong)
        assert keeper.map.epoch == 1


def test_seeds_lead_to_the_map_the_processes_know(four: list[Service]) -> None:
    with cluster(four[:2]) as (_, keeper):
        keeper.move(shards(four[:1], four[1:2], four[2:3]))
        with Memory.open(target([four[2].address]), "m") as memory:
            assert memory.info().documents == len(IDS)


def test_errors_of_other_kinds_pass_through(four: list[Service]) -> None:
    with cluster(four[:1]) as (memory, _), pytest.raises(FotError):
        memory.attend(LAYER, torch.ones(2, 1, 8), top_k=4097)
