"""A batcher over memories of a service: the same texts, sessions freed, and a service that goes away fails its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from memory_service import Memory, SessionExpired
from memory_service.errors import FotError
from memory_service.server.server import running
from memory_service.settings import ServerSettings, StoreOptions
from memory_service.store.store import Store
from model_worker.decoder.fitting import spec_of
from model_worker.decoder.model import FotModel
from model_worker.serving.batcher import Batcher
from model_worker.serving.requests import Request
from model_worker.settings import Recall
from tests.model_worker.test_serving import FOT, Heard, alone_after, plant, prompts, submitted, until
from tests.model_worker.tiny import byte_tokenizer, tiny_model


@pytest.fixture
def served() -> Iterator[tuple[FotModel, Memory, ExitStack]]:
    """A model with a memory of a service, another memory of that service, and what stops the service."""
    base = tiny_model("llama")
    spec = spec_of(base, FOT)
    with ExitStack() as closing:
        service = closing.enter_context(ExitStack())
        store = service.enter_context(Store.open(None, StoreOptions(background=False)))
        target = f"grpc://{service.enter_context(running(store, ServerSettings(listen='127.0.0.1:0')))}"
        mine, other = (closing.enter_context(Memory.open(target, name, spec)) for name in ("mine", "other"))
        plant(mine, 3)
        plant(other, 9)
        base.generation_config.eos_token_id = None  # What should be under way is, however slow the machine.
        yield closing.enter_context(FotModel(base, FOT, mine)), other, service


def test_rows_of_two_memories_of_a_service_get_what_they_would_get_alone(
    served: tuple[FotModel, Memory, ExitStack],
) -> None:
    model, other, _ = served
    tokenizer, top = byte_tokenizer(), Recall(top_k=8)
    requests = [Request(ids, 15, recall=top) for ids in prompts(5, 20, 90)]
    with Batcher(model, tokenizer) as batcher:
        heard = submitted(batcher, [*requests, Request(prompts(20)[0], 15, recall=top, memory=other)])
        texts = [one.text for one in heard]
        assert texts[3] != texts[1]
        for request, text in zip(requests, texts, strict=False):
            assert text == alone_after(batcher, model, tokenizer, request).text
        assert model.memory is not None and model.memory.stats().sessions == other.stats().sessions == 0


def test_a_session_lost_at_the_service_fails_its_row_only(served: tuple[FotModel, Memory, ExitStack]) -> None:
    model, _, _ = served
    with Batcher(model, byte_tokenizer()) as batcher:
        lost, kept = submitted(batcher, [Request(prompts(150)[0], 4000), Request(prompts(5)[0], 30)])
        lost.begun.wait(60)
        kept.begun.wait(60)
        until(lambda: any(line.row.stretches for line in batcher._writing.lines))  # It joins after its first text.
        next(line for line in batcher._writing.lines if line.row.stretches).row.stretches[0].session.close()
        assert isinstance(lost.error, SessionExpired)
        assert kept.finished.completion_tokens == 30


def test_a_service_that_goes_away_fails_the_rows_that_need_it(served: tuple[FotModel, Memory, ExitStack]) -> None:
    model, _, service = served
    with Batcher(model, byte_tokenizer()) as batcher:
        (one,) = submitted(batcher, [Request(prompts(5)[0], 4000, recall=Recall(timeout_s=2.0))])
        one.begun.wait(60)
        service.close()
        assert isinstance(one.error, FotError)
        late = Heard()
        batcher.submit(Request(prompts(5)[0], 4, recall=Recall(timeout_s=1.0)), late)
        assert isinstance(late.error, FotError)
