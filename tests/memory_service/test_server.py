"""The service under hostile, impatient and numerous callers, and while it stops."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import stat
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from memory_service import verbs as v
from memory_service.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FotError,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from memory_service.server.server import READING, Server, check_exposure, is_local, running, serve
from memory_service.settings import ServerSettings, StoreOptions
from memory_service.store.store import Store
from memory_service.types.answers import Attended, Coverage, Fetched
from memory_service.types.callers import Cancel
from memory_service.types.documents import Document
from memory_service.types.listings import Page
from memory_service.types.memories import MemoryInfo
from memory_service.types.questions import AttendGroup, AttendOptions
from memory_service.types.scopes import Scope
from memory_service.types.uploads import Chunk
from memory_service.v1 import memory_pb2 as pb
from memory_service.wire.chunks import encode_chunk
from memory_service.wire.codec import RPCS, SERVICE
from tests.memory_service.calls import MODEL, SPEC, Caller, SpyStore, attend, calling, outcome, translated
from tests.ports import own_port

MIB = 1 << 20
NAN = torch.full((2, 1, 1, 4), float("nan"), dtype=torch.bfloat16)
ATTEND = RPCS[v.Attend].path
EMPTY = (Attended(torch.zeros(1, 1, 4), torch.zeros(1, 1), Coverage(0, 0), "dense"),)


def settings(**given: Any) -> ServerSettings:
    return ServerSettings(**{"listen": "127.0.0.1:0", "drain_grace_s": 1.0} | given)


@contextmanager
def spied(answer: Callable[[v.Verb[Any], Cancel], Any], estimate: int = 0, **given: Any) -> Iterator[Caller]:
    """A caller of a service whose store answers by a function."""
    with running(SpyStore(answer, estimate), settings(**given)) as address, calling(address) as caller:
        yield caller


@pytest.fixture(scope="module")
def caller() -> Iterator[Caller]:
    """A caller of a real service in RAM with a memory m that holds a document d of 100 tokens."""
    tensor = torch.randn(2, 1, 100, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    with (
        Store.open(None, StoreOptions(background=False)) as store,
        running(store, settings(stream_idle_s=0.5)) as address,
        calling(address) as one,
    ):
        one.ask(v.CreateMemory("m", SPEC))
        one.ask(v.PutDocument("m", Document("d", tensor, tensor), MODEL))
        yield one


# --- Hostile requests (T8) ------------------------------------------------------------------------------------------


def _attend(tensor: pb.Tensor | None = None, layer: int = 1, **options: Any) -> bytes:
    queries = tensor or pb.Tensor(dtype=pb.DATA_TYPE_F32, shape=[1, 1, 4], raw=bytes(16))
    message = pb.AttendRequest(memory="m", layer=layer, groups=[pb.AttendGroup(queries=queries)])
    message.options.CopyFrom(pb.AttendOptions(**options))
    return message.SerializeToString()


def _f32(shape: list[int], *values: float) -> pb.Tensor:
    return pb.Tensor(dtype=pb.DATA_TYPE_F32, shape=shape, raw=torch.tensor(values).numpy().tobytes())


HOSTILE = {
    "garbage": b"\xff" * 100,
    "cut short": _attend()[:-5],
    "a terabyte declared": _attend(_f32([1 << 20, 1 << 20, 1], 1.0)),
    "more than a number holds": _attend(_f32([2**62, 2**62, 2**62], 1.0)),
    "negative shape": _attend(_f32([-1, -1, 4], 1, 2, 3, 4)),
    "too few dimensions": _attend(_f32([1, 4], 1, 2, 3, 4)),
    "another head_dim": _attend(_f32([1, 1, 3], 1, 2, 3)),
    "heads that are no multiple": _attend(_f32([0, 1, 4])),
    "no queries": pb.AttendRequest(memory="m", layer=1, groups=[pb.AttendGroup()]).SerializeToString(),
    "no groups": pb.AttendRequest(memory="m", layer=1).SerializeToString(),
    "a million groups": pb.AttendRequest(memory="m", layer=1).SerializeToString() + b"\x1a\x00" * 1_000_000,
    "integers": _attend(pb.Tensor(dtype=pb.DATA_TYPE_I32, shape=[1, 1, 4], raw=bytes(16))),
    "nan": _attend(_f32([1, 1, 4], float("nan"), 0, 0, 0)),
    "infinity": _attend(_f32([1, 1, 4], 0, 0, 0, -float("inf"))),
    "top_k of 2^31": _attend(top_k=2**31),
    "top_k above the limit": _attend(top_k=4097),
    "a layer the memory lacks": _attend(layer=2),
    "layer 2^32-1": _attend(layer=2**32 - 1),
    "unknown engine": _attend(top_k=1, engine=77),
    "scale nan": _attend(scale=float("nan")),
    "scale 0": _attend(scale=0.0),
    "negative until": pb.AttendRequest(
        memory="m",
        layer=1,
        groups=[
            pb.AttendGroup(
                queries=_f32([1, 1, 4], 1, 2, 3, 4), scope=pb.Scope(sessions=[pb.SessionScope(id="s", until=-1)])
            )
        ],
    ).SerializeToString(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_attend_is_refused_and_costs_no_memory(caller: Caller, name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = {"negative until": {"INVALID_ARGUMENT", "NOT_FOUND"}}.get(name, {"INVALID_ARGUMENT"})
    assert outcome(lambda: caller.send(ATTEND, HOSTILE[name])) in expected
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 64 * 1024, "more than a few messages"


def test_a_message_above_the_limit_is_not_received(caller: Caller) -> None:
    with pytest.raises(ResourceExhausted) as raised:
        caller.send(ATTEND, bytes(9 * MIB))
    assert raised.value.retry_after_s is None


@pytest.mark.parametrize(
    "verb",
    [
        v.Fetch("m", "d", 1, first_token=-1),
        v.Fetch("m", "d", 1, tokens=0),
        v.Fetch("m", "d", 1, first_token=2**62, tokens=2**62),
        v.Fetch("m", "d", 1, first_token=100),
        v.Fetch("m", "d", 2),
        v.BeginUpload("m", "e", 2**62, MODEL),
        v.BeginUpload("m", "e", 0, MODEL),
        v.BeginUpload("m", "e", -1, MODEL),
        v.BeginUpload("m", "e" * 600, 1, MODEL),
        v.BeginUpload("m", "e", 1, MODEL, metadata={f"key{n}": n for n in range(65)}),
        v.BeginUpload("m", "e", 1, MODEL, metadata={"key": "x" * 20_000}),
        v.CreateMemory("../up", SPEC),
        v.ListDocuments("m", page_size=-1),
        v.OpenSession("m", MODEL, lease_s=-1.0),
        v.OpenSession("m", MODEL, lease_s=1e10),
        v.PutDocument("m", Document("e", torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4)), MODEL),
        v.PutDocument("m", Document("e", NAN, NAN), MODEL),
        v.PutDocument("m", Document("e", NAN[..., :3], NAN[..., :3]), MODEL),
    ],
    ids=lambda verb: type(verb).__name__,
)
def test_numbers_out_of_range_are_invalid_arguments(caller: Caller, verb: v.Verb[Any]) -> None:
    assert outcome(lambda: caller.ask(verb)) in {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}


def test_an_rpc_that_does_not_exist_is_unimplemented(caller: Caller) -> None:
    with pytest.raises(FailedPrecondition) as raised:
        caller.send(f"/{SERVICE}/Nothing", b"")
    assert raised.value.code == "UNIMPLEMENTED"


# --- Uploads --------------------------------------------------------------------------------------------------------


def _chunk(upload: str, data: bytes, offset: int = 0, part: int = 0, crc32: int | None = None) -> bytes:
    return encode_chunk("m", upload, Chunk(part, offset, zlib.crc32(data) if crc32 is None else crc32, data))


@pytest.fixture
def upload(caller: Caller) -> Iterator[str]:
    """An open upload of one token: 36 bytes in one chunk."""
    begun = caller.ask(v.BeginUpload("m", "e", 1, MODEL))
    yield begun.id
    caller.ask(v.AbortUpload("m", begun.id))


def test_chunks_make_a_document(caller: Caller, upload: str) -> None:
    data = torch.arange(16, dtype=torch.float32).bfloat16().view(torch.uint8).numpy().tobytes() + b"\7\0\0\0"
    answer = pb.UploadChunksResponse.FromString(caller.upload([_chunk(upload, data)] * 3))
    assert (answer.chunks, answer.bytes) == (3, 108)
    assert caller.ask(v.CommitUpload("m", upload)).tokens == 1
    fetched = caller.ask(v.Fetch("m", "e", 3))
    assert fetched.keys.flatten().tolist() == [4, 5, 6, 7]
    assert fetched.values.flatten().tolist() == [12, 13, 14, 15]
    assert fetched.token_ids.tolist() == [7]
    caller.ask(v.DeleteDocument("m", "e"))


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (lambda upload: _chunk(upload, bytes(36), crc32=1), "INVALID_ARGUMENT"),
        (lambda upload: _chunk(upload, bytes(35)), "INVALID_ARGUMENT"),
        (lambda upload: _chunk(upload, b""), "INVALID_ARGUMENT"),
        (lambda upload: _chunk(upload, bytes(36), offset=-1), "INVALID_ARGUMENT"),
        (lambda upload: _chunk(upload, bytes(36), offset=7), "INVALID_ARGUMENT"),
        (lambda upload: _chunk(upload, bytes(36), offset=1 << 50), "INVALID_ARGUMENT"),
        (lambda upload: _chunk(upload, bytes(36), part=9), "INVALID_ARGUMENT"),
        (lambda upload: _chunk(upload, bytes(2 * MIB)), "INVALID_ARGUMENT"),
        (lambda upload: _chunk("", bytes(36)), "INVALID_ARGUMENT"),
        (lambda upload: _chunk("nobody", bytes(36)), "NOT_FOUND"),
        (lambda upload: b"\xff" * 30, "INVALID_ARGUMENT"),
    ],
)
def test_a_bad_chunk_ends_the_stream_and_leaves_the_upload(
    caller: Caller, upload: str, message: Callable[[str], bytes], status: str
) -> None:
    assert outcome(lambda: caller.upload([message(upload)])) == status
    assert caller.ask(v.GetUpload("m", upload)).missing == ((0, 0, 1),)


def test_a_million_empty_chunks_are_refused_at_the_first(caller: Caller, upload: str) -> None:
    messages = iter([_chunk(upload, b"")] * 1_000_000)
    assert outcome(lambda: caller.upload(messages)) == "INVALID_ARGUMENT"
    assert len(list(messages)) > 900_000


def test_one_stream_carries_one_upload(caller: Caller, upload: str) -> None:
    other = caller.ask(v.BeginUpload("m", "f", 1, MODEL)).id
    messages = [_chunk(upload, bytes(36)), _chunk(other, bytes(36))]
    assert outcome(lambda: caller.upload(messages)) == "INVALID_ARGUMENT"
    assert caller.ask(v.GetUpload("m", other)).missing
    caller.ask(v.AbortUpload("m", other))


def test_a_stream_without_chunks_writes_nothing(caller: Caller) -> None:
    assert pb.UploadChunksResponse.FromString(caller.upload([])) == pb.UploadChunksResponse()


def test_an_uploader_that_falls_asleep_is_sent_home(caller: Caller, upload: str) -> None:
    asleep = threading.Event()

    def sleepy() -> Iterator[bytes]:
        yield _chunk(upload, bytes(36))
        asleep.wait(20)

    started = time.monotonic()
    assert outcome(lambda: caller.upload(sleepy())) == "DEADLINE_EXCEEDED"
    assert time.monotonic() - started < 5
    asleep.set()
    assert caller.ask(v.GetUpload("m", upload)).missing == ()


def test_only_so_many_uploads_run_at_once() -> None:
    started, go_on = threading.Event(), threading.Event()

    def first() -> Iterator[bytes]:
        yield _chunk("u", b"x")
        started.set()
        go_on.wait(20)

    with spied(lambda verb, cancel: None, uploads=1) as caller, ThreadPoolExecutor() as threads:
        running_one = threads.submit(caller.upload, first())
        started.wait(20)
        while outcome(lambda: caller.upload([_chunk("u", b"x")])) == "OK":  # It may not have arrived yet.
            time.sleep(0.01)
        go_on.set()
        running_one.result(20)
        assert outcome(lambda: caller.upload([_chunk("u", b"x")])) == "OK"


# --- Deadlines and cancellation (T12) -------------------------------------------------------------------------------


class Worker:
    """Works until it is no longer wanted, and remembers why it stopped."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.stopped = threading.Event()
        self.why: FotError | None = None

    def __call__(self, verb: v.Verb[Any], cancel: Cancel) -> Any:
        self.started.set()
        try:
            while True:
                cancel.check()
                time.sleep(0.005)
        except FotError as error:
            self.why = error
            raise
        finally:
            self.stopped.set()


