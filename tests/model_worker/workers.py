"""A worker with its servers over a memory service with two tenants, in this process: real keys and sockets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import httpx2
import openai
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_service import Client, Memory
from memory_service.server.auth import TokenFile
from memory_service.types.callers import Role
from model_worker import reference
from model_worker.api.keys import Keys
from model_worker.api.limits import Limits
from model_worker.api.process import running
from model_worker.api.server import Addresses, Server
from model_worker.api.tenants import Tenants
from model_worker.api.worker import Worker
from model_worker.cli.opening import load_tokenizer
from model_worker.decoder.fitting import spec_of
from model_worker.decoder.model import FotModel
from model_worker.serving.batcher import Batcher
from model_worker.settings import FotConfig
from model_worker.tasks.landmark import FILLER
from model_worker.v1 import model_worker_pb2 as pb
from model_worker.v1 import model_worker_pb2_grpc as pb_grpc
from tests.memory_service.places import serving

TENANTS = ("north", "south")
QUESTION = "What is the pass key? The pass key is"
PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def with_key(key: int) -> str:
    """A text that hides a pass key."""
    return f"{FILLER} " * 6 + f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n" + f"{FILLER} " * 6


@dataclass(frozen=True)
class Place:
    """A worker that is served, and how to reach it and the memory behind it."""

    server: Server
    worker: Worker
    memory_target: str
    keys: Mapping[str, str]  # API keys, by "tenant" (an admin's) and "tenant-reader".
    memory_tokens: Mapping[str, str]  # By tenant.
    clients: dict[str, openai.OpenAI] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://{self.server.http}"

    def openai(self, tenant: str = "north") -> openai.OpenAI:
        """The official client."""
        if tenant not in self.clients:
            self.clients[tenant] = openai.OpenAI(
                base_url=f"{self.url}/v1", api_key=self.keys.get(tenant, tenant), max_retries=0
            )
        return self.clients[tenant]

    @cached_property
    def channel(self) -> grpc.Channel:
        assert self.server.grpc is not None
        return grpc.insecure_channel(self.server.grpc)

    @property
    def stub(self) -> pb_grpc.ModelWorkerStub:
        return pb_grpc.ModelWorkerStub(self.channel)

    def bearer(self, tenant: str = "north") -> tuple[tuple[str, str], ...]:
        """Metadata of a call."""
        return (("authorization", f"Bearer {self.keys.get(tenant, tenant)}"),)

    def http(self, method: str, path: str, tenant: str = "north", **given: Any) -> httpx2.Response:
        """A bare request with a key."""
        headers = {"authorization": f"Bearer {self.keys.get(tenant, tenant)}"}
        return self.web.request(method, self.url + path, headers=headers, timeout=30, **given)

    @cached_property
    def web(self) -> httpx2.Client:
        return httpx2.Client()

    def close(self) -> None:
        """Hang up."""
        self.channel.close()
        self.web.close()
        for client in self.clients.values():
            client.close()

    def create(self, collection: str, tenant: str = "north") -> None:
        """A collection, by gRPC."""
        self.stub.CreateCollection(pb.CreateCollectionRequest(name=collection), metadata=self.bearer(tenant))

    def put(self, collection: str, texts: Mapping[str, str], tenant: str = "north") -> pb.PutDocumentsResponse:
        """Documents, by gRPC; committed on return."""
        messages = [pb.PutDocumentsRequest(collection=collection, id=name, text=text) for name, text in texts.items()]
        return self.stub.PutDocuments(iter(messages), metadata=self.bearer(tenant), timeout=60)

    @contextmanager
    def memory(self, tenant: str = "north") -> Iterator[Client]:
        """The memory service as the tenant's token sees it."""
        with Client.open(self.memory_target, token=self.memory_tokens[tenant]) as client:
            yield client

    def sessions(self, tenant: str = "north") -> int:
        """Sessions the memory service holds for a tenant."""
        with self.memory(tenant) as client:
            return client.stats().sessions


def reference_parts() -> tuple[PreTrainedModel, FotConfig, PreTrainedTokenizerBase]:
    """The model that comes along and finds pass keys; its chats are their texts, one after the other."""
    path = reference.path("reference")
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template = PLAIN_TEMPLATE
    with FotModel.from_pretrained(path) as loaded:
        return loaded.detach(), loaded.fot, tokenizer


@contextmanager
def placed(
    directory: Path,
    base: PreTrainedModel,
    fot: FotConfig,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits | None = None,
) -> Iterator[Place]:
    """A served worker called "tiny"; everything ends with the block."""
    api_keys, tokens = TokenFile(directory / "keys.json"), TokenFile(directory / "tokens.json")
    (directory / "memory-tokens").mkdir()
    keys, memory_tokens = {}, {}
    for tenant in TENANTS:
        keys[tenant] = api_keys.create(tenant, tenant, Role.ADMIN)
        keys[f"{tenant}-reader"] = api_keys.create(f"{tenant}-reader", tenant, Role.READ)
        memory_tokens[tenant] = tokens.create(tenant, tenant, Role.ADMIN)
        (directory / "memory-tokens" / tenant).write_text(memory_tokens[tenant])
    keys["homeless"] = api_keys.create("homeless", "homeless", Role.ADMIN)
    with ExitStack() as closing:
        target = closing.enter_context(serving(None, tokens=tokens.path))
        accepted = Keys(api_keys.path, directory / "memory-tokens")
        own = closing.enter_context(Memory.open(":memory:", spec=spec_of(base, fot)))
        model = closing.enter_context(FotModel(base, fot, own))
        tenants = Tenants(target, accepted)
        closing.callback(tenants.close)  # After the batcher has closed its sessions there.
        batcher = closing.enter_context(Batcher(model, tokenizer))
        worker = Worker("tiny", model, tokenizer, batcher, tenants, limits)
        closing.callback(worker.close)
        addresses = Addresses("127.0.0.1:0", "127.0.0.1:0", drain_grace_s=1.0)
        server = closing.enter_context(running(worker, accepted, addresses))
        place = Place(server, worker, target, keys, memory_tokens)
        closing.callback(place.close)
        yield place


def until(truth: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < end, "it did not become true in time"
        time.sleep(0.02)


def text_of(events: Sequence[Any]) -> str:
    """The text of gRPC's pieces."""
    return "".join(event.text for event in events if event.WhichOneof("event") == "text")
