"""What is asked of memories that change, and what a wrong question is told."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from memory_service import verbs
from memory_service.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
)
from memory_service.store.store import Store
from memory_service.store.warm_tokens import WarmTokens
from memory_service.types.callers import Cancel
from memory_service.types.conditions import Compare, Condition
from memory_service.types.operations import OperationKind
from memory_service.types.questions import AttendGroup, AttendOptions, Engine
from memory_service.types.scopes import Scope
from tests.memory_service.oracle import (
    ME,
    attend,
    document,
    error,
    everything_in_small_pieces,
    finish,
    put,
    reference,
    refused,
    warm,
)
from tests.memory_service.store.given import QUERIES, SPEC, A, B


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            verbs.Attend("m", 4, (AttendGroup(Scope(), QUERIES),)),
            r"layer 4 is not kept by this memory; it keeps \[3, 7",
        ),
        (verbs.Attend("m", 3, ()), "groups"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES[0]),)), "queries must be"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES[:3]),)), "multiple of 2"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES[..., :8]),)), "queries must be"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES[:, :0]),)), "queries must be"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES / 0),)), "NaN or infinity"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES.long()),)), "floating point"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), torch.zeros(1).expand(2, 40_000, 16)),)), "split the call"),
        *(
            (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES),), options), says)
            for options, says in (
                (AttendOptions(top_k=-1), "top_k"),
                (AttendOptions(top_k=4097), "top_k"),
                (AttendOptions(scale=0.0), "scale"),
                (AttendOptions(scale=float("nan")), "scale"),
                (AttendOptions(scale=float("inf")), "scale"),
                (AttendOptions(logit_gap=1.0), "logit_gap"),
                (AttendOptions(top_k=1, logit_gap=-1.0), "logit_gap"),
                (AttendOptions(top_k=1, logit_gap=float("nan")), "logit_gap"),
                (AttendOptions(tokens=True), "tokens"),
                (AttendOptions(engine=Engine.INDEX), "INDEX"),
            )
        ),
        (verbs.Search("m", 3, (AttendGroup(Scope(), QUERIES),), AttendOptions()), "top_k"),
        (verbs.Fetch("m", "a", 4), "layer 4"),
        (verbs.Fetch("m", "a", 3, -1), "first_token"),
        (verbs.Fetch("m", "a", 3, 0, 0), "tokens"),
        (verbs.Fetch("m", "a", 3, 5), "5 tokens"),
    ],
)
def test_a_wrong_question_is_refused_with_a_sentence(store: Store, wrong: verbs.Verb[Any], says: str) -> None:
    put(store, "m", A)
    with pytest.raises(InvalidArgument, match=says):
        store.run(ME, wrong)


def test_the_index_cannot_answer_before_it_is_built(store: Store) -> None:
    put(store, "m", A)
    options = AttendOptions(top_k=1, engine=Engine.INDEX)
    found = refused(store, verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES),), options))
    assert isinstance(found, FailedPrecondition)
    assert "start the operation INDEX" in found.message


def test_a_filter_narrows_the_documents_named(store: Store) -> None:
    put(store, "m", A)
    put(store, "m", B)
    where = Condition("n", Compare.GT, (1,))
    for scope in (Scope(where=where), Scope(("a", "b"), where), Scope(("b", "b"))):
        answer = attend(store, "m", 7, QUERIES, scope)
        assert error(answer, reference(QUERIES, B.keys[1], B.values[1])) <= 1e-5
    assert attend(store, "m", 7, QUERIES, Scope(("a",), where)).coverage.in_scope == 0


def test_half_precision_queries_are_widened(store: Store) -> None:
    put(store, "m", A)
    half = QUERIES.bfloat16()
    assert error(attend(store, "m", 3, half), reference(half.float(), A.keys[0], A.values[0])) <= 1e-5


def test_a_cancelled_call_stops(store: Store) -> None:
    put(store, "m", A)
    cancel = Cancel()
    cancel.cancel()
    verb = verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES),))
    with pytest.raises(Cancelled):
        store.run(ME, verb, cancel)
    with pytest.raises(DeadlineExceeded):
        store.run(ME, verb, Cancel(timeout_s=-1.0))


@pytest.mark.parametrize("top_k", [0, 8])
def test_work_under_way_stops_soon_after_it_is_cancelled(store: Store, top_k: int) -> None:
    put(store, "m", document("big", 40_000, SPEC, 1))
    queries = torch.randn(2, 4096, 16)
    cancel = Cancel()
    timer = threading.Timer(0.1, cancel.cancel)
    start = time.monotonic()
    timer.start()
    with pytest.raises(Cancelled):
        for _ in range(100):
            store.run(ME, verbs.Attend("m", 3, (AttendGroup(Scope(), queries),), AttendOptions(top_k)), cancel)
    assert time.monotonic() - start < 5
    timer.join()


def test_readers_go_on_while_documents_come_and_go(store: Store) -> None:
    put(store, "m", A)
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                answer = attend(store, "m", 3, QUERIES, Scope(("a",)), top_k=3)
                assert error(answer, reference(QUERIES, A.keys[0], A.values[0], top_k=3)) <= 1e-5
        except BaseException as problem:
            failures.append(problem)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(15):
        put(store, "m", document(f"x{number}", 40, SPEC, number))
        warm(store, "m")
        if number > 2:
            store.run(ME, verbs.DeleteDocument("m", f"x{number - 3}"))
        if number % 5 == 0:
            finish(store, "m", OperationKind.COMPACT)
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []


def test_a_query_during_the_tidying_of_ram_sees_every_token(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with everything_in_small_pieces(SPEC.bytes_per_token):
        store.run(ME, verbs.CreateMemory("t", SPEC))
        for number in range(5):
            put(store, "t", document(str(number), 18, SPEC, number))
        warm(store, "t")
        for number in (0, 1, 4):
            store.run(ME, verbs.DeleteDocument("t", str(number)))
        kept = [document(str(number), 18, SPEC, number) for number in (2, 3)]
        expected = reference(
            QUERIES, torch.cat([d.keys[0] for d in kept], 1), torch.cat([d.values[0] for d in kept], 1)
        )
        move, seen = WarmTokens.move, []

        def watched(self: WarmTokens, *where: Any) -> Any:
            seen.append(error(attend(store, "t", 3, QUERIES), expected))
            moved = move(self, *where)
            seen.append(error(attend(store, "t", 3, QUERIES, Scope(("2", "3"))), expected))
            return moved

        monkeypatch.setattr(WarmTokens, "move", watched)
        finish(store, "t", OperationKind.COMPACT)
        assert len(seen) >= 2
        assert max(seen) <= 1e-5
        assert error(attend(store, "t", 3, QUERIES), expected) <= 1e-5
        assert store.run(ME, verbs.GetStats("t")).resident_tokens == 36
