"""Replicas come with the requests and go with them, and no request notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import openai
import pytest
from ray import serve

from model_worker import reference
from model_worker.api.server import Addresses
from model_worker.api.setup import Setup
from model_worker.deployment.gateway import APPLICATION, REPLICA
from model_worker.deployment.serving import Scale, deploy
from tests.deployment.nodes import RayNodes
from tests.model_worker.workers import QUESTION, until, with_key
from tests.ports import own_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SCALE = Scale(1, 2, target_requests=1.0, cpus=0.5, upscale_delay_s=0.5, downscale_delay_s=2.0)
PROMPT = f"{with_key(4711)} {QUESTION}"


@pytest.fixture
def url(ray_cluster: RayNodes) -> Iterator[str]:
    address = f"127.0.0.1:{own_port()}"
    setup = Setup(model=reference.path("reference"), name="reference", target=":memory:", threads=1)
    try:
        deploy(setup, Addresses(address, None), SCALE)
        yield f"http://{address}/v1"
    finally:
        serve.shutdown()


def replicas() -> int:
    """How many serve."""
    return serve.status().applications[APPLICATION].deployments[REPLICA].replica_states.get("RUNNING", 0)


@dataclass
class Askers:
    """Clients that ask one after another, as long as they are wanted."""

    url: str
    answers: set[str] = field(default_factory=set)
    asked: int = 0
    wanted: threading.Event = field(default_factory=threading.Event)

    def ask(self, pause_s: float = 0.0) -> None:
        with openai.OpenAI(base_url=self.url, api_key="none", max_retries=0) as client:
            while self.wanted.is_set():
                told = client.completions.create(model="reference", prompt=PROMPT, max_tokens=40, temperature=0)
                self.answers.add(told.choices[0].text)
                self.asked += 1
                time.sleep(pause_s)


def test_replicas_come_with_the_requests_and_go_with_them_and_no_request_notices(url: str) -> None:
    assert replicas() == 1
    askers = Askers(url)
    askers.wanted.set()
    with ThreadPoolExecutor() as pool:
        try:
            many = [pool.submit(askers.ask) for _ in range(6)]
            until(lambda: replicas() == 2 or any(one.done() for one in many), 120.0)
            asked = askers.asked
            until(lambda: askers.asked > asked + 12 or any(one.done() for one in many), 60.0)
        finally:
            askers.wanted.clear()
        for one in many:
            one.result()
        askers.wanted.set()
        try:
            alone = pool.submit(askers.ask, 0.2)
            until(lambda: replicas() == 1 or alone.done(), 120.0)
            asked = askers.asked
            until(lambda: askers.asked > asked + 5 or alone.done(), 60.0)
        finally:
            askers.wanted.clear()
        alone.result()
    assert len(askers.answers) == 1 and next(iter(askers.answers)).startswith(" 4711")
