"""Replicas that die, come back and are healed; shards that are missing."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from memory_service import (
    ALL_DOCUMENTS,
    AlreadyExists,
    Client,
    Coverage,
    FotError,
    InvalidArgument,
    Memory,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from memory_service.cluster.caretaker import Caretaker
from memory_service.cluster.copying import memories_at
from memory_service.cluster.directory import Directory, Seeds
from memory_service.cluster.healing import Healed, heal_shard
from memory_service.cluster.health import Health
from memory_service.cluster.opening import Reach
from memory_service.cluster.options import ClusterOptions
from memory_service.cluster.place import ClusterPlace, Lines
from memory_service.errors import StaleMap, Superseded
from memory_service.places.remote import RemotePlace
from memory_service.server.auth import TokenFile
from memory_service.shards import Shard, ShardMap, Stamps, stamp_at
from memory_service.store.store import Store
from memory_service.types.callers import Identity, Role
from memory_service.types.documents import Conflict, Document, DocumentInfo
from memory_service.verbs import (
    CreateMemory,
    DeleteDocument,
    DeleteMemory,
    GetDocument,
    ListDeleted,
    ListDocuments,
    ListMemories,
    MarkBehind,
    PutDocument,
    SetShardMap,
    Verb,
)
from tests.memory_service.clusters import LAYER, SPEC, Service, drawn, restartable, services, target

TWICE = "replicas=2"


def queries(seed: int = 7) -> Tensor:
    return torch.randn(4, 3, SPEC.head_dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[list[Service]]:
    """Two shards of two replicas each."""
    with restartable(tmp_path, 4) as found:
        yield found


def opened(found: Sequence[Service], query: str = TWICE, **given: Any) -> Memory:
    return Memory.open(target([one.address for one in found], query), "m", SPEC, **given)


def caretaker(found: list[Service], query: str = TWICE) -> Caretaker:
    return Caretaker.open(target([one.address for one in found], query))


def as_one(documents: dict[str, int], memory: Memory, **asked: Any) -> None:
    """The cluster holds these documents (id -> seed), no more and no less, and answers as one memory would."""
    with Memory.open(":memory:", "m", SPEC) as one:
        for name, seed in documents.items():
            one.put(name, *drawn(seed, 2 + seed % 5))
        for top_k in (0, 5):
            wanted, found = (m.attend(LAYER, queries(), top_k=top_k, **asked) for m in (one, memory))
            assert found.coverage == wanted.coverage
            assert torch.allclose(found.output, wanted.output, atol=1e-5)
            assert torch.allclose(found.lse, wanted.lse, atol=1e-5)


def put(memory: Memory, name: str, seed: int, **given: Any) -> None:
    memory.put(name, *drawn(seed, 2 + seed % 5), **given)


# --- With two replicas nothing fails ---------------------------------------------------------------------------------


def test_random_work_while_replicas_die_and_are_healed(pairs: list[Service]) -> None:
    chance = random.Random(4)
    held: dict[str, int] = {}
    down: Service | None = None
    with opened(pairs) as memory, caretaker(pairs) as keeper:
        for step in range(60):
            name = f"d{chance.randrange(9)}"
            if step % 10 == 4:
                down = chance.choice(pairs)
                down.stop()
            if step % 10 == 8 and down is not None:
                down.start()
                keeper.heal()
                assert keeper.status().whole
                down = None
            match chance.choice(("put", "replace", "delete", "get", "attend")):
                case "put" if name in held:
                    with pytest.raises(AlreadyExists):
                        put(memory, name, step)
                case "put" | "replace":
                    put(memory, name, step, replace=name in held)
                    held[name] = step
                case "delete" if name in held:
                    memory.delete(name)
                    del held[name]
                case "delete" | "get" if name not in held:
                    with pytest.raises(NotFound):
                        memory.get(name)
                case "get":
                    assert memory.get(name).tokens == 2 + held[name] % 5
                case _:
                    as_one(held, memory)
        assert [one.id for one in memory.documents()] == sorted(held)
        as_one(held, memory)


def test_a_session_survives_the_death_of_a_replica(pairs: list[Service]) -> None:
    keys, values = drawn(1, 12)
    with opened(pairs) as memory:
        put(memory, "d", 1)
        with memory.session() as session:
            session.append([1, 3], keys[:, :, :6], values[:, :, :6])
            home = session.id.partition(".")[0]
            shard = pairs[:2] if home == "s0" else pairs[2:]
            shard[0].stop()
            session.append([1, 3], keys[:, :, 6:], values[:, :, 6:])
            shard[0].start()
            found = session.attend(LAYER, queries(), documents=ALL_DOCUMENTS)
            with Memory.open(":memory:", "m", SPEC) as one:
                put(one, "d", 1)
                with one.session() as same:
                    same.append([1, 3], keys, values)
                    wanted = same.attend(LAYER, queries(), documents=ALL_DOCUMENTS)
            assert found.coverage == wanted.coverage
            assert torch.allclose(found.output, wanted.output, atol=1e-5)


def test_a_listing_goes_on_where_the_replica_that_began_it_died(pairs: list[Service]) -> None:
    shard = pairs[:2]
    with opened(shard) as memory:
        names = [f"d{number:02}" for number in range(14)]
        for number, name in enumerate(names):
            put(memory, name, number)
        first = memory.connection.run(ListDocuments("m", None, 4))
        page = memory.connection.run(ListDocuments("m", None, 4, first.next))
        health = cast(ClusterPlace, memory.connection.place).router.health
        asked = health.order([one.address for one in shard])[0]
        next(one for one in shard if one.address == asked).stop()
        rest = memory.connection.run(ListDocuments("m", None, 100, page.next))
        assert [one.id for one in (*first.items, *page.items, *rest.items)] == names


# --- Behind and healed -----------------------------------------------------------------------------------------------


def test_a_replica_that_was_away_is_not_read_until_it_is_healed(pairs: list[Service]) -> None:
    shard = pairs[:2]
    with opened(shard) as memory, caretaker(shard) as keeper:
        put(memory, "kept", 1)
        put(memory, "gone", 2)
        put(memory, "changed", 3)
        shard[0].stop()
        memory.delete("gone")
        put(memory, "changed", 4, replace=True)
        put(memory, "new", 5, metadata={"lang": "py"})
        shard[0].start()
        status = keeper.status()
        (one,) = status.shards
        assert [replica.behind for replica in one.replicas] == [True, False]
        assert one.replicas[0].lag == 3
        as_one({"kept": 1, "changed": 4, "new": 5}, memory)
        shard[1].stop()
        with pytest.raises(Unavailable, match="heal"):
            opened(shard, timeout_s=1.0)
        shard[1].start()
        healed = keeper.heal()
        assert (healed.copied, healed.deleted, healed.behind) == (2, 1, ())
        assert keeper.heal().copied == 0
        assert keeper.status().whole
        shard[1].stop()
        with opened(shard) as other:
            as_one({"kept": 1, "changed": 4, "new": 5}, other)
            assert dict(other.get("new").metadata) == {"lang": "py"}
            assert torch.equal(other.fetch("new", 1, 0, 2).values, drawn(5, 2)[1][0])


def test_a_process_whose_disk_is_lost_is_filled_again(pairs: list[Service], tmp_path: Path) -> None:
    shard = pairs[:2]
    with opened(shard) as memory, caretaker(shard) as keeper:
        for number in range(5):
            put(memory, f"d{number}", number)
        big = drawn(9, 9000)
        memory.put("big", *big, token_ids=range(9000))
        shard[0].stop()
        with restartable(tmp_path / "new", 1) as (fresh,):
            report = keeper.replace(shard[0].address, fresh.address)
            assert report.copied == 6
            put(memory, "after", 7)
            shard[1].stop()
            as_one({"after": 7}, memory, scope="after")
            found = memory.fetch("big", LAYER, 8990, 10)
            assert torch.equal(found.keys, big[0][1, :, 8990:])
            assert memory.info().documents == 7


def test_memories_created_and_deleted_meanwhile_are_healed_too(pairs: list[Service]) -> None:
    shard = pairs[:2]
    with Client.open(target([one.address for one in shard], TWICE)) as client, caretaker(shard) as keeper:
        put(client.memory("old", SPEC), "d", 1)
        shard[0].stop()
        client.delete("old")
        put(client.memory("new", SPEC), "d", 2)
        shard[0].start()
        keeper.heal()
        shard[1].stop()
        assert [one.name for one in client.memories()] == ["new"]


def test_healing_does_not_bring_back_a_memory_that_is_being_deleted(pairs: list[Service]) -> None:
    addresses = [one.address for one in pairs[:2]]

    class Deleting(Lines):
        """The memory goes from the second service only once that was asked for it."""

        def place(self, authority: str) -> RemotePlace:
            real = super().place(authority)

            class Place:
                def run(self, verb: Verb[Any], timeout_s: float) -> Any:
                    answer = real.run(verb, timeout_s)
                    if isinstance(verb, ListMemories) and authority == addresses[1] and answer.items:
                        real.run(DeleteMemory("m"), 5.0)
                    return answer

            return cast(RemotePlace, Place())

    with opened(pairs[:2]) as memory, closing(Deleting(Reach("test", None, None).address)) as lines:
        put(memory, "d", 1)
        lines.place(addresses[0]).run(DeleteMemory("m"), 5.0)
        places = {address: lines.place(address) for address in addresses}
        shards = ShardMap(1, (Shard("s0", tuple(addresses)),))
        heal_shard(shards, shards.shards[0], places, addresses, Healed(), lambda done, whole: None)
        assert [list(memories_at(place)) for place in places.values()] == [[], []]


def test_a_missed_write_is_told_to_the_replica_that_missed_it() -> None:
    with Store.open(None) as store:
        me = Identity("default", Role.ADMIN)
        shards = ShardMap(1, (Shard("s0", ("a", "b")),))
        store.run(me, SetShardMap(shards, "s0"))
        now = stamp_at(time.time())
        store.run(me, MarkBehind(now))
        with pytest.raises(Unavailable):
            store.check_epoch(1, True)
        store.run(me, SetShardMap(shards, "s0", False, now - 1))  # Compared before that write.
        with pytest.raises(Unavailable):
            store.check_epoch(1, True)
        store.run(me, SetShardMap(shards, "s0", False, now + 1))
        store.check_epoch(1, True)
        store.run(me, MarkBehind(now))  # Told late: it is there by now.
        store.check_epoch(1, True)


def test_who_may_lack_writes_cannot_say_that_there_is_nothing(pairs: list[Service]) -> None:
    shard = pairs[:2]
    with opened(shard) as memory, caretaker(shard) as keeper:
        shard[0].stop()
        put(memory, "d", 1)
        shard[0].start()
        shard[1].stop()
        with pytest.raises(Unavailable):
            memory.connection.run(DeleteDocument("m", "d"), 1.0)
        shard[1].start()
        keeper.heal()
        assert memory.info().documents == 0  # What was asked in vain is done in the end: nobody knew that it was not.


# --- Quorum and order ------------------------------------------------------------------------------------------------


def test_a_larger_quorum_refuses_what_one_replica_alone_would_have(pairs: list[Service]) -> None:
    shard = pairs[:2]
    with opened(shard, "replicas=2&write_quorum=2") as memory:
        put(memory, "d", 1)
        shard[1].stop()
        with pytest.raises(Unavailable):
            memory.connection.run(PutDocument("m", Document("e", *drawn(1, 3)), SPEC.fingerprint), 1.0)
        assert memory.get("d").tokens == 3


def test_a_stamped_write_never_undoes_a_newer_one(tmp_path: Path) -> None:
    me = Identity("default", Role.ADMIN)

    def write(name: str, seed: int, generation: int) -> Verb[Any]:
        document = Document(name, *drawn(seed, 3))
        return PutDocument("m", document, SPEC.fingerprint, Conflict.REPLACE, "", generation)

    for directory in (None, tmp_path):
        with Store.open(directory) as store:
            store.run(me, CreateMemory("m", SPEC))
            store.run(me, write("d", 1, 20))
            for stale in (write("d", 2, 10), write("d", 2, 20), DeleteDocument("m", "d", "", 10)):
                with pytest.raises(Superseded) as raised:
                    store.run(me, stale)
                assert raised.value.metadata["generation"] == "20"
            store.run(me, DeleteDocument("m", "d", "", 30))
            with pytest.raises(NotFound):
                store.run(me, DeleteDocument("m", "never", "", 40))
            assert [(one.id, one.generation) for one in store.run(me, ListDeleted("m")).items] == [
                ("d", 30),
                ("never", 40),
            ]
    with Store.open(tmp_path) as store:  # What is buried stays buried.
        for name, generation in (("d", 30), ("never", 40)):
            with pytest.raises(Superseded):
                store.run(me, write(name, 3, generation))
            assert store.run(me, write(name, 3, generation + 1)).generation == generation + 1
        store.run(me, PutDocument("m", Document("plain", *drawn(1, 2)), SPEC.fingerprint))
        assert store.run(me, GetDocument("m", "plain")).generation == 42


class Meanwhile(Lines):
    """Connections to services, where something happens right after one of them was asked for a document."""

    def __init__(self, service: str, happens: Callable[[RemotePlace], None]):
        super().__init__(Reach("test", None, None).address)
        self._service = service
        self._happens = happens

    def place(self, authority: str) -> RemotePlace:
        real, happens = super().place(authority), self._happens
        if authority != self._service:
            return real

        class Place:
            def run(self, verb: Verb[Any], timeout_s: float, epoch: int = 0) -> Any:
                try:
                    return real.run(verb, timeout_s, epoch)
                finally:
                    if isinstance(verb, GetDocument):
                        happens(real)

        return cast(RemotePlace, Place())


def test_a_new_document_follows_its_order_in_every_replica(pairs: list[Service]) -> None:
    addresses = [one.address for one in pairs[:2]]
    old = Document("d", *drawn(1, 3))

    def happens(real: RemotePlace) -> None:
        """Of a replacement that is on its way this replica hears first."""
        real.run(PutDocument("m", old, SPEC.fingerprint, Conflict.REPLACE, "", stamp_at(time.time() - 60.0)), 5.0)

    with opened(pairs[:2]), closing(Meanwhile(addresses[1], happens)) as lines:
        place = ClusterPlace(Seeds("test", addresses, 2, lines.place), lines, ClusterOptions())
        try:
            put = PutDocument("m", Document("d", *drawn(2, 5)), SPEC.fingerprint)
            info = place.run(put, 10.0)
        finally:
            place.close()
        plain = Lines(Reach("test", None, None).address)
        with closing(plain):
            for address in addresses:
                assert plain.place(address).run(GetDocument("m", "d"), 5.0).generation == info.generation


def test_stamps_grow_whatever_the_clock_does() -> None:
    stamps = Stamps()
    seen = [stamps.next() for _ in range(100)]
    stamps.see(seen[-1] + 10**12)
    seen.append(stamps.next())
    assert seen == sorted(set(seen))
    assert abs(seen[0] - stamp_at(time.time())) < stamp_at(5.0)


# --- Missing shards --------------------------------------------------------------------------------------------------


def test_a_missing_shard_fails_by_name_or_is_left_out_to_the_token(tmp_path: Path) -> None:
    with restartable(tmp_path, 2) as found:
        names = [f"d{number}" for number in range(8)]
        with opened(found, "replicas=1") as memory, opened(found, "replicas=1", on_missing="degrade") as lenient:
            for number, name in enumerate(names):
                put(memory, name, number, metadata={"even": number % 2 == 0})
            lenient.info()
            tokens = {one.id: one.tokens for one in memory.documents()}
            lost = ShardMap(1, (Shard("s0", ("a",)), Shard("s1", ("b",))))
            there = [name for name in names if lost.owner("m", name).id == "s0"]
            assert 0 < len(there) < len(names)
            found[1].stop()
            with pytest.raises(Unavailable, match="s1"):
                memory.connection.run(GetDocument("m", next(n for n in names if n not in there)), 1.0)
            whole = lenient.attend(LAYER, queries(), top_k=3, tokens=True)
            assert whole.coverage == Coverage(
                sum(tokens[name] for name in there), sum(tokens.values()), missing=("s1",)
            )
            kept = lenient.attend(LAYER, queries(), scope=there)
            assert torch.allclose(lenient.attend(LAYER, queries()).output, kept.output, atol=1e-6)
            assert kept.coverage == Coverage(kept.coverage.searched, kept.coverage.searched)
            even = [name for number, name in enumerate(names) if number % 2 == 0]
            some = lenient.attend(LAYER, queries(), where="even = true").coverage
            assert some == Coverage(
                sum(tokens[n] for n in even if n in there), sum(tokens[n] for n in even), missing=("s1",)
            )
            named = lenient.attend(LAYER, queries(), scope=names[:5]).coverage
            assert named.in_scope == sum(tokens[name] for name in names[:5])
            where = target([one.address for one in found], "on_missing=degrade")
            with Memory.open(where, "m") as late, pytest.raises(Unavailable, match="never learnt"):
                late.attend(LAYER, queries())


# --- Who may, and whose --------------------------------------------------------------------------------------------


def test_tokens_go_to_every_shard_and_tenants_do_not_meet(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    admin = file.create("a", "ours", Role.ADMIN)
    reader = file.create("r", "ours", Role.READ)
    foreign = file.create("f", "theirs", Role.ADMIN)
    with services(2, tokens=file.path) as addresses:
        where = target(addresses)
        with pytest.raises(FotError, match="token"):
            Memory.open(where, "m", SPEC)
        # Who may not tell the processes a map reads by the list of addresses.
        with pytest.raises(NotFound):
            Memory.open(where, "m", token=reader)
        with Memory.open(where, "m", SPEC, token=admin) as memory:
            for number in range(4):
                put(memory, f"d{number}", number)
            with Memory.open(where, "m", token=reader) as mine:
                as_one({f"d{number}": number for number in range(4)}, mine)
                with pytest.raises(PermissionDenied):
                    put(mine, "mine", 1)
            with pytest.raises(NotFound):
                Memory.open(where, "m", token=foreign)
            with Memory.open(where, "m", SPEC, token=foreign) as theirs:
                assert theirs.info().documents == 0
                put(theirs, "d0", 9)
            assert memory.get("d0").tokens == 2


def test_a_token_is_not_sent_in_clear_to_other_machines() -> None:
    with pytest.raises(InvalidArgument, match="unencrypted"):
        Memory.open("grpc://127.0.0.1:1,10.0.0.1:2", "m", SPEC, token="fot_secret")


# --- Hedging and health, without services ----------------------------------------------------------------------------


class Here:
    """A directory of one shard."""

    target = "here"

    def find(self, above: int) -> ShardMap:
        return ShardMap(1, (Shard("s0", ("a", "b")),))


class Scripted:
    """A process that does as a function says."""

    def __init__(self, answer: Callable[[Verb[Any]], Any]):
        self.answer = answer
        self.calls = 0

    def run(self, verb: Verb[Any], timeout_s: float, epoch: int = 0) -> Any:
        self.calls += 1
        return self.answer(verb)


class Script(Lines):
    def __init__(self, **answers: Callable[[Verb[Any]], Any]):
        super().__init__(lambda authority: pytest.fail(authority))
        self.processes = {name: Scripted(answer) for name, answer in answers.items()}

    def place(self, authority: str) -> RemotePlace:
        return cast(RemotePlace, self.processes[authority])


def ask(script: Script, verb: Verb[Any] | None = None, **options: Any) -> Any:
    place = ClusterPlace(cast(Directory, Here()), script, ClusterOptions(patience_s=0.3, **options))
    place.router.health._turn = 0
    try:
        return place.run(verb or GetDocument("m", "d"), 5.0)
    finally:
        place.close()


def fail(verb: Verb[Any]) -> str:
    raise Unavailable("gone")


def test_a_slow_replica_is_hedged() -> None:
    release = threading.Event()

    def slow(verb: Verb[Any]) -> str:
        release.wait(10.0)
        return "late"

    try:
        assert ask(Script(a=slow, b=lambda _: "soon"), hedge_s=0.02) == "soon"
    finally:
        release.set()
    quick = Script(a=lambda _: "soon", b=lambda _: "never asked")
    assert ask(quick, hedge_s=5.0) == "soon"
    assert quick.processes["b"].calls == 0
    assert ask(Script(a=fail, b=lambda _: "other"), hedge_s=5.0) == "other"


def test_the_next_replica_answers_in_the_same_call() -> None:
    assert ask(Script(a=fail, b=lambda _: "other")) == "other"
    with pytest.raises(Unavailable, match="s0") as raised:
        ask(Script(a=fail, b=fail))
    assert raised.value.metadata["shards"] == "s0"


def test_a_write_that_meets_a_new_map_stays_the_same_write() -> None:
    seen: list[tuple[str, int, str]] = []
    stale = [True]

    def answer(name: str) -> Callable[[Verb[Any]], DocumentInfo]:
        def put(verb: Verb[Any]) -> DocumentInfo:
            assert isinstance(verb, PutDocument)
            if name == "b" and stale:
                stale.clear()
                raise StaleMap("new", epoch="2")
            seen.append((name, verb.generation, verb.request_id))
            return DocumentInfo("d", 3, {}, verb.generation, 0.0)

        return put

    script = Script(a=answer("a"), b=answer("b"))
    put = PutDocument("m", Document("d", *drawn(1, 3)), SPEC.fingerprint, Conflict.REPLACE, "once")
    told = ask(script, put)
    assert {name for name, _, _ in seen} == {"a", "b"}
    assert {(generation, request) for _, generation, request in seen} == {(told.generation, "once")}


def test_a_map_that_is_always_old_is_an_error_in_the_end() -> None:
    def stale(verb: Verb[Any]) -> str:
        raise StaleMap("old", epoch="9")

    with pytest.raises(StaleMap):
        ask(Script(a=stale, b=stale))


def test_who_failed_is_asked_last_until_one_call_may_try() -> None:
    now = 0.0
    health = Health(lambda: now)
    health._turn = 0
    health.failed("a")
    assert health.order(["a", "b"]) == ["b", "a"]
    now = 1.0
    assert health.order(["a", "b"]) == ["a", "b"]
    assert health.order(["a", "b"]) == ["b", "a"]
    health.up("a")
    assert health.order(["a", "b"]) == ["a", "b"]
    health.owe("a", 5)
    assert health.order(["a", "b"]) == ["b", "a"]
    health.paid("a", 5)
    assert health.owed("a") == 0
