"""The API on Ray Serve: the same answers, whichever replica gives them, and the same refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx2
import openai
import pytest
from ray import serve

from memory_service import Client, InvalidArgument
from memory_service.errors import NotFound, Unauthenticated
from memory_service.server.auth import TokenFile
from memory_service.types.callers import Role
from memory_service.wire.statuses import read_error
from model_worker import reference
from model_worker.api.server import Addresses
from model_worker.api.setup import Setup
from model_worker.deployment.serving import Scale, build, build_grpc, deploy, remove
from model_worker.v1 import model_worker_pb2 as pb
from model_worker.v1 import model_worker_pb2_grpc as pb_grpc
from tests.deployment.nodes import RayNodes
from tests.memory_service.places import serving
from tests.model_worker.workers import PLAIN_TEMPLATE, QUESTION, text_of, until, with_key
from tests.ports import own_port

pytestmark = pytest.mark.timeout(900)  # Three processes import torch first.
LOOK = pb.Look(collection="notes", top_k=32)


class Cloud:
    """Two replicas, a gateway and a memory service of two tenants."""

    def __init__(self, directory: Path, closing: ExitStack):
        self.clients: dict[str, openai.OpenAI] = {}
        self._closing = closing
        keys, tokens = TokenFile(directory / "keys.json"), TokenFile(directory / "tokens.json")
        (directory / "memory-tokens").mkdir()
        self.keys = {tenant: keys.create(tenant, tenant, Role.ADMIN) for tenant in ("north", "south")}
        self.tokens = {tenant: tokens.create(tenant, tenant, Role.ADMIN) for tenant in self.keys}
        for tenant, token in self.tokens.items():
            (directory / "memory-tokens" / tenant).write_text(token)
        self.memory = closing.enter_context(serving(None, tokens=tokens.path))
        setup = Setup(
            model=reference.path("reference"),
            name="reference",
            target=self.memory,
            keys=keys.path,
            memory_tokens=directory / "memory-tokens",
            chat_template=PLAIN_TEMPLATE,
            threads=1,
        )
        port = own_port()
        closing.callback(serve.shutdown)
        listening = deploy(setup, Addresses(f"127.0.0.1:{port}", "127.0.0.1:0"), Scale(replicas=2, cpus=0.5))
        self.url = f"http://127.0.0.1:{port}"
        channel = closing.enter_context(grpc.insecure_channel(str(listening)))
        self.stub = pb_grpc.ModelWorkerStub(channel)

    def bearer(self, tenant: str = "north") -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.keys.get(tenant, tenant)}"),)

    def openai(self, tenant: str = "north") -> openai.OpenAI:
        """The official client."""
        if tenant not in self.clients:
            key = self.keys.get(tenant, tenant)
            self.clients[tenant] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
            self._closing.callback(self.clients[tenant].close)
        return self.clients[tenant]

    def generate(self, tenant: str = "north", **given: Any) -> list[pb.GenerateResponse]:
        request = pb.GenerateRequest(**{"prompt": QUESTION, "options": pb.Options(max_new_tokens=5)} | given)
        return list(self.stub.Generate(request, metadata=self.bearer(tenant), timeout=60))

    def sessions(self) -> int:
        with Client.open(self.memory, token=self.tokens["north"]) as client:
            return client.stats().sessions


@pytest.fixture(scope="module")
def cloud(ray_cluster: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with ExitStack() as closing:
        made = Cloud(tmp_path_factory.mktemp("cloud"), closing)
        made.stub.CreateCollection(pb.CreateCollectionRequest(name="notes"), metadata=made.bearer())
        documents = {"key": with_key(4711), "other": "The sky is blue."}
        messages = [
            pb.PutDocumentsRequest(collection="notes" if first else "", id=name, text=text)
            for first, (name, text) in zip((True, False), documents.items(), strict=True)
        ]
        told = made.stub.PutDocuments(iter(messages), metadata=made.bearer())
        assert (told.added, told.unchanged) == (2, 0)
        yield made


def test_documents_are_asked_by_the_openai_client_with_attribution(cloud: Cloud) -> None:
    chunks = list(
        cloud.openai().chat.completions.create(
            model="reference",
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=5,
            temperature=0,
            stream=True,
            extra_body={"memory": {"collection": "notes", "top_k": 32}},
        )
    )
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == " 4711" and len(chunks) > 3
    assert (chunks[-1].model_extra or {})["memory"]["documents"][0]["id"] == "key"


def test_documents_are_asked_by_grpc_with_attribution(cloud: Cloud) -> None:
    events = cloud.generate(look=LOOK)
    assert text_of(events) == " 4711" and events[-1].finished.sources.documents[0].id == "key"


def test_replicas_answer_alike(cloud: Cloud) -> None:
    assert {text_of(cloud.generate(look=LOOK)) for _ in range(6)} == {" 4711"}


def test_conversations_stay_with_their_replicas(cloud: Cloud) -> None:
    prompt, client, cached = with_key(7), cloud.openai(), []
    for name in ("one", "two", "three", "four", "five"):
        answer = text_of(cloud.generate(prompt=prompt, conversation=name))
        longer = cloud.generate(prompt=f"{prompt}{answer} {QUESTION}", conversation=name)
        cached.append(longer[-1].finished.cached_tokens)
        # Over HTTP the client names the session to Serve's proxy.
        asked: dict[str, Any] = {
            "model": "reference",
            "max_tokens": 2,
            "temperature": 0,
            "extra_body": {"prompt_cache_key": name},
            "extra_headers": {"x-session-id": name},
        }
        first = client.completions.create(prompt=prompt, **asked)
        second = client.completions.create(prompt=f"{prompt}{first.choices[0].text} {QUESTION}", **asked)
        assert second.usage is not None and second.usage.prompt_tokens_details is not None
        cached.append(second.usage.prompt_tokens_details.cached_tokens or 0)
    # Serve asks another replica if one does not say in time how busy it is. By chance half of them would stay.
    assert sum(one > 100 for one in cached) >= 9, cached


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_a_client_that_leaves_frees_its_session(cloud: Cloud, over: str) -> None:
    assert cloud.sessions() == 0
    if over == "grpc":
        request = pb.GenerateRequest(prompt=with_key(1) * 6, options=pb.Options(max_new_tokens=4000), look=LOOK)
        call = cloud.stub.Generate(request, metadata=cloud.bearer())
        next(iter(call))
        assert cloud.sessions() == 1
        call.cancel()
    else:
        stream = cloud.openai().completions.create(
            model="reference",
            prompt=with_key(1) * 6,
            max_tokens=4000,
            stream=True,
            extra_body={"memory": {"collection": "notes", "top_k": 32}},
        )
        next(iter(stream))
        assert cloud.sessions() == 1
        stream.close()
    until(lambda: cloud.sessions() == 0)


def test_without_a_key_nothing_answers_but_health(cloud: Cloud) -> None:
    for path in ("/v1/models", "/v1/completions", "/metrics"):
        assert httpx2.get(cloud.url + path).status_code == 401
    assert httpx2.get(f"{cloud.url}/health").status_code == 200
    with pytest.raises(grpc.RpcError) as told:
        cloud.generate("fot_unknown")
    assert isinstance(read_error(told.value), Unauthenticated)


def test_another_tenant_s_collection_is_not_found(cloud: Cloud) -> None:
    with pytest.raises(grpc.RpcError) as told:
        cloud.generate("south", look=LOOK)
    error = read_error(told.value)
    assert isinstance(error, NotFound) and error.code == "COLLECTION_NOT_FOUND"
    with pytest.raises(openai.NotFoundError) as refused:
        cloud.openai("south").completions.create(
            model="reference", prompt=QUESTION, extra_body={"memory": {"collection": "notes"}}
        )
    assert refused.value.code == "collection_not_found"


def test_configuration_files_name_the_same_fields() -> None:
    args = {"model": "reference", "target": "grpc://127.0.0.1:7070", "scale": {"replicas": 2, "most_replicas": 4}}
    assert build(args) is not None and build_grpc(args) is not None
    with pytest.raises(InvalidArgument, match="there is no modle"):
        build(args | {"modle": "reference"})
    with pytest.raises(InvalidArgument, match="can be reached from other machines"):
        build_grpc(args | {"addresses": {"grpc": "0.0.0.0:50051"}})


def test_taken_down_nothing_answers(cloud: Cloud) -> None:
    remove()
    assert serve.status().applications == {}
