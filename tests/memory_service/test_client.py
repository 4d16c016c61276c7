"""The client: opening and closing, what the sync and async sides share, lines that break, services that restart."""

from __future__ import annotations

import asyncio
import datetime
import gc
import inspect
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from memory_service import (
    ALL_DOCUMENTS,
    AlreadyExists,
    AsyncMemory,
    AttendOptions,
    Client,
    DeadlineExceeded,
    DType,
    FailedPrecondition,
    Fingerprint,
    InvalidArgument,
    Memory,
    MemorySpec,
    NotFound,
    PermissionDenied,
    SessionExpired,
    StoreOptions,
    Tls,
    Unauthenticated,
    Unavailable,
    merge,
)
from memory_service.attention.exact import attend
from memory_service.server.auth import TokenFile
from memory_service.types.callers import Role
from tests.memory_service.places import QUIET, SYNC_AND_ASYNC, serving
from tests.ports import own_port

SPEC = MemorySpec(Fingerprint("tiny"), (3,), 2, 8, DType.F32)
WIDE = MemorySpec(Fingerprint("tiny"), (3,), 8, 64, DType.F32)


def drawn(tokens: int, spec: MemorySpec = SPEC) -> torch.Tensor:
    """Keys and values [2, L, H, T, D]."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(2, len(spec.layers), spec.kv_heads, tokens, spec.head_dim, generator=generator)


# --- The shape of the API -------------------------------------------------------------------------------------------


def test_a_memory_reads_as_it_should() -> None:
    keys, values = drawn(40)
    queries = torch.randn(4, 3, 8)
    with Memory.open(":memory:", spec=SPEC) as memory:
        memory.put("doc-1", keys, values, token_ids=range(40), metadata={"lang": "py", "year": 2021})
        far = memory.attend(3, queries, where="lang = py and year >= 2020")
        with memory.session() as session:
            session.append(3, keys[0], values[0])
            near = session.attend(3, queries)
            both = session.attend(3, queries, documents=ALL_DOCUMENTS)
    merged = merge([far.partial, near.partial])
    assert torch.allclose(merged.output, both.output, atol=1e-6)
    expected = attend(queries.view(2, 6, 8) * 8**-0.5, keys[0], values[0])
    assert torch.allclose(far.output, expected.output.view(4, 3, 8), atol=1e-6)


def public(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("_")}


@pytest.mark.parametrize(("sync", "other"), SYNC_AND_ASYNC, ids=lambda kind: kind.__name__)
def test_sync_and_async_have_the_same_verbs(sync: type, other: type) -> None:
    ours, theirs = public(sync), public(other)
    assert list(ours) == list(theirs)
    for name in ours:
        if isinstance(ours[name], property):
            assert isinstance(theirs[name], property)
            continue
        of_sync, of_async = (inspect.signature(getattr(kind, name)) for kind in (sync, other))
        assert list(of_sync.parameters.values()) == list(of_async.parameters.values()), name
        assert str(of_async.return_annotation).replace("Async", "") in (
            str(of_sync.return_annotation),
            f"Opening[{of_sync.return_annotation}]",
            str(of_sync.return_annotation).replace("Iterator", "Iterator"),
        ), name
        documents = (inspect.getdoc(getattr(kind, name)) or "" for kind in (sync, other))
        ours_told, theirs_told = documents
        assert ours_told
        assert theirs_told.replace("Async", "") == ours_told, name


@pytest.mark.parametrize("kind", [kind for pair in SYNC_AND_ASYNC for kind in pair], ids=lambda kind: kind.__name__)
def test_every_public_verb_is_typed(kind: type) -> None:
    for name, value in public(kind).items():
        function = value.fget if isinstance(value, property) else getattr(kind, name)
        names = set(inspect.signature(function).parameters) - {"self"}
        # Session names Memory only for the type checker.
        hints = get_type_hints(function, {**sys.modules[function.__module__].__dict__, "Memory": Memory})
        assert names <= set(hints) and "return" in hints, name


def test_reprs_say_what_it_is() -> None:
    with Client.open(":memory:") as client:
        memory = client.memory("notes", SPEC)
        memory.put("d", *drawn(3))
        session = memory.session()
        session.append(3, *drawn(1200)[:, 0])
        assert repr(client) == "Client(':memory:')"
        assert repr(memory) == "<Memory 'notes' at :memory: (tiny, layer 3, 2 × 8, f32)>"
        assert repr(session) == f"<Session {session.id} of memory 'notes': 1,200 tokens>"
        assert "output=[2, 1, 8] torch.float32" in repr(memory.attend(3, torch.zeros(2, 1, 8)))


def test_tensors_are_rounded_to_the_memorys_dtype_and_not_written_to() -> None:
    spec = MemorySpec(Fingerprint("tiny"), (3,), 2, 8, DType.BF16)
    keys, values = drawn(5)
    before = keys.clone()
    with Memory.open(":memory:", spec=spec) as memory:
        memory.put("d", keys.requires_grad_(), values)
        fetched = memory.fetch("d", 3, 0, 5)
    assert torch.equal(keys, before)
    assert torch.equal(fetched.keys, before[0].bfloat16())


def test_appends_go_to_the_end_and_layers_may_differ() -> None:
    spec = MemorySpec(Fingerprint("tiny"), (1, 3), 2, 8, DType.F32)
    keys, values = drawn(5, spec)
    with Memory.open(":memory:", spec=spec) as memory, memory.session() as session:
        session.append([1, 3], keys, values)
        session.append(1, keys[0], values[0])
        assert (session.length(1), session.length(3)) == (10, 5)
        with pytest.raises(InvalidArgument, match="the layers hold different numbers of tokens"):
            session.append([1, 3], keys, values)
        with pytest.raises(InvalidArgument, match="layer 2 is not kept"):
            session.append(2, keys[0], values[0])


def test_several_sessions_are_appended_to_in_one_round_trip() -> None:
    keys, values = drawn(4)[:, 0]
    with Memory.open(":memory:", spec=SPEC) as memory, memory.session() as a, memory.session() as b:
        memory.append_sessions([a.piece(3, keys, values), b.piece(3, keys[:, :1], values[:, :1])])
        memory.append_sessions([a.piece(3, keys, values), b.piece(3, keys, values)])
        assert (a.length(3), b.length(3)) == (8, 5)
        groups = [(a, torch.zeros(2, 1, 8)), ([a, b.until(2)], torch.zeros(2, 1, 8))]
        answers = memory.attend_groups(3, groups, AttendOptions(top_k=3))
        assert [answer.coverage.in_scope for answer in answers] == [8, 10]


def test_the_error_of_a_sessions_body_is_not_hidden_by_its_closing() -> None:
    memory = Memory.open(":memory:", spec=SPEC)
    with pytest.raises(ZeroDivisionError), memory.session():
        memory.close()
        _ = 1 / 0


# --- Opening and closing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "given", "told"),
    [
        ("http://x:1", {}, "cannot open 'http://x:1'; give ':memory:', a directory"),
        ("grpc://", {}, "cannot open 'grpc://'"),
        ("", {}, "the target is empty"),
        ("grpc://localhost:1", {"tls": Tls()}, "write grpcs://"),
        (":memory:", {"tls": Tls()}, "tls is for services"),
        ("grpc://localhost:1", {"options": QUIET}, "options are for stores in this process"),
        ("grpc://far.example:1", {"token": "fot_x"}, "a token would travel to far.example:1 unencrypted"),
        ("grpc://localhost:1", {"token": Path("no/such/file")}, "the token file no/such/file cannot be read"),
        ("grpcs://localhost:1", {"tls": Tls(ca=Path("no.pem"))}, "the TLS file no.pem cannot be read"),
    ],
)
def test_a_target_that_cannot_be_is_refused_in_a_sentence(target: str, given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        Client.open(target, **given)
    assert told in refused.value.message


@pytest.mark.parametrize("authority", ["localhost:1", "127.0.0.1:1", "127.1.2.3:99", "[::1]:1"])
def test_a_token_may_travel_within_the_machine(authority: str) -> None:
    Client.open(f"grpc://{authority}", token="fot_x").close()


def test_a_token_may_travel_further_if_it_is_spelt_out() -> None:
    Client.open("grpc://far.example:1", token="fot_x", insecure=True).close()


def test_without_a_spec_the_memory_and_the_directory_must_exist(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no directory"):
        Memory.open(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    with pytest.raises(NotFound, match="no memory 'default'"):
        Memory.open(":memory:")


def test_a_directory_keeps_what_was_put(tmp_path: Path) -> None:
    with Memory.open(tmp_path, spec=SPEC, options=QUIET) as memory:
        memory.put("d", *drawn(3), metadata={"a": 1})
    with Memory.open(str(tmp_path), options=QUIET) as memory:
        assert memory.spec == SPEC
        assert [(one.id, one.tokens, one.metadata) for one in memory.documents()] == [("d", 3, {"a": 1})]


def test_opening_a_directory_twice_shares_it(tmp_path: Path) -> None:
    first = Memory.open(tmp_path, spec=SPEC, options=QUIET)
    with Memory.open(tmp_path / ".", spec=SPEC) as second:
        first.put("d", *drawn(3))
        assert second.get("d").tokens == 3
        with pytest.raises(FailedPrecondition, match="already open in this process with other options"):
            Memory.open(tmp_path, options=StoreOptions(session_bytes=1))
    assert first.get("d").tokens == 3
    first.close()
    with Memory.open(tmp_path, options=StoreOptions(background=False, session_bytes=1)) as third:
        assert third.get("d").tokens == 3


def test_a_directory_has_one_process(tmp_path: Path) -> None:
    code = (
        "import sys; from memory_service import Client; "
        "client = Client.open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(FailedPrecondition, match=f"in use by process {other.pid}"):
            Client.open(tmp_path)
        assert other.stdin is not None
        other.stdin.close()
    Client.open(tmp_path, options=QUIET).close()


def test_what_was_closed_says_so(tmp_path: Path) -> None:
    with serving(tmp_path) as target:
        for place in (":memory:", target):
            memory = Memory.open(place, spec=SPEC)
            memory.close()
            memory.close()
            with pytest.raises(FailedPrecondition, match="was closed; open it again"):
                memory.info()


def test_a_memory_that_is_dropped_lets_its_directory_go(tmp_path: Path) -> None:
    memory = Memory.open(tmp_path, spec=SPEC, options=QUIET)
    memory.put("d", *drawn(3))
    del memory
    gc.collect()
    Memory.open(tmp_path, options=StoreOptions(background=False, session_bytes=1)).close()


def test_a_memory_of_a_client_leaves_the_client_open() -> None:
    with Client.open(":memory:") as client:
        client.memory("a", SPEC).close()
        assert [info.name for info in client.memories()] == ["a"]


def test_another_spec_is_told_by_what_differs() -> None:
    with Client.open(":memory:") as client:
        client.memory("a", SPEC)
        with pytest.raises(AlreadyExists) as refused:
            client.memory("a", MemorySpec(SPEC.fingerprint, (3,), 2, 16, DType.F32))
        assert refused.value.message == "memory 'a' exists with another spec: head_dim is 8, not 16"


def test_listings_go_on_past_a_page() -> None:
    with Memory.open(":memory:", spec=SPEC) as memory:
        keys, values = drawn(1)
        for number in range(1003):
            memory.put(f"{number:04}", keys, values)
        assert [one.id for one in memory.documents()] == [f"{number:04}" for number in range(1003)]


# --- Time -----------------------------------------------------------------------------------------------------------


def test_a_call_has_a_deadline_everywhere(tmp_path: Path) -> None:
    with serving(tmp_path) as target:
        for place in (":memory:", target):
            with Memory.open(place, spec=SPEC) as memory:
                memory.put("d", *drawn(3))
                with pytest.raises(DeadlineExceeded):
                    memory.attend(3, torch.zeros(2, 1, 8), timeout_s=1e-9)


def test_a_service_that_is_not_there_is_unavailable_in_time() -> None:
    target = f"grpc://127.0.0.1:{own_port()}"
    started = time.monotonic()
    with pytest.raises(Unavailable, match="cannot be reached"):
        Memory.open(target, timeout_s=0.5)
    assert time.monotonic() - started < 3


# --- Who calls ------------------------------------------------------------------------------------------------------


def test_tokens_come_as_text_file_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = TokenFile(tmp_path / "tokens.json")
    admin, reader = tokens.create("a", "acme", Role.ADMIN), tokens.create("r", "acme", Role.READ)
    kept = tmp_path / "token"
    kept.write_text(reader + "\n")
    with serving(None, tokens=tokens.path) as target:
        with Memory.open(target, spec=SPEC, token=admin) as memory:
            memory.put("d", *drawn(3))
        with Memory.open(target, spec=SPEC, token=kept) as memory:
            assert memory.get("d").tokens == 3
            with pytest.raises(PermissionDenied, match="role write"):
                memory.put("e", *drawn(3))
        with pytest.raises(Unauthenticated):
            Memory.open(target)
        monkeypatch.setenv("FOT_TOKEN", reader)
        Memory.open(target).close()
        monkeypatch.delenv("FOT_TOKEN")
        monkeypatch.setenv("FOT_TOKEN_FILE", str(kept))
        Memory.open(target).close()


def test_a_socket_of_this_machine_is_a_target_too(tmp_path: Path) -> None:
    with serving(None, listen=f"unix:{tmp_path / 'socket'}") as target, Memory.open(target, spec=SPEC) as memory:
        memory.put("d", *drawn(3))
        assert memory.attend(3, torch.zeros(2, 1, 8)).coverage.searched == 3


# --- TLS ------------------------------------------------------------------------------------------------------------


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for `name`, its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, secret = directory / f"{name}.crt", directory / f"{name}.key"
    pem.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, secret


def test_tls_trusts_the_authority_it_is_given_and_shows_a_certificate_when_asked(tmp_path: Path) -> None:
    ours, our_key = certificate(tmp_path, "fot.example")
    mine, my_key = certificate(tmp_path, "worker.example")
    refused = (Unavailable, DeadlineExceeded)  # The latter where the cores are too busy for a handshake a second.
    named = "fot.example"  # The service is at 127.0.0.1, for which its certificate does not speak.
    with serving(None, tls_certificate=ours, tls_key=our_key) as plain:
        target = plain.replace("grpc:", "grpcs:")
        with Memory.open(target, spec=SPEC, token="fot_any", tls=Tls(ca=ours, server_name=named)) as memory:
            memory.put("d", *drawn(3))
        for wrong in (Tls(ca=mine, server_name=named), Tls(ca=ours), None):
            with pytest.raises(refused):
                Memory.open(target, tls=wrong, timeout_s=1.0)
        with pytest.raises(refused):
            Memory.open(plain, timeout_s=1.0)
    with serving(None, tls_certificate=ours, tls_key=our_key, tls_client_ca=mine) as plain:
        target = plain.replace("grpc:", "grpcs:")
        shown = Tls(ca=ours, certificate=mine, key=my_key, server_name=named)
        Memory.open(target, spec=SPEC, tls=shown).close()
        with pytest.raises(refused):
            Memory.open(target, tls=Tls(ca=ours, server_name=named), timeout_s=1.0)


# --- Lines that break -----------------------------------------------------------------------------------------------


class Cutting:
    """A line to a service that breaks after some bytes, as often as told, and then holds."""

    def __init__(self, port: int, cuts: list[int]):
        self._to = port
        self._cuts = cuts
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                self._threads.append(threading.Thread(target=self._connect, args=(near,)))
                self._threads[-1].start()

    def _connect(self, near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", self._to)) as far:
            back = threading.Thread(target=self._carry, args=(far, near))
            back.start()
            self._carry(near, far, self._cuts.pop(0) if self._cuts else None)
            back.join(10)

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket, limit: int | None = None) -> None:
        carried = 0
        with suppress(OSError):
            while (data := source.recv(1 << 16)) and (limit is None or carried <= limit):
                sink.sendall(data)
                carried += len(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutting(target: str, cuts: list[int]) -> Iterator[str]:
    line = Cutting(int(target.rpartition(":")[2]), cuts)
    try:
        yield f"grpc://127.0.0.1:{line.port}"
    finally:
        line.close()


def test_an_upload_survives_a_line_that_breaks(tmp_path: Path) -> None:
    keys, values = drawn(4096, WIDE)  # 16 MiB
    cuts = [3 << 20, 6 << 20]
    with serving(tmp_path) as target, cutting(target, cuts) as line, Memory.open(line, spec=WIDE) as memory:
        memory.put("d", keys, values, token_ids=range(4096))
        fetched = memory.fetch("d", 3, 0, 4096)
        assert cuts == []
        assert torch.equal(fetched.keys, keys[0])
        assert torch.equal(fetched.values, values[0])
        assert fetched.token_ids.tolist() == list(range(4096))
        assert [one.generation for one in memory.documents()] == [1]


def test_an_upload_survives_a_line_that_breaks_for_asyncio_too(tmp_path: Path) -> None:
    keys, values = drawn(4096, WIDE)

    async def put(target: str) -> torch.Tensor:
        async with AsyncMemory.open(target, spec=WIDE) as memory:
            await memory.put("d", keys, values)
            return (await memory.fetch("d", 3, 0, 4096)).values

    with serving(tmp_path) as target, cutting(target, [3 << 20, 6 << 20]) as line:
        assert torch.equal(asyncio.run(put(line)), values[0])


def test_reads_go_on_over_a_line_that_breaks(tmp_path: Path) -> None:
    with serving(tmp_path) as target, cutting(target, [20_000] * 5) as line, Memory.open(line, spec=SPEC) as memory:
        memory.put("d", *drawn(100))
        queries = torch.randn(2, 40, 8)
        answers = [memory.attend(3, queries, top_k=4).output for _ in range(60)]
        assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_a_restart_of_the_service_is_not_noticed(tmp_path: Path) -> None:
    listen = f"127.0.0.1:{own_port()}"
    keys, values = drawn(3)
    stopping = threading.Event()
    failures: list[BaseException] = []
    acknowledged: list[str] = []

    def write() -> None:
        try:
            with Memory.open(f"grpc://{listen}", spec=SPEC) as memory:
                while not stopping.is_set():
                    name = f"doc-{len(acknowledged):05}"
                    memory.put(name, keys, values)
                    acknowledged.append(name)
                    memory.attend(3, torch.zeros(2, 1, 8), top_k=2)
                    # A restart forgets sessions, and opening one is not repeated.
                    with suppress(SessionExpired, Unavailable), memory.session() as session:
                        session.append(3, keys[0], values[0])
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    for round_number in range(3):
        with serving(tmp_path, listen=listen, drain_grace_s=5.0):
            if round_number == 0:
                writer.start()
            until = time.monotonic() + 0.7
            while time.monotonic() < until and not failures:
                time.sleep(0.02)
            if round_number == 2:
                stopping.set()
                writer.join()
    assert failures == []
    assert len(acknowledged) > 5
    with Memory.open(tmp_path, options=QUIET) as memory:
        assert [one.id for one in memory.documents()] == acknowledged


def test_cancelling_a_task_ends_the_call(tmp_path: Path) -> None:
    async def cancelled(target: str) -> None:
        async with AsyncMemory.open(target, spec=WIDE) as memory:
            await memory.put("d", *drawn(20_000, WIDE))
            call = asyncio.create_task(memory.attend(3, torch.randn(8, 4000, 64), top_k=8))
            await asyncio.sleep(0.05)
            call.cancel()
            started = time.monotonic()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert time.monotonic() - started < 1
            assert (await memory.get("d")).tokens == 20_000

    asyncio.run(cancelled(":memory:"))
    with serving(tmp_path / "served") as target:
        asyncio.run(cancelled(target))
