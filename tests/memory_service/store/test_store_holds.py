"""Writers that a snapshot holds: how long they wait, and what ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from memory_service import verbs
from memory_service.errors import FailedPrecondition, FotError, InvalidArgument, NotFound, ResourceExhausted
from memory_service.store.store import Store
from memory_service.types.operations import Operation, OperationKind, OperationState
from tests.memory_service.oracle import ME, MODEL, attend, put, refused
from tests.memory_service.store.given import OTHER, QUERIES, SPEC, A, B, begin, chunks, ids

PATIENCE_S = 20.0


def hold(store: Store, seconds: float = 30.0, snapshot: str = "one") -> Operation:
    return store.run(ME, verbs.CreateSnapshot("m", snapshot, seconds))


def ended(store: Store, operation: Operation) -> Operation:
    until = time.monotonic() + PATIENCE_S
    while (told := store.run(ME, verbs.GetOperation(operation.id))).state is OperationState.RUNNING:
        assert time.monotonic() < until
        time.sleep(0.01)
    return told


def documents_of(store: Store, snapshot: str = "one") -> int:
    return store.run(ME, verbs.GetSnapshot(snapshot)).documents


@contextmanager
def waiting(work: Callable[[], object]) -> Iterator[threading.Thread]:
    """Work that does not come to its end until something else happens, and then does."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except FotError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive(), "nothing held it"
    yield thread
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it was not let go"
    assert failures == []


def test_writers_wait_until_they_are_let_go_and_readers_do_not(disk: Store) -> None:
    put(disk, "m", A)
    begun = hold(disk)
    assert begun.state is OperationState.RUNNING
    assert time.time() < begun.held_until <= time.time() + 30
    with waiting(lambda: put(disk, "m", B)):
        attend(disk, "m", 3, QUERIES)
        assert ids(disk) == ["a"]
        assert isinstance(refused(disk, verbs.GetSnapshot("one")), NotFound)
        disk.run(ME, verbs.ReleaseHold(begun.id))
    assert ended(disk, begun).state is OperationState.DONE
    assert (ids(disk), documents_of(disk)) == (["a", "b"], 1)
    disk.run(ME, verbs.ReleaseHold(begun.id))  # Once more does no harm: the first answer may be lost.


def test_writers_of_other_memories_do_not_wait(disk: Store) -> None:
    disk.run(ME, verbs.CreateMemory("other", SPEC))
    disk.run(OTHER, verbs.CreateMemory("m", SPEC))
    begun = hold(disk)
    with waiting(lambda: put(disk, "m", B)):
        put(disk, "other", A)
        disk.run(OTHER, verbs.PutDocument("m", A, MODEL))
        disk.run(ME, verbs.DeleteDocument("other", "a"))
        disk.run(ME, verbs.ReleaseHold(begun.id))


def test_who_waits_long_is_sent_away_and_loses_nothing(disk: Store) -> None:
    put(disk, "m", A)
    begun = hold(disk)
    for write in (lambda: put(disk, "m", B), lambda: disk.run(ME, verbs.DeleteDocument("m", "a"))):
        with pytest.raises(ResourceExhausted, match="in a moment") as raised:
            write()
        assert raised.value.code == "HELD"
        assert raised.value.retry_after_s
    upload = disk.run(ME, begin(B)).id
    for chunk in chunks(B):
        disk.write_chunk(ME, "m", upload, chunk)
    with pytest.raises(ResourceExhausted):
        disk.run(ME, verbs.CommitUpload("m", upload))
    disk.run(ME, verbs.ReleaseHold(begun.id))
    assert disk.run(ME, verbs.CommitUpload("m", upload)).id == "b"
    assert ended(disk, begun).state is OperationState.DONE
    assert documents_of(disk) == 1


def test_of_two_holds_the_last_counts(disk: Store) -> None:
    one, two = hold(disk), hold(disk, snapshot="two")
    with waiting(lambda: put(disk, "m", A)):
        disk.run(ME, verbs.ReleaseHold(one.id))
        time.sleep(0.2)
        assert ids(disk) == []
        disk.run(ME, verbs.ReleaseHold(two.id))
    assert [ended(disk, each).state for each in (one, two)] == [OperationState.DONE] * 2


