"""model_worker.v1: documents in, each once; answers out with their sources; tenants apart; errors with details."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from memory_service.errors import (
    FotError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
)
from memory_service.wire.statuses import read_error
from model_worker.api.limits import Limits
from model_worker.api.policy import POLICY, SERVICE
from model_worker.v1 import model_worker_pb2 as pb
from tests.model_worker.workers import (
    QUESTION,
    Place,
    placed,
    reference_parts,
    text_of,
    until,
    with_key,
)

NODE = Path(__file__).parents[1] / "deployment" / "node_client.mjs"
LOOK = pb.Look(collection="notes", top_k=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    limits = Limits(new_tokens=4000, document_bytes=100_000)
    with placed(tmp_path_factory.mktemp("place"), *reference_parts(), limits) as made:
        made.create("notes")
        made.put("notes", {"key": with_key(4711)})
        yield made


def refused(call: grpc.RpcError) -> FotError:
    """The error that ended a call, as its details tell it."""
    return read_error(call)


def generate(place: Place, tenant: str = "north", **given: object) -> list[pb.GenerateResponse]:
    request = pb.GenerateRequest(**{"prompt": QUESTION, "options": pb.Options(max_new_tokens=5), "look": LOOK} | given)
    return list(place.stub.Generate(request, metadata=place.bearer(tenant), timeout=30))


# --- Documents ------------------------------------------------------------------------------------------------------


def test_documents_are_stored_once_by_id_and_content(place: Place) -> None:
    place.create("once")
    texts = {"a": "The grass is green.", "b": "The sky is blue."}
    first = place.put("once", texts)
    assert (first.added, first.replaced, first.unchanged) == (2, 0, 0) and first.tokens > 0
    again = place.put("once", texts)
    assert (again.added, again.replaced, again.unchanged, again.tokens) == (0, 0, 2, 0)
    changed = place.put("once", texts | {"b": "The sky is grey."})
    assert (changed.added, changed.replaced, changed.unchanged) == (0, 1, 1)
    listed = place.stub.ListDocuments(pb.ListDocumentsRequest(collection="once"), metadata=place.bearer())
    assert [one.id for one in listed.documents] == ["a", "b"]
    lengths = [len(place.worker.tokenizer(text)["input_ids"]) for text in ("The grass is green.", "The sky is grey.")]
    assert [one.tokens for one in listed.documents] == lengths


def test_a_document_is_seen_as_soon_as_it_is_put(place: Place) -> None:
    place.create("fresh")
    place.put("fresh", {"key": with_key(31337)})
    events = generate(place, look=pb.Look(collection="fresh", top_k=32), options=pb.Options(max_new_tokens=6))
    assert text_of(events) == " 31337"
    with place.memory() as client:
        assert client.memory("fresh").get("key").metadata["fot.tokenizer"]


def test_a_long_text_comes_in_parts(place: Place) -> None:
    place.create("parts")
    whole = with_key(99)
    parts = [whole[first : first + 300] for first in range(0, len(whole), 300)]
    messages = [
        pb.PutDocumentsRequest(
            collection="parts",
            id="long",
            text=part,
            more=number < len(parts) - 1,
            metadata={"lang": pb.Scalar(text="en"), "year": pb.Scalar(integer=2023), "open": pb.Scalar(flag=True)},
        )
        for number, part in enumerate(parts)
    ]
    place.stub.PutDocuments(iter(messages), metadata=place.bearer())
    got = place.stub.GetDocument(pb.GetDocumentRequest(collection="parts", id="long"), metadata=place.bearer()).document
    assert got.tokens == len(place.worker.tokenizer(whole)["input_ids"])
    assert got.metadata["year"].integer == 2023 and got.metadata["open"].flag and got.metadata["lang"].text == "en"
    look = pb.Look(collection="parts", top_k=32, filter="lang = en and year > 2000")
    assert text_of(generate(place, look=look)).startswith(" 99")


def test_deleting_tells_what_was_not_there(place: Place) -> None:
    place.create("going")
    place.put("going", {"a": "one", "b": "two"})
    request = pb.DeleteDocumentsRequest(collection="going", ids=["a", "c"])
    answer = place.stub.DeleteDocuments(request, metadata=place.bearer())
    assert answer.deleted == 1 and list(answer.not_found) == ["c"]
    listed = place.stub.ListDocuments(pb.ListDocumentsRequest(collection="going"), metadata=place.bearer())
    assert [one.id for one in listed.documents] == ["b"]


def test_pages_follow_one_another(place: Place) -> None:
    place.create("pages")
    place.put("pages", {f"doc-{number}": f"Text {number}." for number in range(5)})
    names, token = [], ""
    for _ in range(3):
        request = pb.ListDocumentsRequest(collection="pages", page_size=2, page_token=token)
        page = place.stub.ListDocuments(request, metadata=place.bearer())
        names += [one.id for one in page.documents]
        token = page.next_page_token
    assert names == [f"doc-{number}" for number in range(5)] and token == ""


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([pb.PutDocumentsRequest(collection="nowhere", id="a", text="a")], NotFound),
        ([pb.PutDocumentsRequest(id="a", text="a")], InvalidArgument),
        ([pb.PutDocumentsRequest(collection="notes", id="", text="a")], InvalidArgument),
        ([pb.PutDocumentsRequest(collection="notes", id="a", text="a", more=True)], InvalidArgument),
        (
            [pb.PutDocumentsRequest(collection="notes", id="a", metadata={"fot.x": pb.Scalar(flag=True)})],
            InvalidArgument,
        ),
        ([pb.PutDocumentsRequest(collection="notes", id="a", metadata={"x": pb.Scalar()})], InvalidArgument),
        ([pb.PutDocumentsRequest(collection="notes", id="a", text="a" * 100_001)], InvalidArgument),
        ([pb.PutDocumentsRequest(collection="notes", id="a", text="a" * (9 << 20))], ResourceExhausted),
    ],
    ids=["nowhere", "no collection", "no id", "half", "reserved", "empty value", "long", "huge message"],
)
def test_documents_that_cannot_be_are_refused(
    place: Place, messages: list[pb.PutDocumentsRequest], error: type[FotError]
) -> None:
    with pytest.raises(grpc.RpcError) as told:
        place.stub.PutDocuments(iter(messages), metadata=place.bearer())
    assert type(refused(told.value)) is error
    listed = place.stub.ListDocuments(pb.ListDocumentsRequest(collection="notes"), metadata=place.bearer())
    assert [one.id for one in listed.documents] == ["key"]


# --- Answers --------------------------------------------------------------------------------------------------------


def test_an_answer_streams_and_ends_with_usage_and_sources(place: Place) -> None:
    events = generate(place)
    assert text_of(events) == " 4711"
    assert [one.WhichOneof("event") for one in events] == ["text"] * (len(events) - 1) + ["finished"]
    finished = events[-1].finished
    assert finished.reason == pb.FINISH_REASON_LENGTH and finished.completion_tokens == 5
    assert finished.prompt_tokens == len(place.worker.tokenizer(QUESTION)["input_ids"])
    (source,) = finished.sources.documents
    assert source.id == "key" and source.share > 0.3 and finished.sources.coverage == 1
    assert "The pass key is 4711" in source.passages[0].text


def test_a_text_of_stop_ends_the_answer_and_is_no_part_of_it(place: Place) -> None:
    events = generate(place, options=pb.Options(max_new_tokens=20, stop=["11"]))
    assert text_of(events) == " 47" and events[-1].finished.reason == pb.FINISH_REASON_STOP


def test_a_chat_is_written_by_the_template(place: Place) -> None:
    request = pb.ChatRequest(
        messages=[pb.Message(role="user", content=QUESTION)], options=pb.Options(max_new_tokens=5), look=LOOK
    )
    assert text_of(list(place.stub.Chat(request, metadata=place.bearer()))) == " 4711"


def test_a_conversation_goes_on_from_what_was_read(place: Place) -> None:
    first = generate(place, prompt=with_key(1234) + QUESTION, look=None, conversation="talk")
    assert first[-1].finished.cached_tokens == 0
    longer = with_key(1234) + QUESTION + text_of(first) + " And again: " + QUESTION
    second = generate(place, prompt=longer, look=None, conversation="talk")
    assert second[-1].finished.cached_tokens > first[-1].finished.prompt_tokens // 2
    # Another tenant's conversation of that name is another one.
    assert generate(place, "south", prompt=longer, look=None, conversation="talk")[-1].finished.cached_tokens == 0


def test_answers_are_the_same_while_documents_are_encoded(place: Place) -> None:
    place.create("busy")
    texts = {f"doc-{number}": with_key(number) * 4 for number in range(24)}
    putting = threading.Thread(target=place.put, args=("busy", texts))
    putting.start()
    answers = [text_of(generate(place))]
    while putting.is_alive():
        answers.append(text_of(generate(place)))
    putting.join()
    assert set(answers) == {" 4711"}


def test_what_answers_says_what_it_is(place: Place) -> None:
    told = place.stub.GetModel(pb.GetModelRequest(), metadata=place.bearer())
    assert (told.id, list(told.memory_layers), told.window, told.chat, told.most_new_tokens) == (
        "tiny", [3], 256, True, 4000,
    )  # fmt: skip


def test_a_client_that_cancels_frees_its_session(place: Place) -> None:
    request = pb.GenerateRequest(prompt=with_key(1) * 8, options=pb.Options(max_new_tokens=4000), look=LOOK)
    call = place.stub.Generate(request, metadata=place.bearer())
    next(iter(call))
    assert place.sessions() == 1
    call.cancel()
    until(lambda: place.sessions() == 0)
    until(lambda: place.server.traffic.calls == 0)


def test_a_deadline_frees_the_session(place: Place) -> None:
    request = pb.GenerateRequest(prompt=with_key(1) * 8, options=pb.Options(max_new_tokens=4000), look=LOOK)
    with pytest.raises(grpc.RpcError) as told:
        list(place.stub.Generate(request, metadata=place.bearer(), timeout=0.7))
    assert told.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: place.sessions() == 0)


# --- Who calls ------------------------------------------------------------------------------------------------------


def requests_of(rpc: str) -> object:
    """The smallest request of an rpc."""
    return iter([pb.PutDocumentsRequest()]) if rpc == "PutDocuments" else getattr(pb, f"{rpc}Request")()


def ended(call: object) -> None:
    """Wait for the end of a call that streams its answer."""
    if hasattr(call, "code") and hasattr(call, "__iter__"):
        list(call)  # type: ignore[call-overload]


@pytest.mark.parametrize("rpc", [*POLICY])
@pytest.mark.parametrize("authorization", [None, "Bearer fot_unknown", "Basic abc"])
def test_without_a_key_no_rpc_answers(place: Place, rpc: str, authorization: str | None) -> None:
    metadata = () if authorization is None else (("authorization", authorization),)
    with pytest.raises(grpc.RpcError) as told:
        ended(getattr(place.stub, rpc)(requests_of(rpc), metadata=metadata))
    assert isinstance(refused(told.value), Unauthenticated)


@pytest.mark.parametrize("rpc", ["CreateCollection", "PutDocuments", "DeleteDocuments"])
def test_a_reader_s_key_changes_nothing(place: Place, rpc: str) -> None:
    with pytest.raises(grpc.RpcError) as told:
        ended(getattr(place.stub, rpc)(requests_of(rpc), metadata=place.bearer("north-reader")))
    assert isinstance(refused(told.value), PermissionDenied)


def test_every_rpc_has_a_rule() -> None:
    assert set(POLICY) == {one.name for one in pb.DESCRIPTOR.services_by_name["ModelWorker"].methods}


def test_another_tenant_s_collection_is_not_found(place: Place) -> None:
    for tenant, error in (("south", NotFound), ("homeless", PermissionDenied)):
        with pytest.raises(grpc.RpcError) as told:
            generate(place, tenant)
        assert type(refused(told.value)) is error
        with pytest.raises(grpc.RpcError) as told:
            place.put("notes", {"x": "x"}, tenant)
        assert type(refused(told.value)) is error
        for rpc in ("ListDocuments", "GetDocument", "DeleteDocuments"):
            request = getattr(pb, f"{rpc}Request")(collection="notes")
            with pytest.raises(grpc.RpcError) as told:
                getattr(place.stub, rpc)(request, metadata=place.bearer(tenant))
            assert type(refused(told.value)) is error


def test_a_wrong_request_names_its_field(place: Place) -> None:
    with pytest.raises(grpc.RpcError) as told:
        generate(place, options=pb.Options(max_new_tokens=4001))
    error = refused(told.value)
    assert isinstance(error, InvalidArgument) and error.metadata["field"] == "max_tokens"
    with pytest.raises(grpc.RpcError) as told:
        generate(place, model="huge")
    assert refused(told.value).code == "MODEL_NOT_FOUND"


def test_health_needs_no_key_and_reflection_does(place: Place) -> None:
    health = health_pb2_grpc.HealthStub(place.channel)
    answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    reflection = reflection_pb2_grpc.ServerReflectionStub(place.channel)
    with pytest.raises(grpc.RpcError) as told:
        list(reflection.ServerReflectionInfo(iter([ask])))
    assert isinstance(refused(told.value), Unauthenticated)
    (listed,) = reflection.ServerReflectionInfo(iter([ask]), metadata=place.bearer())
    assert SERVICE in [one.name for one in listed.list_services_response.service]


# --- Another language -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node on this machine")
def test_a_node_client_sends_documents_and_streams_an_answer_with_its_sources(place: Place) -> None:
    given = [place.server.grpc, place.keys["north"], "from-node", with_key(2024), QUESTION]
    done = subprocess.run(["node", NODE, *given], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["added"] == 1 and "".join(told["pieces"]) == " 2024" and len(told["pieces"]) > 1
    assert told["finished"]["completion_tokens"] == 5
    assert told["finished"]["documents"][0]["id"] == "from-node"
    assert told["finished"]["documents"][0]["share"] > 0.3
    assert told["refused"] == {"status": 16, "message": told["refused"]["message"]}
