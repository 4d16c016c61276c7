"""What every verb of sessions does."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_service import verbs
from memory_service.errors import (
    InvalidArgument,
    QuotaExceeded,
    ResourceExhausted,
    SessionExpired,
)
from memory_service.store.store import Store
from memory_service.types.questions import AttendGroup
from memory_service.types.scopes import Scope, SessionScope
from memory_service.types.sessions import SessionAppend
from tests.memory_service.oracle import (
    ME,
    MODEL,
    append,
    attend,
    error,
    put,
    reference,
    refused,
    tensors,
)
from tests.memory_service.store.given import OPTIONS, QUERIES, SPEC, A, zeros


def test_a_session_is_visible_at_once_and_only_where_it_is_named(store: Store) -> None:
    put(store, "m", A)
    session = store.run(ME, verbs.OpenSession("m", MODEL))
    assert (session.memory, session.tokens) == ("m", (0, 0))
    keys, values = tensors(SPEC, 9, "s")
    append(store, "m", session.id, SPEC, keys, values, 0)
    alone = attend(store, "m", 3, QUERIES, Scope.session(session.id))
    assert error(alone, reference(QUERIES, keys[0], values[0])) <= 1e-5
    both = attend(store, "m", 3, QUERIES, Scope(sessions=(SessionScope(session.id),)))
    together = [torch.cat(pair, dim=1) for pair in ((A.keys[0], keys[0]), (A.values[0], values[0]))]
    assert error(both, reference(QUERIES, *together)) <= 1e-5
    assert error(attend(store, "m", 3, QUERIES), reference(QUERIES, A.keys[0], A.values[0])) <= 1e-5


@pytest.mark.parametrize("until", [0, 1, 5, 9, 100])
def test_until_hides_what_comes_at_or_after_it(store: Store, until: int) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    keys, values = tensors(SPEC, 9, "s")
    append(store, "m", session, SPEC, keys, values, 0)
    answer = attend(store, "m", 3, QUERIES, Scope((), None, (SessionScope(session, until),)), top_k=4)
    assert error(answer, reference(QUERIES, keys[0, :, :until], values[0, :, :until], top_k=4)) <= 1e-5
    assert answer.coverage.in_scope == min(until, 9)


def test_layers_of_a_session_grow_apart(store: Store) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    keys, values = tensors(SPEC, 9, "s")
    ids = torch.arange(9)
    first = SessionAppend(session, (7,), 0, keys[1:, :, :6], values[1:, :, :6], ids[:6])
    (info,) = store.run(ME, verbs.AppendSessions("m", (first,)))
    assert info.tokens == (0, 6)
    both = SessionAppend(session, (3, 7), 6, keys[:, :, 6:], values[:, :, 6:])
    assert isinstance(refused(store, verbs.AppendSessions("m", (both,))), InvalidArgument)
    later = SessionAppend(session, (3,), 0, keys[:1, :, :6], values[:1, :, :6])
    (info,) = store.run(ME, verbs.AppendSessions("m", (later,)))
    (info,) = store.run(ME, verbs.AppendSessions("m", (both,)))
    assert info.tokens == (9, 9)
    got = store.run(ME, verbs.Fetch("m", f"session:{session}", 7, 2, 5))
    assert torch.equal(got.keys, keys[1, :, 2:7])
    assert got.token_ids.tolist() == [2, 3, 4, 5, 0]  # The layer without ids left those of the other alone.


def test_a_repeated_append_is_harmless_and_a_gap_is_refused(store: Store) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    keys, values = tensors(SPEC, 4, "s")
    for _ in range(2):
        append(store, "m", session, SPEC, keys, values, 0)
    for wrong in (5, 2):
        found = refused(store, verbs.AppendSessions("m", (SessionAppend(session, (3, 7), wrong, keys, values),)))
        assert isinstance(found, InvalidArgument)
        assert "append at 4" in found.message
    assert store.run(ME, verbs.RenewSession("m", session)).tokens == (4, 4)


def _append(**changed: Any) -> SessionAppend:
    return replace(SessionAppend("?", (3, 7), 0, zeros(2, 2, 4, 16), zeros(2, 2, 4, 16)), **changed)


@pytest.mark.parametrize(
    "wrong",
    [
        _append(layers=()),
        _append(layers=(3,)),
        _append(layers=(3, 3)),
        _append(layers=(3, 4)),
        _append(first_token=-4),
        _append(keys=zeros(2, 2, 4, 15)),
        _append(values=zeros(2, 2, 3, 16)),
        _append(keys=zeros(2, 2, 4)),
        _append(keys=zeros(2, 2, 0, 16), values=zeros(2, 2, 0, 16)),
        _append(keys=zeros(2, 2, 4, 16, dtype=torch.bfloat16)),
        _append(values=zeros(2, 2, 4, 16) + torch.nan),
        _append(token_ids=torch.zeros(3, dtype=torch.int64)),
        _append(token_ids=torch.zeros(4)),
        _append(token_ids=torch.full((4,), -1)),
    ],
)
def test_a_wrong_append_is_refused_and_nothing_stays(store: Store, wrong: SessionAppend) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    found = refused(store, verbs.AppendSessions("m", (replace(wrong, session=session),)))
    assert isinstance(found, InvalidArgument)
    assert store.run(ME, verbs.RenewSession("m", session)).tokens == (0, 0)


def test_several_sessions_are_appended_to_in_one_call(store: Store) -> None:
    sessions = [store.run(ME, verbs.OpenSession("m", MODEL)).id for _ in range(3)]
    appends = tuple(SessionAppend(one, (3, 7), 0, *tensors(SPEC, 2 + n, n)) for n, one in enumerate(sessions))
    infos = store.run(ME, verbs.AppendSessions("m", appends))
    assert [one.id for one in infos] == sessions
    assert [one.tokens for one in infos] == [(2, 2), (3, 3), (4, 4)]


def test_a_closed_session_is_gone_and_its_bytes_are_free(store: Store) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    append(store, "m", session, SPEC, *tensors(SPEC, 9, "s"), 0)
    stats = store.run(ME, verbs.GetStats("m"))
    assert (stats.sessions, stats.session_bytes) == (1, 9 * SPEC.bytes_per_token)
    for _ in range(2):
        store.run(ME, verbs.CloseSession("m", session))
    stats = store.run(ME, verbs.GetStats("m"))
    assert (stats.sessions, stats.session_bytes) == (0, 0)
    found = refused(store, verbs.Attend("m", 3, (AttendGroup(Scope.session(session), QUERIES),)))
    assert isinstance(found, SessionExpired)
    assert "append the prompt again" in found.message


def test_a_lease_runs_out_unless_it_is_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now)
    session = store.run(ME, verbs.OpenSession("m", MODEL, 10.0))
    assert session.expires_at == now + 10
    for elapsed in (9, 18, 27):
        monkeypatch.setattr("time.time", lambda elapsed=elapsed: now + elapsed)
        attend(store, "m", 3, QUERIES, Scope.session(session.id))
    monkeypatch.setattr("time.time", lambda: now + 38)
    assert isinstance(refused(store, verbs.RenewSession("m", session.id)), SessionExpired)
    assert store.run(ME, verbs.GetStats("m")).sessions == 0


@pytest.mark.parametrize("lease", [0.0, 0.5, -1.0, 1e9, float("nan"), float("inf")])
def test_a_lease_must_be_sensible(store: Store, lease: float) -> None:
    assert isinstance(refused(store, verbs.OpenSession("m", MODEL, lease)), InvalidArgument)


def test_a_tenant_opens_no_more_sessions_than_its_limit(place: Path | None) -> None:
    with Store.open(place, replace(OPTIONS, tenant_sessions=2)) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        first, _ = (store.run(ME, verbs.OpenSession("m", MODEL)) for _ in range(2))
        assert isinstance(refused(store, verbs.OpenSession("m", MODEL)), QuotaExceeded)
        store.run(ME, verbs.CloseSession("m", first.id))
        store.run(ME, verbs.OpenSession("m", MODEL))


def test_all_sessions_together_hold_no_more_than_the_limit(place: Path | None) -> None:
    with Store.open(place, replace(OPTIONS, session_bytes=10 * SPEC.bytes_per_token)) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        one, two = (store.run(ME, verbs.OpenSession("m", MODEL)).id for _ in range(2))
        append(store, "m", one, SPEC, *tensors(SPEC, 9, "s"), 0)
        over = verbs.AppendSessions("m", (SessionAppend(two, (3, 7), 0, *tensors(SPEC, 2, "s")),))
        found = refused(store, over)
        assert isinstance(found, ResourceExhausted)
        assert found.retry_after_s
        store.run(ME, verbs.CloseSession("m", one))
        store.run(ME, over)


def test_sessions_do_not_outlive_their_memory(store: Store) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    store.run(ME, verbs.DeleteMemory("m"))
    store.run(ME, verbs.CreateMemory("m", SPEC))
    assert isinstance(refused(store, verbs.RenewSession("m", session)), SessionExpired)


def test_readers_see_whole_appends_while_a_session_grows(store: Store) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    keys, values = tensors(SPEC, 3000, "s")
    stop = threading.Event()

    def grow() -> None:
        for first in range(0, 3000, 50):
            append(store, "m", session, SPEC, keys[:, :, first : first + 50], values[:, :, first : first + 50], first)
        stop.set()

    writer = threading.Thread(target=grow)
    writer.start()
    seen = set()
    while not stop.is_set() or 3000 not in seen:
        answer = attend(store, "m", 3, QUERIES, Scope.session(session), top_k=4)
        count = answer.coverage.searched
        seen.add(count)
        assert count % 50 == 0
        assert error(answer, reference(QUERIES, keys[0, :, :count], values[0, :, :count], top_k=4)) <= 1e-5
    writer.join()