def test_deletes_wait_too(disk: Store) -> None:
    put(disk, "m", A)
    begun = hold(disk)
    with waiting(lambda: disk.run(ME, verbs.DeleteDocument("m", "a"))):
        disk.run(ME, verbs.ReleaseHold(begun.id))
    assert ended(disk, begun).state is OperationState.DONE
    assert documents_of(disk) == 1


def test_the_same_call_again_is_the_same_hold(disk: Store) -> None:
    begun = hold(disk)
    again = hold(disk)
    assert (again.id, again.held_until) == (begun.id, begun.held_until)
    disk.run(ME, verbs.ReleaseHold(begun.id))
    done = ended(disk, begun)
    assert done.state is OperationState.DONE
    assert hold(disk) == done, "what is done holds nobody"


def test_nobody_who_comes_back_in_time_is_no_snapshot(disk: Store) -> None:
    put(disk, "m", A)
    begun = hold(disk, 0.6)
    with waiting(lambda: put(disk, "m", B)):
        pass
    told = ended(disk, begun)
    assert told.state is OperationState.FAILED
    assert "in time" in told.message
    assert isinstance(refused(disk, verbs.GetSnapshot("one")), NotFound)
    late = refused(disk, verbs.ReleaseHold(begun.id))
    assert isinstance(late, FailedPrecondition)
    assert late.code == "HOLD_ENDED"
    again = hold(disk)
    disk.run(ME, verbs.ReleaseHold(again.id))
    assert ended(disk, again).state is OperationState.DONE
    assert documents_of(disk) == 2


def test_a_cancel_ends_the_hold(disk: Store) -> None:
    begun = hold(disk)
    with waiting(lambda: put(disk, "m", A)):
        disk.run(ME, verbs.CancelOperation(begun.id))
    assert ended(disk, begun).state is OperationState.CANCELLED
    assert isinstance(refused(disk, verbs.GetSnapshot("one")), NotFound)
    assert refused(disk, verbs.ReleaseHold(begun.id)).code == "HOLD_ENDED"


def test_the_deletion_of_the_memory_ends_the_hold(disk: Store) -> None:
    begun = hold(disk)
    began = time.monotonic()
    disk.run(ME, verbs.DeleteMemory("m"))
    assert time.monotonic() - began < PATIENCE_S
    assert ended(disk, begun).state is OperationState.CANCELLED


def test_a_store_that_closes_lets_everybody_go(disk: Store) -> None:
    hold(disk)
    began = time.monotonic()
    disk.close()
    assert time.monotonic() - began < PATIENCE_S


@pytest.mark.parametrize("seconds", [-1.0, 30.5, float("nan"), float("inf")])
def test_a_hold_is_short(disk: Store, seconds: float) -> None:
    assert isinstance(refused(disk, verbs.CreateSnapshot("m", "one", seconds)), InvalidArgument)
    put(disk, "m", A)


def test_a_hold_of_nothing_holds_nothing(disk: Store) -> None:
    assert isinstance(refused(disk, verbs.CreateSnapshot("none", "one", 30.0)), NotFound)
    assert isinstance(refused(disk, verbs.CreateSnapshot("m", "../one", 30.0)), InvalidArgument)
    put(disk, "m", A)


def test_only_who_may_cancel_it_lets_go(disk: Store) -> None:
    begun = hold(disk)
    with pytest.raises(NotFound):
        disk.run(OTHER, verbs.ReleaseHold(begun.id))
    verify = disk.run(ME, verbs.StartOperation("m", OperationKind.VERIFY))
    assert refused(disk, verbs.ReleaseHold(verify.id)).code == "HOLD_ENDED"
    assert isinstance(refused(disk, verbs.ReleaseHold("nothing")), NotFound)
    disk.run(ME, verbs.ReleaseHold(begun.id))
    assert ended(disk, begun).state is OperationState.DONE