def test_work_stops_when_the_deadline_passes() -> None:
    worker = Worker()
    with spied(worker) as caller:
        with pytest.raises(DeadlineExceeded):
            caller.ask(attend(), timeout_s=0.2)
        assert worker.stopped.wait(0.5)


def test_work_stops_when_the_caller_leaves() -> None:
    worker = Worker()
    with spied(worker) as caller:
        call = caller.channel.unary_unary(ATTEND).future(RPCS[v.Attend].encode_request(attend()), timeout=20)
        assert worker.started.wait(10)
        call.cancel()
        assert worker.stopped.wait(0.5)
        assert isinstance(worker.why, Cancelled)


def test_a_fetch_stops_too_when_the_caller_leaves() -> None:
    worker = Worker()
    with spied(worker) as caller:
        verb = v.Fetch("m", "d", 1)
        call = caller.channel.unary_stream(RPCS[v.Fetch].path)(RPCS[v.Fetch].encode_request(verb), timeout=20)
        assert worker.started.wait(10)
        call.cancel()
        assert worker.stopped.wait(0.5)


def test_a_call_without_a_deadline_gets_the_services_own() -> None:
    with spied(Worker(), default_timeout_s=0.2) as caller, pytest.raises(DeadlineExceeded, match="deadline"):
        caller.ask(attend(), timeout_s=None)


