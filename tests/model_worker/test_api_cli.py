"""`fot api` in a process of its own: it says where it is, keeps strangers out, drains, and refuses what is unsafe."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx2
import openai
import pytest

from memory_service import InvalidArgument, PermissionDenied, Unauthenticated
from memory_service.errors import FailedPrecondition
from memory_service.server.auth import EVERYONE, TokenFile
from memory_service.types.callers import Identity, Role
from model_worker.api.keys import Keys
from model_worker.api.process import running
from model_worker.api.server import Addresses
from model_worker.api.setup import Setup
from model_worker.api.tenants import Tenants
from model_worker.v1 import model_worker_pb2 as pb
from model_worker.v1 import model_worker_pb2_grpc as pb_grpc
from tests.memory_service.places import serving
from tests.memory_service.test_tls import Authority
from tests.model_worker.tiny import save_tiny_llama
from tests.model_worker.workers import PLAIN_TEMPLATE

ROOT = Path(__file__).parents[2]


@contextmanager
def fot_api(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, and where it says that HTTP and gRPC are."""
    command = [sys.executable, "-m", "memory_service.cli", "api", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            told = process.stdout.readline()
            found = re.search(r"at (http://\S+) and grpc://(\S+)", told)
            assert found, told + process.stderr.read()
            yield process, found[1], found[2]
        finally:
            process.kill()


def test_it_serves_both_until_it_is_told_to_stop_and_finishes_what_it_began(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "tiny-llama")
    template = tmp_path / "chat.jinja"
    template.write_text(PLAIN_TEMPLATE)
    options = ("--model", model, "--mem-layers", "1,2", "--window", 64, "--chat-template", template)
    with serving(None) as memory, fot_api(*options, "--target", memory) as (process, url, address):
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.ModelWorkerStub(channel)
            stub.CreateCollection(pb.CreateCollectionRequest(name="notes"))
            stub.PutDocuments(iter([pb.PutDocumentsRequest(collection="notes", id="a", text="The sky is blue.")]))
        client = openai.OpenAI(base_url=url, api_key="none is needed", max_retries=0)
        assert [one.id for one in client.models.list()] == ["tiny-llama"]
        stream = client.chat.completions.create(
            model="tiny-llama",
            messages=[{"role": "user", "content": "What colour has the sky?"}],
            max_tokens=40,
            stream=True,
            extra_body={"memory": {"collection": "notes", "top_k": 4}},
        )
        chunks = [next(iter(stream))]
        process.send_signal(signal.SIGTERM)
        chunks += stream
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert (chunks[-1].model_extra or {})["memory"]["documents"][0]["id"] == "a"
        assert process.wait(timeout=20) == 0
        client.close()


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("addresses", "keys", "word"),
    [
        (Addresses("0.0.0.0:8000", None), False, "TLS .* and API keys"),
        (Addresses(None, "0.0.0.0:50051"), True, "TLS"),
        (Addresses("127.0.0.1:8000", "[::]:50051"), True, "--insecure"),
        (Addresses(None, None), True, "nothing to listen on"),
        (Addresses(tls_key=Path("key.pem")), True, "both"),
    ],
)
def test_unsafe_addresses_are_refused(addresses: Addresses, keys: bool, word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        addresses.check(keys)


def test_unsafe_addresses_can_be_insisted_on() -> None:
    Addresses("0.0.0.0:8000", "0.0.0.0:50051", insecure=True).check(False)
    Addresses("localhost:8000", "[::1]:50051").check(False)


def test_absent_files_of_tls_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no TLS file .*absent\.crt"):
        Addresses(tls_certificate=tmp_path / "absent.crt", tls_key=tmp_path / "absent.key").check_files()


def test_both_speak_tls_with_the_same_certificate(tmp_path: Path) -> None:
    authority = Authority("ours")
    certificate, key = authority.issue("127.0.0.1")
    (tmp_path / "tls.crt").write_bytes(certificate)
    (tmp_path / "tls.key").write_bytes(key)
    (tmp_path / "ca.crt").write_bytes(authority.pem)
    addresses = Addresses("127.0.0.1:0", "127.0.0.1:0", tmp_path / "tls.crt", tmp_path / "tls.key")
    setup = Setup(save_tiny_llama(tmp_path / "tiny"), "tiny", ":memory:", mem_layers=(1,), window=64)
    with setup.open() as (worker, keys), running(worker, keys, addresses) as server:
        trusted = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
        assert httpx2.get(f"https://{server.http}/v1/models", verify=trusted).json()["data"][0]["id"] == "tiny"
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"https://{server.http}/v1/models")
        with grpc.secure_channel(str(server.grpc), grpc.ssl_channel_credentials(authority.pem)) as channel:
            told = pb_grpc.ModelWorkerStub(channel).GetModel(pb.GetModelRequest(), timeout=10)
            assert told.id == "tiny" and list(told.memory_layers) == [1] and not told.chat


# --- Keys -----------------------------------------------------------------------------------------------------------


def test_a_key_is_its_tenant_s_until_it_is_revoked(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "keys.json")
    key = file.create("laptop", "north", Role.READ)
    keys = Keys(file.path)
    assert keys.identity(f"Bearer {key}") == Identity("north", Role.READ)
    file.revoke("laptop")
    with pytest.raises(Unauthenticated, match="API key is unknown or was revoked"):
        keys.identity(f"Bearer {key}")


def test_a_key_file_that_cannot_be_read_lets_nobody_in(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "keys.json")
    key = file.create("laptop", "north", Role.READ)
    keys = Keys(file.path)
    file.path.write_text("{")
    with pytest.raises(Unauthenticated, match="nobody is let in"):
        keys.identity(f"Bearer {key}")
    with pytest.raises(FailedPrecondition, match="damaged"):
        Keys(file.path)
    with pytest.raises(FailedPrecondition, match="no key file"):
        Keys(tmp_path / "absent.json")
    with pytest.raises(FailedPrecondition, match="no directory"):
        Keys(None, tmp_path / "absent")


def test_a_memory_in_the_worker_s_own_process_is_for_one_tenant(tmp_path: Path) -> None:
    (tmp_path / "north").write_text("fot_token")
    tenants = Tenants(":memory:", Keys(None, tmp_path))
    with pytest.raises(PermissionDenied, match="one tenant"):
        tenants.client(Identity("north", Role.ADMIN))
    tenants.close()
    alone = Tenants(":memory:", Keys())
    assert list(alone.client(EVERYONE).memories()) == []
    alone.close()


def test_a_renewed_memory_token_is_read_anew(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "tokens.json")
    north = Identity("north", Role.ADMIN)
    old = tokens.create("old", "north", Role.ADMIN)
    (tmp_path / "tenants").mkdir()
    (tmp_path / "tenants" / "north").write_text(old)
    with serving(None, tokens=tokens.path) as target:
        tenants = Tenants(target, Keys(None, tmp_path / "tenants"))
        tokens.revoke("old")
        with pytest.raises(PermissionDenied, match="operator has to renew"):
            tenants.memory(north, "notes")
        (tmp_path / "tenants" / "north").write_text(tokens.create("new", "north", Role.ADMIN))
        with pytest.raises(Exception, match="no collection 'notes'"):
            tenants.memory(north, "notes")
        tenants.close()
