"""Nobody gets past the door: every rpc against every kind of credential, and tenants against each other."""

from __future__ import annotations

import json
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from memory_service import verbs as v
from memory_service.errors import (
    AlreadyExists,
    FailedPrecondition,
    FotError,
    InvalidArgument,
    NotFound,
    Unauthenticated,
)
from memory_service.process.logs import redacted
from memory_service.server.auth import PageTokens, TokenFile
from memory_service.server.interceptors import POLICY
from memory_service.server.server import running
from memory_service.settings import ServerSettings, StoreOptions
from memory_service.store.store import Store
from memory_service.types.callers import Identity, Role
from memory_service.types.conditions import Compare, Condition
from memory_service.types.documents import Document
from memory_service.types.operations import OperationKind
from memory_service.types.questions import AttendGroup, AttendOptions
from memory_service.types.scopes import Scope, SessionScope
from memory_service.types.sessions import SessionAppend
from memory_service.types.uploads import Chunk
from memory_service.v1 import memory_pb2 as pb
from memory_service.wire.chunks import encode_chunk
from memory_service.wire.codec import RPCS, SERVICE
from tests.memory_service.calls import MODEL, SPEC, Caller, calling, outcome, translated

REFUSED = {"UNAUTHENTICATED", "PERMISSION_DENIED"}


