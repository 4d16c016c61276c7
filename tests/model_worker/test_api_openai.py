"""The official `openai` client asks; documents come by gRPC; answers tell their sources, and errors are OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from tests.model_worker.workers import QUESTION, Place, placed, reference_parts, until, with_key

NOTES = {"collection": "notes", "top_k": 32}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The reference model, which finds pass keys, with two tenants' documents."""
    with placed(tmp_path_factory.mktemp("place"), *reference_parts()) as made:
        made.create("notes")
        made.put("notes", {"north": with_key(4711), "grass": with_key(4711).partition("\n")[0] * 2})
        made.create("notes", "south")
        made.put("notes", {"south": with_key(12345)}, "south")
        yield made


def ask(place: Place, tenant: str = "north", **given: Any) -> Any:
    body: dict[str, Any] = {"model": "tiny", "prompt": QUESTION, "max_tokens": 5, "temperature": 0}
    memory = given.pop("memory", None)
    extra = None if memory is None else {"memory": memory}
    return place.openai(tenant).completions.create(**body | given, extra_body=extra)


# --- Answers --------------------------------------------------------------------------------------------------------


def test_a_completion_is_drawn_from_documents_and_names_them(place: Place) -> None:
    answer = ask(place, memory=NOTES)
    assert answer.choices[0].text == " 4711" and answer.choices[0].finish_reason == "length"
    prompt = len(place.worker.tokenizer(QUESTION)["input_ids"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 5)
    assert answer.usage.total_tokens == prompt + 5 and answer.usage.prompt_tokens_details.cached_tokens == 0
    memory = answer.model_extra["memory"]
    assert [one["id"] for one in memory["documents"]] == ["north", "grass"]
    assert memory["documents"][0]["share"] > 0.3 and memory["coverage"] == 1 and memory["engine"] == "exact"
    best = memory["passages"][0]
    assert best["document"] == "north" and "The pass key is 4711" in best["text"]
    parts = ("window_share", "session_share", "other_share")
    whole = sum(one["share"] for one in memory["documents"]) + sum(memory[part] for part in parts)
    assert whole == pytest.approx(1, abs=1e-4)


def test_a_streamed_chat_ends_with_usage_and_the_sources(place: Place) -> None:
    stream = place.openai().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        max_completion_tokens=5,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"memory": NOTES},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == " 4711"
    assert [one.choices[0].finish_reason for one in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert len({one.id for one in chunks}) == 1 and all(one.object == "chat.completion.chunk" for one in chunks)
    assert [one.usage is None for one in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 5
    assert chunks[-1].model_extra["memory"]["documents"][0]["id"] == "north"


def test_without_memory_no_document_is_seen_and_none_is_told(place: Place) -> None:
    answer = ask(place)
    assert answer.choices[0].text != " 4711" and "memory" not in (answer.model_extra or {})


def test_the_scope_decides_what_is_seen(place: Place) -> None:
    answer = ask(place, memory=NOTES | {"documents": ["grass"]})
    assert [one["id"] for one in answer.model_extra["memory"]["documents"]] == ["grass"]
    assert answer.choices[0].text != " 4711"


def test_every_tenant_finds_its_own_key(place: Place) -> None:
    assert ask(place, memory=NOTES).choices[0].text == " 4711"
    assert ask(place, "south", max_tokens=6, memory=NOTES).choices[0].text.startswith(" 12345")


def test_a_seed_repeats_a_draw(place: Place) -> None:
    hot = {"temperature": 1.5, "max_tokens": 8}
    assert ask(place, seed=1, **hot).choices[0].text == ask(place, seed=1, **hot).choices[0].text


def test_a_prompt_may_be_token_ids(place: Place) -> None:
    ids = place.worker.tokenizer(QUESTION)["input_ids"]
    assert ask(place, prompt=ids, memory=NOTES).choices[0].text == " 4711"


def test_events_are_framed_as_server_sent_events_are(place: Place) -> None:
    body = {"model": "tiny", "prompt": QUESTION, "max_tokens": 5, "temperature": 0, "stream": True, "memory": NOTES}
    answer = place.http("POST", "/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(one.startswith("data: {") for one in events[:-2])
    chunks = [json.loads(one.removeprefix("data: ")) for one in events[:-2]]
    assert "".join(one["choices"][0]["text"] for one in chunks) == " 4711"
    assert [one["choices"][0]["finish_reason"] for one in chunks][-1] == "length"
    assert ["memory" in one for one in chunks] == [False] * (len(chunks) - 1) + [True]


def test_the_model_is_listed(place: Place) -> None:
    assert [one.id for one in place.openai().models.list()] == ["tiny"]
    assert place.openai().models.retrieve("tiny").owned_by == "fot"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        place.openai().models.retrieve("huge")


# --- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "status", "code", "param"),
    [
        ({"model": "huge"}, 404, "model_not_found", "model"),
        ({"memory": {"collection": "nowhere"}}, 404, "collection_not_found", None),
        ({"memory": NOTES | {"documents": ["absent"]}}, 404, "not_found", None),
        ({"memory": {}}, 400, "missing_required_parameter", "memory.collection"),
        ({"memory": NOTES | {"top": 3}}, 400, "unknown_parameter", "memory.top"),
        ({"memory": NOTES | {"filter": "lang ="}}, 400, "invalid_argument", None),
        ({"memory": NOTES | {"engine": "magic"}}, 400, "invalid_argument", None),
        ({"extra_body": {"flavour": "mint"}}, 400, "unknown_parameter", "flavour"),
        ({"n": 2}, 400, "unsupported_parameter", "n"),
        ({"logprobs": 1}, 400, "unsupported_parameter", "logprobs"),
        ({"temperature": -1}, 400, "invalid_argument", None),
        ({"temperature": "hot"}, 400, "invalid_value", "temperature"),
        ({"max_tokens": 0}, 400, "invalid_argument", "max_tokens"),
        ({"prompt": ""}, 400, "invalid_argument", "prompt"),
        ({"prompt": [10**6]}, 400, "invalid_argument", "prompt"),
        ({"prompt": ["one", "two"]}, 400, "invalid_argument", "prompt"),
        ({"stop": ["a"] * 17}, 400, "invalid_argument", "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_mistake_is_told_in_openai_s_form(
    place: Place, given: dict[str, Any], status: int, code: str, param: str | None, stream: bool
) -> None:
    body = {"model": "tiny", "prompt": QUESTION, "max_tokens": 5, "stream": stream} | given
    body |= body.pop("extra_body", {})
    answer = place.http("POST", "/v1/completions", json=body)
    told = answer.json()["error"]
    assert (answer.status_code, told["code"], told["param"]) == (status, code, param), told
    assert told["type"] == "invalid_request_error" and told["message"]


def test_what_asks_for_nothing_is_taken(place: Place) -> None:
    neutral = {"n": 1, "presence_penalty": 0, "logit_bias": {}, "user": "somebody", "best_of": 1}
    assert ask(place, memory=NOTES, **neutral).choices[0].text == " 4711"


def test_the_client_raises_its_own_errors(place: Place) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        ask(place, "fot_unknown")
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        ask(place, "homeless", memory=NOTES)
    with pytest.raises(openai.BadRequestError):
        ask(place, n=2)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/metrics", "/openapi.json", "/nothing"])
def test_without_a_key_nothing_answers_but_health(place: Place, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer"}, {"authorization": "Basic abc"}, {"authorization": "Bearer x"}):
        for method in ("GET", "POST"):
            answer = place.web.request(method, place.url + path, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert place.web.get(f"{place.url}/health").json() == {"status": "ok"}


def test_what_nobody_serves_is_not_found(place: Place) -> None:
    answer = place.http("GET", "/v1/engines")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_url"
    answer = place.http("GET", "/v1/completions")
    assert answer.status_code == 405 and answer.json()["error"]["type"] == "invalid_request_error"


def test_figures_are_for_prometheus(place: Place) -> None:
    ask(place, memory=NOTES)
    page = place.http("GET", "/metrics", "north-reader").text
    assert 'fot_worker_calls_total{method="http",outcome="200"}' in page
    assert "fot_worker_calls 1\n" in page and 'fot_worker_tokens_total{kind="completion"}' in page


# --- Leaving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_leaves_frees_its_session(place: Place, stream: bool) -> None:
    body = {"model": "tiny", "prompt": with_key(1) * 8, "max_tokens": 4000, "stream": stream, "memory": NOTES}
    assert place.sessions() == 0
    headers = {"authorization": f"Bearer {place.keys['north']}"}
    with httpx2.Client(timeout=30) as client:
        if stream:
            with client.stream("POST", f"{place.url}/v1/completions", json=body, headers=headers) as answer:
                next(answer.iter_lines())
                assert place.sessions() == 1
        else:
            with pytest.raises(httpx2.ReadTimeout):
                client.post(f"{place.url}/v1/completions", json=body, headers=headers, timeout=1.0)
    until(lambda: place.sessions() == 0)
    until(lambda: place.server.traffic.calls == 0)