def test_a_deadline_in_the_far_future_is_cut_to_the_services_longest() -> None:
    with spied(Worker(), max_timeout_s=0.2) as caller, pytest.raises(DeadlineExceeded):
        caller.ask(attend(), timeout_s=1e6)


def test_a_call_that_waited_past_its_deadline_is_never_begun() -> None:
    busy, begun = threading.Event(), []

    def answer(verb: v.Verb[Any], cancel: Cancel) -> Any:
        begun.append(verb)
        busy.wait(20)
        return EMPTY

    with spied(answer, attend_threads=1) as caller, ThreadPoolExecutor() as threads:
        first = threads.submit(caller.ask, attend())
        while not begun:
            time.sleep(0.01)
        with pytest.raises(DeadlineExceeded):
            caller.ask(attend(), timeout_s=0.1)
        busy.set()
        first.result(10)
        assert caller.ask(attend())
    assert len(begun) == 2


# --- Admission (T16) ------------------------------------------------------------------------------------------------


def test_twice_the_load_still_gets_four_fifths_of_the_work_done_and_quick_refusals() -> None:
    # Other work on the machine may spoil a turn, not three.
    assert any(_stays_quick_under_twice_the_load() for _ in range(3))


def _stays_quick_under_twice_the_load() -> bool:
    work_s, threads_of_service, seconds = 0.02, 2, 1.5

    def answer(verb: v.Verb[Any], cancel: Cancel) -> Any:
        time.sleep(work_s)
        return EMPTY

    with spied(answer, attend_threads=threads_of_service, queue=4) as caller:
        caller.ask(attend())
        capacity = threads_of_service / work_s
        method, request = caller.channel.unary_unary(ATTEND), RPCS[v.Attend].encode_request(attend())
        ends: list[tuple[float, FotError | None]] = []

        def ended(started: float) -> Callable[[Any], None]:
            def note(call: Any) -> None:
                found = None
                try:
                    with translated():
                        call.result()
                except FotError as error:
                    found = error
                ends.append((time.monotonic() - started, found))

            return note

        started = time.monotonic()
        sent = 0
        while (now := time.monotonic() - started) < seconds:
            if sent < now * 2 * capacity:
                method.future(request, timeout=10).add_done_callback(ended(time.monotonic()))
                sent += 1
            else:
                time.sleep(0.001)
        while len(ends) < sent:
            time.sleep(0.01)
    refused = [(took_s, error) for took_s, error in ends if error]
    admitted = sorted(took_s for took_s, error in ends if not error)
    assert all(isinstance(error, ResourceExhausted) and error.retry_after_s for _, error in refused)
    return (
        len(admitted) >= 0.8 * capacity * seconds
        and admitted[int(0.99 * len(admitted))] < 10 * work_s
        and len(refused) > 0.2 * sent
        and sorted(took_s for took_s, _ in refused)[len(refused) // 2] < work_s
    )


def test_requests_are_let_in_by_their_bytes() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def answer(verb: v.Verb[Any], cancel: Cancel) -> Any:
        begun.set()
        go_on.wait(20)
        return EMPTY

    large = attend(rows=40_000)  # 640 KB of queries
    with spied(answer, attend_bytes=MIB, attend_threads=4) as caller, ThreadPoolExecutor() as threads:
        first = threads.submit(caller.ask, large)
        begun.wait(20)
        with pytest.raises(ResourceExhausted) as raised:
            caller.ask(large)
        assert raised.value.retry_after_s
        go_on.set()
        first.result(10)
        caller.ask(attend())


def test_a_call_that_needs_more_scratch_than_there_is_is_told_to_ask_for_less() -> None:
    with spied(lambda verb, cancel: EMPTY, estimate=2 * MIB, attend_bytes=MIB) as caller:
        with pytest.raises(ResourceExhausted, match="fewer queries") as raised:
            caller.ask(attend())
        assert raised.value.retry_after_s is None


def test_scratch_is_waited_for_and_given_back() -> None:
    at_once: list[int] = []
    inside = 0
    lock = threading.Lock()

    def answer(verb: v.Verb[Any], cancel: Cancel) -> Any:
        nonlocal inside
        with lock:
            inside += 1
            at_once.append(inside)
        time.sleep(0.02)
        with lock:
            inside -= 1
        if len(at_once) == 3:
            raise NotFound("an error gives it back as well")
        return EMPTY

    with (
        spied(answer, estimate=MIB * 2 // 3, attend_bytes=MIB, attend_threads=4) as caller,
        ThreadPoolExecutor(6) as threads,
    ):
        found = list(threads.map(lambda _: outcome(lambda: caller.ask(attend())), range(6)))
    assert sorted(found) == ["NOT_FOUND", *["OK"] * 5]
    assert max(at_once) == 1


def test_attention_goes_on_while_commits_wait_for_the_disk() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def answer(verb: v.Verb[Any], cancel: Cancel) -> Any:
        if isinstance(verb, v.DeleteDocument):
            begun.set()
            go_on.wait(20)
        return EMPTY if isinstance(verb, v.Attend) else None

    with spied(answer, ingest_threads=1, queue=0) as caller, ThreadPoolExecutor() as threads:
        slow = threads.submit(outcome, lambda: caller.ask(v.DeleteDocument("m", "d")))
        begun.wait(20)
        assert outcome(lambda: caller.ask(v.DeleteDocument("m", "d"))) == "RESOURCE_EXHAUSTED"
        assert outcome(lambda: caller.ask(attend())) == "OK"
        go_on.set()
        assert slow.result(10) == "OK"


def test_an_answer_larger_than_a_message_is_refused_before_it_is_computed() -> None:
    asked: list[v.Verb[Any]] = []
    many = AttendGroup(Scope(), torch.zeros(64, 100, 4))
    with spied(lambda verb, cancel: asked.append(verb)) as caller:
        with pytest.raises(ResourceExhausted, match="fewer queries") as raised:
            caller.ask(v.Attend("m", 1, (many,), AttendOptions(top_k=4096, tokens=True)))
        assert raised.value.retry_after_s is None
    assert asked == []


def test_a_page_larger_than_a_message_says_to_ask_for_a_smaller_one() -> None:
    memory = MemoryInfo("m" * MIB, SPEC, 1.0)
    with spied(lambda verb, cancel: Page((memory,) * 9)) as caller, pytest.raises(ResourceExhausted, match="page"):
        caller.ask(v.ListMemories())


def test_a_large_fetch_arrives_whole_and_what_it_held_is_given_back() -> None:
    keys = torch.randn(8, 40_000, 16)
    fetched = Fetched(keys, keys + 1, torch.arange(40_000), first_token=3)
    with spied(lambda verb, cancel: fetched, attend_bytes=64 * MIB) as caller:
        for _ in range(4):  # 41 MB each: two would not fit at once
            found = caller.ask(v.Fetch("m", "d", 1, 3, 40_000))
            assert torch.equal(found.keys, keys)
            assert torch.equal(found.values, keys + 1)
            assert found.first_token == 3


# --- Errors ---------------------------------------------------------------------------------------------------------


def test_an_unknown_failure_is_logged_whole_and_sent_as_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    def answer(verb: v.Verb[Any], cancel: Cancel) -> Any:
        raise ZeroDivisionError("the secret of /var/lib")

    with caplog.at_level(logging.ERROR, "memory_service"), spied(answer) as caller:
        with pytest.raises(Internal) as raised:
            caller.ask(attend())
        assert "secret" not in raised.value.message
    assert any(record.exc_info and "secret" in str(record.exc_info[1]) for record in caplog.records)


def test_an_error_of_the_store_arrives_as_it_was_raised() -> None:
    def answer(verb: v.Verb[Any], cancel: Cancel) -> Any:
        raise ResourceExhausted("come back", reason="DISK_FULL", retry_after_s=2.5, field="x")

    with spied(answer) as caller, pytest.raises(ResourceExhausted) as raised:
        caller.ask(attend())
    assert (raised.value.code, raised.value.retry_after_s) == ("DISK_FULL", 2.5)


# --- Health, reflection, metrics ------------------------------------------------------------------------------------


def _health(caller: Caller, name: str = "") -> int:
    return int(health_pb2_grpc.HealthStub(caller.channel).Check(health_pb2.HealthCheckRequest(service=name)).status)


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_health_follows_the_store() -> None:
    store = SpyStore(lambda verb, cancel: EMPTY)
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    with running(store, settings()) as address, calling(address) as caller:
        assert [_health(caller, name) for name in ("", SERVICE, READING)] == [serving] * 3
        store.read_only_reason = "the disk failed"
        assert _within(3, lambda: _health(caller) == not_serving)
        assert _health(caller, SERVICE) == not_serving
        assert _health(caller, READING) == serving
        store.ready = False
        assert _within(3, lambda: _health(caller, READING) == not_serving)
        store.ready, store.read_only_reason = True, None
        assert _within(3, lambda: _health(caller) == serving)


def test_probes_learn_on_an_address_of_their_own_whether_it_serves_and_nothing_else() -> None:
    async def probed() -> tuple[str, int]:
        server = Server(SpyStore(lambda verb, cancel: EMPTY), settings(health="127.0.0.1:0"))
        await server.start()
        try:
            address = server.health_address
            assert address is not None
            return await asyncio.to_thread(told, address)
        finally:
            await server.stop()

    def told(address: str) -> tuple[str, int]:
        with calling(address) as caller:
            return outcome(lambda: caller.ask(attend())), _health(caller)

    # FAILED_PRECONDITION is what clients make of UNIMPLEMENTED.
    assert asyncio.run(probed()) == ("FAILED_PRECONDITION", health_pb2.HealthCheckResponse.SERVING)


def test_reflection_names_the_service_and_can_be_turned_off(caller: Caller) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")

    def ask(one: Caller) -> Any:
        with translated():
            return next(reflection_pb2_grpc.ServerReflectionStub(one.channel).ServerReflectionInfo(iter([request])))

    names = {service.name for service in ask(caller).list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    with spied(lambda verb, cancel: EMPTY, reflection=False) as other, pytest.raises(FotError):
        ask(other)


def test_the_metrics_page_counts_calls_and_names_nobody(tmp_path: Path) -> None:
    port = own_port()
    with spied(lambda verb, cancel: EMPTY, metrics=f"127.0.0.1:{port}", data=tmp_path) as caller:
        caller.ask(attend())
        assert outcome(lambda: caller.send(ATTEND, b"\xff")) == "INVALID_ARGUMENT"
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert f'fot_rpc_duration_seconds_count{{code="OK",method="{ATTEND}"}} 1.0' in page
    assert f'fot_rpc_duration_seconds_count{{code="INVALID_ARGUMENT",method="{ATTEND}"}} 1.0' in page
    assert "fot_ready 1.0" in page
    assert "fot_behind 0.0" in page
    assert {"fot_disk_free_bytes", "fot_disk_bytes", "process_open_fds"} <= {
        line.split()[0] for line in page.splitlines()
    }
    assert 'fot_pool_calls{pool="attend"} 0.0' in page
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1)


# --- Stopping (T13) -------------------------------------------------------------------------------------------------


def test_a_stop_lets_calls_finish_refuses_new_ones_and_says_not_serving() -> None:
    started, go_on = threading.Event(), threading.Event()

    def answer(verb: v.Verb[Any], cancel: Cancel) -> Any:
        started.set()
        go_on.wait(20)
        return EMPTY

    async def main() -> None:
        server = Server(SpyStore(answer), settings(drain_grace_s=20.0, drain_delay_s=1.0))
        await server.start()
        with calling(server.addresses[0]) as caller, calling(server.addresses[0]) as other:
            await asyncio.to_thread(_health, other)
            under_way = asyncio.create_task(asyncio.to_thread(caller.ask, attend()))
            await asyncio.to_thread(started.wait, 10)
            stopping = asyncio.create_task(server.stop())
            await asyncio.sleep(0.1)
            assert await asyncio.to_thread(_health, other) == health_pb2.HealthCheckResponse.NOT_SERVING
            await asyncio.sleep(1.5)
            with pytest.raises(Unavailable):
                await asyncio.to_thread(other.ask, attend(), 5.0)
            assert not stopping.done()
            go_on.set()
            assert len(await under_way) == 1
            await asyncio.wait_for(stopping, 5)

    asyncio.run(main())


def test_a_call_that_outlasts_the_grace_is_cut_off_with_a_retryable_error() -> None:
    worker = Worker()

    async def main() -> None:
        server = Server(SpyStore(worker), settings(drain_grace_s=0.2))
        await server.start()
        with calling(server.addresses[0]) as caller:
            under_way = asyncio.create_task(asyncio.to_thread(caller.ask, attend()))
            await asyncio.to_thread(worker.started.wait, 10)
            await asyncio.wait_for(server.stop(), 5)
            with pytest.raises((Unavailable, Cancelled)):
                await under_way

    asyncio.run(main())
    assert worker.stopped.is_set()


def test_sigterm_ends_the_service_after_the_call_under_way() -> None:
    started = threading.Event()
    found: list[str] = []

    def answer(verb: v.Verb[Any], cancel: Cancel) -> Any:
        started.set()
        time.sleep(0.3)
        return EMPTY

    def call(address: str) -> None:
        with calling(address) as caller:
            found.append(outcome(lambda: caller.ask(attend())))

    def listening(server: Server) -> None:
        threading.Thread(target=call, args=server.addresses).start()
        threading.Thread(target=lambda: started.wait(10) and os.kill(os.getpid(), signal.SIGTERM)).start()

    asyncio.run(asyncio.wait_for(serve(SpyStore(answer), settings(), listening), 15))
    assert _within(3, lambda: found == ["OK"])


def test_no_thread_is_left_behind() -> None:
    def ours() -> set[int | None]:
        return {thread.ident for thread in threading.enumerate() if thread.name.startswith("fot-")}

    before = ours()
    with spied(lambda verb, cancel: EMPTY) as caller:
        caller.ask(attend())
        assert ours() > before
    assert ours() == before


# --- Addresses ------------------------------------------------------------------------------------------------------


def test_a_unix_socket_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "fot.sock"
    with running(SpyStore(lambda verb, cancel: EMPTY), settings(listen=f"unix:{path}")) as address:
        assert address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with calling(address) as caller:
            assert caller.ask(attend())


def test_it_listens_on_several_addresses_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(SpyStore(lambda verb, cancel: EMPTY), settings(listen=f"127.0.0.1:0, unix:{tmp_path}/s"))
        await server.start()
        assert len(server.addresses) == 2
        for address in server.addresses:
            with calling(address) as caller:
                assert await asyncio.to_thread(caller.ask, attend())
        await server.stop()

    asyncio.run(main())


def test_a_taken_address_is_an_error_and_not_a_shared_port(caller: Caller) -> None:
    store = SpyStore(lambda verb, cancel: EMPTY)
    with (
        running(store, settings()) as address,
        pytest.raises(FailedPrecondition, match="listen"),
        running(store, settings(listen=address)),
    ):
        pass


@pytest.mark.parametrize(
    ("listen", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/tmp/x", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.com:1", False),
        ("127.0.0.1.example.com:1", False),
    ],
)
def test_what_other_machines_can_reach_needs_tls_and_tokens(listen: str, local: bool, tmp_path: Path) -> None:
    assert is_local(listen) is local
    tls = {"tls_certificate": tmp_path / "c", "tls_key": tmp_path / "k"}
    tokens = {"tokens": tmp_path / "t"}
    for given in ({}, tls, tokens):
        if local:
            check_exposure(settings(listen=listen, **given))
        else:
            with pytest.raises(InvalidArgument, match="--insecure"):
                check_exposure(settings(listen=listen, **given))
    check_exposure(settings(listen=listen, **tls, **tokens))
    check_exposure(settings(listen=listen, insecure=True))


def test_one_open_address_among_local_ones_is_noticed() -> None:
    with pytest.raises(InvalidArgument, match=r"0\.0\.0\.0"):
        Server(SpyStore(lambda verb, cancel: EMPTY), settings(listen="127.0.0.1:0, 0.0.0.0:0"))


@pytest.mark.parametrize("listen", ["", "here", ":1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999"])
def test_what_is_no_address_is_an_invalid_argument(listen: str) -> None:
    with pytest.raises(InvalidArgument, match="host:port"):
        check_exposure(settings(listen=listen))