class Served(NamedTuple):
    address: str
    tokens: TokenFile
    token: dict[str, str]  # By what it is.


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service with tokens of every kind, over a store in RAM."""
    file = TokenFile(tmp_path_factory.mktemp("tokens") / "tokens.json")
    token = {role.value: file.create(role.value, "acme", role) for role in Role}
    token["foreign"] = file.create("foreign", "rival", Role.ADMIN)
    token["expired"] = file.create("expired", "acme", Role.ADMIN, expires_at=time.time() - 1)
    token["revoked"] = file.create("revoked", "acme", Role.ADMIN)
    file.revoke("revoked")
    token["bad"] = "fot_" + "A" * 43
    settings = ServerSettings(listen="127.0.0.1:0", tokens=file.path, drain_grace_s=1.0)
    with Store.open(None, StoreOptions(background=False)) as store, running(store, settings) as address:
        yield Served(address, file, token)


# --- Every rpc against every credential -----------------------------------------------------------------------------


class Method(NamedTuple):
    path: str
    client_streaming: bool
    server_streaming: bool

    def call(self, caller: Caller) -> str:
        """How a call with an empty request ends."""
        if self.client_streaming and self.server_streaming:
            answers = caller.channel.stream_stream(self.path)(iter([b""]), timeout=10, metadata=caller.metadata)
            return outcome(lambda: _drain(answers))
        if self.client_streaming:
            return outcome(lambda: caller.stream(self.path, [b""]))
        if self.path.endswith("/Watch"):  # It never ends by itself.
            watch = caller.channel.unary_stream(self.path)(b"", timeout=10, metadata=caller.metadata)
            return outcome(lambda: _first(watch))
        return outcome(lambda: caller.send(self.path, b"", self.server_streaming))


def _drain(answers: Any) -> None:
    with translated():
        list(answers)


def _first(answers: Any) -> None:
    with translated():
        next(answers)
    answers.cancel()


METHODS = [
    Method(f"/{service.full_name}/{method.name}", method.client_streaming, method.server_streaming)
    for file in (pb.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
]
NOBODY = ("none", "bad", "expired", "revoked")
EVERY_METHOD = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.path.rpartition("/")[2])


def test_every_rpc_has_a_policy_and_every_policy_an_rpc() -> None:
    assert set(POLICY) == {method.path for method in METHODS}


def test_the_policy_is_the_verbs_own_role_and_what_the_proto_says() -> None:
    assert {rpc.path: POLICY[rpc.path] for rpc in RPCS.values()} == {rpc.path: rpc.verb.role for rpc in RPCS.values()}
    text = (Path(__file__).parents[2] / "protos/memory_service/v1/memory.proto").read_text()
    for path, role in POLICY.items():
        if path.startswith(f"/{SERVICE}/") and role is not None:
            comment = text.split(f"  rpc {path.rpartition('/')[2]}(")[0].rpartition(";\n")[2]
            assert f"  // {role.name}." in comment, path


@EVERY_METHOD
@pytest.mark.parametrize("credential", [*NOBODY, *(role.value for role in Role), "foreign"])
def test_a_credential_opens_what_its_role_allows_and_nothing_else(
    served: Served, method: Method, credential: str
) -> None:
    needed = POLICY[method.path]
    with calling(served.address, served.token.get(credential)) as caller:
        found = method.call(caller)
    if needed is None:
        assert found not in REFUSED
    elif credential in NOBODY:
        assert found == "UNAUTHENTICATED"
    elif credential in list(Role) and Role(credential).rank < needed.rank:
        assert found == "PERMISSION_DENIED"
    else:
        assert found not in REFUSED


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic {admin}", "{admin}", "bearer x{admin}", "Bearer fot_"]
)
def test_a_header_that_is_no_bearer_token_is_unauthenticated(served: Served, header: str) -> None:
    with calling(served.address) as caller:
        caller.metadata = [("authorization", header.format(**served.token))]
        assert outcome(lambda: caller.ask(v.ListMemories())) == "UNAUTHENTICATED"


def test_the_scheme_is_read_in_any_case(served: Served) -> None:
    with calling(served.address) as caller:
        caller.metadata = [("authorization", f"bearer {served.token['read']}")]
        assert outcome(lambda: caller.ask(v.ListMemories())) == "OK"


def test_an_rpc_without_a_policy_is_refused_to_everybody(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(POLICY, RPCS[v.ListMemories].path)  # type: ignore[arg-type]
    with calling(served.address, served.token["admin"]) as caller:
        assert outcome(lambda: caller.ask(v.ListMemories())) == "PERMISSION_DENIED"


def test_a_refusal_repeats_neither_the_token_nor_a_name(served: Served) -> None:
    with calling(served.address, served.token["bad"]) as caller, pytest.raises(Unauthenticated) as raised:
        caller.ask(v.GetMemory("very-secret"))
    assert served.token["bad"] not in raised.value.message
    assert "secret" not in raised.value.message


# --- Tenants against each other (T10) -------------------------------------------------------------------------------


class Owned(NamedTuple):
    upload: str
    session: str
    operation: str
    page_token: str


@pytest.fixture(scope="module")
def owned(served: Served) -> Owned:
    """What the tenant acme has: a memory m, documents a and b, an open upload, a session, an operation."""
    tensor = torch.ones(2, 1, 3, 4, dtype=torch.bfloat16)
    with calling(served.address, served.token["admin"]) as caller:
        caller.ask(v.CreateMemory("m", SPEC))
        for name in "ab":
            caller.ask(v.PutDocument("m", Document(name, tensor, tensor), MODEL, request_id=f"put-{name}"))
        upload = caller.ask(v.BeginUpload("m", "c", 3, MODEL, request_id="begin"))
        session = caller.ask(v.OpenSession("m", MODEL))
        operation = caller.ask(v.StartOperation("m", OperationKind.VERIFY))
        page = caller.ask(v.ListDocuments("m", page_size=1))
    return Owned(upload.id, session.id, operation.id, page.next)


def _verbs_on(memory: str, document: str, owned: Owned) -> list[v.Verb[Any]]:
    """Every verb that names something, on these names."""
    tensor = torch.ones(2, 1, 1, 4, dtype=torch.bfloat16)
    group = AttendGroup(Scope(sessions=(SessionScope(owned.session),)), torch.ones(1, 1, 4))
    return [
        v.GetMemory(memory),
        v.PutDocument(memory, Document("new", tensor, tensor), MODEL, request_id="put-a"),
        v.BeginUpload(memory, "c", 3, MODEL, request_id="begin"),
        v.GetUpload(memory, owned.upload),
        v.CommitUpload(memory, owned.upload),
        v.GetDocument(memory, document),
        v.ListDocuments(memory),
        v.DeleteDocument(memory, document),
        v.OpenSession(memory, MODEL),
        v.AppendSessions(memory, (SessionAppend(owned.session, (1, 3), 0, tensor, tensor),)),
        v.RenewSession(memory, owned.session),
        v.Attend(memory, 1, (group,), AttendOptions()),
        v.Search(memory, 1, (group,), AttendOptions(top_k=1)),
        v.Fetch(memory, document, 1),
        v.Fetch(memory, f"session:{owned.session}", 1),
        v.GetStats(memory),
        v.StartOperation(memory, OperationKind.VERIFY),
        v.CreateSnapshot(memory, "one"),
        v.DeleteMemory(memory),
    ]


def test_a_foreign_name_is_answered_as_a_name_that_does_not_exist(served: Served, owned: Owned) -> None:
    with calling(served.address, served.token["foreign"]) as caller:
        for theirs, nobodys in zip(_verbs_on("m", "a", owned), _verbs_on("n", "a", owned), strict=True):
            with pytest.raises(NotFound) as real:
                caller.ask(theirs)
            with pytest.raises(NotFound) as imagined:
                caller.ask(nobodys)
            assert real.value.code == imagined.value.code
            assert real.value.message.replace("'m'", "'n'") == imagined.value.message, type(theirs)


def test_foreign_ids_do_nothing_in_a_memory_of_ones_own(served: Served, owned: Owned) -> None:
    data = bytes(48 + 48 + 12)
    with calling(served.address, served.token["foreign"]) as rival:
        rival.ask(v.CreateMemory("own", SPEC))
        assert outcome(lambda: rival.ask(v.GetOperation(owned.operation))) == "NOT_FOUND"
        assert outcome(lambda: rival.ask(v.CancelOperation(owned.operation))) == "NOT_FOUND"
        assert outcome(lambda: rival.ask(v.GetUpload("own", owned.upload))) == "NOT_FOUND"
        assert outcome(lambda: rival.ask(v.CommitUpload("own", owned.upload))) == "NOT_FOUND"
        assert outcome(lambda: rival.ask(v.RenewSession("own", owned.session))) == "NOT_FOUND"
        chunk = encode_chunk("own", owned.upload, Chunk(0, 0, 0, data))
        assert outcome(lambda: rival.upload([chunk])) == "NOT_FOUND"
        rival.ask(v.AbortUpload("own", owned.upload))  # Harmless for what does not exist.
        rival.ask(v.CloseSession("own", owned.session))
        # A request id of another tenant is a new one here.
        assert rival.ask(v.BeginUpload("own", "c", 3, MODEL, request_id="begin")).id != owned.upload
        assert [memory.name for memory in rival.ask(v.ListMemories()).items] == ["own"]
        assert rival.ask(v.ListOperations()).items == ()
        assert rival.ask(v.GetStats()).tokens == 0
        rival.ask(v.DeleteMemory("own"))
    with calling(served.address, served.token["admin"]) as owner:
        assert owner.ask(v.GetUpload("m", owned.upload)).id == owned.upload
        assert owner.ask(v.RenewSession("m", owned.session)).id == owned.session


def test_a_page_token_opens_only_the_listing_it_came_from(served: Served, owned: Owned) -> None:
    listing = v.ListDocuments("m", page_token=owned.page_token)
    with calling(served.address, served.token["read"]) as caller:
        assert [document.id for document in caller.ask(listing).items] == ["b"]
        assert [document.id for document in caller.ask(replace(listing, page_size=7)).items] == ["b"]
        for other in (
            replace(listing, where=Condition("x", Compare.EXISTS)),
            replace(listing, page_token=owned.page_token[:-4] + "AAA="),
            replace(listing, page_token="é" * 99),
            v.ListMemories(page_token=owned.page_token),
            v.ListOperations(page_token=owned.page_token),
            v.ListSnapshots(page_token=owned.page_token),
        ):
            assert outcome(lambda verb=other: caller.ask(verb)) == "INVALID_ARGUMENT"  # type: ignore[misc]


def test_page_tokens_are_sealed_for_one_tenant_and_key() -> None:
    acme, rival = Identity("acme", Role.READ), Identity("rival", Role.ADMIN)
    listing = v.ListDocuments("m")
    pages = PageTokens(b"key")
    sealed = replace(listing, page_token=pages.seal(acme, listing, "after b"))
    assert pages.opened(acme, sealed) == replace(listing, page_token="after b")
    assert pages.seal(acme, listing, "") == ""
    for identity, others in ((rival, pages), (acme, PageTokens(b"another"))):
        with pytest.raises(InvalidArgument):
            others.opened(identity, sealed)


# --- The token file -------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "deep" / "tokens.json")


def test_the_file_holds_no_token_and_only_its_owner_may_read_it(file: TokenFile) -> None:
    token = file.create("ci", "acme", Role.WRITE)
    assert token.startswith("fot_")
    assert len(token) == 47
    assert token not in file.path.read_text()
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert file.identity(token) == Identity("acme", Role.WRITE)
    assert TokenFile(file.path).identity(token) == Identity("acme", Role.WRITE)


def test_a_change_by_another_process_takes_effect_at_once(file: TokenFile) -> None:
    first = file.create("first", "acme", Role.READ)
    assert file.identity(first).tenant == "acme"
    other = TokenFile(file.path)
    second = other.create("second", "rival", Role.READ)
    other.revoke("first")
    assert file.identity(second).tenant == "rival"
    with pytest.raises(Unauthenticated):
        file.identity(first)
    assert [token.name for token in file.tokens()] == ["second"]


def test_a_token_ends_when_it_was_said_to(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    token = file.create("ci", "acme", Role.READ, expires_at=time.time() + 100)
    assert file.identity(token).tenant == "acme"
    later = time.time() + 101
    monkeypatch.setattr("memory_service.server.auth.time.time", lambda: later)
    with pytest.raises(Unauthenticated, match="expired"):
        file.identity(token)


def test_names_are_unique_and_only_known_ones_can_be_revoked(file: TokenFile) -> None:
    file.create("ci", "acme", Role.READ)
    with pytest.raises(AlreadyExists):
        file.create("ci", "rival", Role.READ)
    with pytest.raises(NotFound):
        file.revoke("cd")
    for name, tenant in (("", "acme"), ("ci2", "../acme")):
        with pytest.raises(InvalidArgument):
            file.create(name, tenant, Role.READ)


def test_two_who_create_at_once_both_get_their_token(file: TokenFile) -> None:
    made: dict[int, str] = {}
    threads = [
        threading.Thread(
            target=lambda n=n: made.update({n: TokenFile(file.path).create(f"t{n}", "acme", Role.READ)})  # type: ignore[misc]
        )
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {file.identity(token).tenant for token in made.values()} == {"acme"}
    assert len(file.tokens()) == 8


def test_page_tokens_outlive_a_restart(file: TokenFile) -> None:
    file.create("ci", "acme", Role.READ)
    key = file.page_key
    file.create("cd", "acme", Role.READ)
    assert TokenFile(file.path).page_key == key
    assert len(key) == 32


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"version": 9}', '{"version": 1, "tokens": [{}], "page_key": ""}'])
def test_a_damaged_file_is_refused_in_a_sentence(file: TokenFile, damage: str) -> None:
    file.create("ci", "acme", Role.READ)
    file.path.write_text(damage)
    with pytest.raises(FailedPrecondition, match="token file"):
        TokenFile(file.path).tokens()


def test_a_file_that_others_may_write_is_refused(file: TokenFile) -> None:
    file.create("ci", "acme", Role.READ)
    file.path.chmod(0o622)
    with pytest.raises(FailedPrecondition, match="chmod 600"):
        TokenFile(file.path).tokens()


@pytest.mark.parametrize("damage", ["remove", "garble"])
def test_a_service_that_loses_its_tokens_lets_nobody_in_and_recovers(tmp_path: Path, damage: str) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    token = file.create("ci", "acme", Role.ADMIN)
    good = file.path.read_text()
    settings = ServerSettings(listen="127.0.0.1:0", tokens=file.path, drain_grace_s=1.0)
    with (
        Store.open(None, StoreOptions(background=False)) as store,
        running(store, settings) as address,
        calling(address, token) as caller,
    ):
        caller.ask(v.ListMemories())
        file.path.unlink()
        if damage == "garble":
            file.path.write_text("{")
        with pytest.raises(Unauthenticated) as raised:
            caller.ask(v.ListMemories())
        assert str(tmp_path) not in raised.value.message
        file.path.write_text(good)
        caller.ask(v.ListMemories())


def test_a_service_does_not_start_without_the_tokens_it_was_told_of(tmp_path: Path) -> None:
    settings = ServerSettings(listen="127.0.0.1:0", tokens=tmp_path / "none.json")
    with Store.open(None, StoreOptions(background=False)) as store, pytest.raises(FotError), running(store, settings):
        pass


def test_the_log_hides_tokens(file: TokenFile) -> None:
    token = file.create("ci", "acme", Role.READ)
    assert redacted(json.dumps({"header": f"Bearer {token}"})) == '{"header": "Bearer fot_…"}'
