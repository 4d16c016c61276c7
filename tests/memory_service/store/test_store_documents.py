"""What every verb of documents does, uploads too."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_service import verbs
from memory_service.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    WrongModel,
)
from memory_service.store.store import Store
from memory_service.types.callers import Identity
from memory_service.types.conditions import Compare, Condition
from memory_service.types.documents import Document
from memory_service.types.operations import OperationKind
from memory_service.types.questions import AttendGroup
from memory_service.types.scopes import Scope
from tests.memory_service.oracle import (
    ME,
    MODEL,
    attend,
    document,
    error,
    finish,
    names,
    put,
    reference,
    refused,
    tensors,
)
from tests.memory_service.store.given import OPTIONS, OTHER, QUERIES, SPEC, A, B, begin, chunks, ids, zeros

# --- Documents ------------------------------------------------------------------------------------------------------


def test_a_document_is_stored_whole(store: Store) -> None:
    info = put(store, "m", A)
    assert (info.id, info.tokens, dict(info.metadata), info.generation) == ("a", 5, {"n": 1, "kind": "x"}, 1)
    assert store.run(ME, verbs.GetDocument("m", "a")) == info
    for layer, place in ((3, 0), (7, 1)):
        got = store.run(ME, verbs.Fetch("m", "a", layer, 1, 100))
        assert (got.first_token, got.token_ids.tolist()) == (1, [101, 102, 103, 104])
        assert torch.equal(got.keys, A.keys[place, :, 1:])
        assert torch.equal(got.values, A.values[place, :, 1:])


def test_token_ids_left_out_are_zeros(store: Store) -> None:
    put(store, "m", replace(A, token_ids=None))
    assert store.run(ME, verbs.Fetch("m", "a", 3, 0, 5)).token_ids.tolist() == [0] * 5


def test_what_was_stored_does_not_change_with_the_callers_tensors(store: Store) -> None:
    mine = document("mine", 5, SPEC, "mine")
    put(store, "m", mine)
    kept = mine.keys.clone()
    mine.keys.zero_()
    assert torch.equal(store.run(ME, verbs.Fetch("m", "mine", 3, 0, 5)).keys, kept[0])


def test_a_document_of_views_is_stored_as_it_reads(store: Store) -> None:
    keys, values = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors(SPEC, 9, 1))
    put(store, "m", Document("view", keys[:, :, 2:7], values[:, :, 2:7], torch.arange(9)[2:7]))
    got = store.run(ME, verbs.Fetch("m", "view", 7, 0, 5))
    assert torch.equal(got.keys, keys[1, :, 2:7])
    assert got.token_ids.tolist() == [2, 3, 4, 5, 6]


def test_an_id_in_use_fails_unless_it_is_to_be_replaced(store: Store) -> None:
    put(store, "m", A)
    assert isinstance(refused(store, verbs.PutDocument("m", A, MODEL)), AlreadyExists)
    info = put(store, "m", replace(B, id="a"), replacing=True)
    assert (info.tokens, info.generation) == (7, 2)
    assert store.run(ME, verbs.GetMemory("m")).tokens == 7
    assert torch.equal(store.run(ME, verbs.Fetch("m", "a", 3, 0, 7)).keys, B.keys[0])


def test_the_same_request_id_commits_once(store: Store) -> None:
    first = put(store, "m", A, request_id="r")
    store.run(ME, verbs.DeleteDocument("m", "a"))
    assert put(store, "m", A, request_id="r") == first
    assert ids(store) == []


def test_a_request_id_used_for_something_else_is_refused(store: Store) -> None:
    put(store, "m", A, request_id="r")
    for other in (
        verbs.PutDocument("m", B, MODEL, request_id="r"),
        verbs.DeleteDocument("m", "a", request_id="r"),
        begin(B, request_id="r"),
    ):
        found = refused(store, other)
        assert isinstance(found, InvalidArgument)
        assert "make a new one" in found.message


def test_two_tenants_may_use_the_same_names_and_request_ids(store: Store) -> None:
    store.run(OTHER, verbs.CreateMemory("m", SPEC))
    put(store, "m", A, request_id="r")
    store.run(OTHER, verbs.PutDocument("m", replace(B, id="a"), MODEL, request_id="r"))
    assert store.run(OTHER, verbs.GetDocument("m", "a")).tokens == 7
    store.run(OTHER, verbs.DeleteMemory("m"))
    assert store.run(ME, verbs.GetDocument("m", "a")).tokens == 5


def test_another_tenants_things_are_simply_not_there(store: Store) -> None:
    put(store, "m", A)
    upload = store.run(ME, begin(B)).id
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    operation = finish(store, "m", OperationKind.COMPACT).id
    assert isinstance(_refused_to(store, OTHER, verbs.GetMemory("m")), NotFound)
    store.run(OTHER, verbs.CreateMemory("m", SPEC))
    for verb in (
        verbs.GetDocument("m", "a"),
        verbs.GetUpload("m", upload),
        verbs.CommitUpload("m", upload),
        verbs.RenewSession("m", session),
        verbs.Attend("m", 3, (AttendGroup(Scope.session(session), QUERIES),)),
        verbs.Fetch("m", f"session:{session}", 3),
        verbs.GetOperation(operation),
        verbs.CancelOperation(operation),
    ):
        assert isinstance(_refused_to(store, OTHER, verb), NotFound), verb
    store.run(OTHER, verbs.AbortUpload("m", upload))
    store.run(OTHER, verbs.CloseSession("m", session))
    assert store.run(ME, verbs.GetUpload("m", upload)).missing
    assert store.run(ME, verbs.RenewSession("m", session)).id == session
    assert store.run(OTHER, verbs.ListOperations()).items == ()
    assert store.run(OTHER, verbs.GetStats()).documents == 0


def _refused_to(store: Store, who: Identity, verb: verbs.Verb[Any]) -> Exception:
    with pytest.raises(Exception) as caught:
        store.run(who, verb)
    return caught.value


def test_documents_are_listed_in_pages_by_id_through_a_filter(store: Store) -> None:
    for number, name in enumerate("dbacfe"):
        put(store, "m", document(name, 1, SPEC, name, {"n": number}))
    assert ids(store) == list("abcdef")
    where = Condition("n", Compare.GE, (1,))
    first = store.run(ME, verbs.ListDocuments("m", where, 3))
    store.run(ME, verbs.DeleteDocument("m", "c"))  # A page stays right whatever changes between.
    rest = store.run(ME, verbs.ListDocuments("m", where, 3, first.next))
    assert (names(first.items), names(rest.items), rest.next) == (list("abc"), list("ef"), "")


def test_a_page_holds_what_was_asked_for(store: Store) -> None:
    assert isinstance(refused(store, verbs.ListDocuments("m", page_size=-1)), InvalidArgument)
    for name in "ab":
        put(store, "m", document(name, 1, SPEC, name))
    page = store.run(ME, verbs.ListDocuments("m", page_size=2))
    assert (names(page.items), page.next) == (["a", "b"], "")


def test_a_deleted_document_is_gone_for_every_verb(store: Store) -> None:
    put(store, "m", A)
    put(store, "m", B)
    before = store.run(ME, verbs.GetStats("m"))
    store.run(ME, verbs.DeleteDocument("m", "a"))
    assert ids(store) == ["b"]
    for verb in (verbs.GetDocument("m", "a"), verbs.Fetch("m", "a", 3), verbs.DeleteDocument("m", "a")):
        assert isinstance(refused(store, verb), NotFound)
    after = store.run(ME, verbs.GetStats("m"))
    assert (after.documents, after.tokens, after.bytes) == (1, 7, before.bytes * 7 // 12)
    answer = attend(store, "m", 3, QUERIES)
    assert error(answer, reference(QUERIES, B.keys[0], B.values[0])) <= 1e-5


def test_a_delete_may_be_repeated_with_its_request_id(store: Store) -> None:
    put(store, "m", A)
    for _ in range(2):
        store.run(ME, verbs.DeleteDocument("m", "a", request_id="d"))
    put(store, "m", A)
    store.run(ME, verbs.DeleteDocument("m", "a", request_id="d"))
    assert ids(store) == ["a"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Document("d", zeros(2, 2, 5, 16), zeros(2, 2, 4, 16)), "values must be"),
        (Document("d", zeros(1, 2, 5, 16), zeros(1, 2, 5, 16)), "keys must be"),
        (Document("d", zeros(2, 3, 5, 16), zeros(2, 3, 5, 16)), "keys must be"),
        (Document("d", zeros(2, 2, 5, 17), zeros(2, 2, 5, 17)), "keys must be"),
        (Document("d", zeros(2, 2, 0, 16), zeros(2, 2, 0, 16)), "1 to"),
        (Document("d", zeros(2, 2, 5, 16, dtype=torch.float16), zeros(2, 2, 5, 16)), "keys must be f32"),
        (Document("d", zeros(2, 2, 5, 16), zeros(2, 2, 5, 16), torch.zeros(4, dtype=torch.int64)), "token_ids"),
        (Document("d", zeros(2, 2, 5, 16), zeros(2, 2, 5, 16), torch.full((5,), -1)), "token_ids"),
        (Document("d", zeros(2, 2, 5, 16), zeros(2, 2, 5, 16), torch.full((5,), 2**32)), "token_ids"),
        (Document("d", zeros(2, 2, 5, 16), zeros(2, 2, 5, 16), torch.zeros(5)), "token_ids"),
        (Document("d", zeros(2, 2, 5, 16) + torch.nan, zeros(2, 2, 5, 16)), "NaN or infinity"),
        (Document("d", zeros(2, 2, 5, 16), zeros(2, 2, 5, 16) - torch.inf), "NaN or infinity"),
        (replace(A, id=""), "document id"),
        (replace(A, id="ü" * 257), "document id"),
        (replace(A, id="a\nb"), "control"),
        (replace(A, metadata={"x": float("nan")}), "finite"),
        (replace(A, metadata={"x": [1]}), "metadata"),  # type: ignore[dict-item]
        (replace(A, metadata={"": 1}), "metadata"),
        (replace(A, metadata={str(n): n for n in range(65)}), "64 fields"),
        (replace(A, metadata={"x": "y" * 20_000}), "16384"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_wrong_document_is_refused_and_nothing_stays(store: Store, wrong: Document, says: str) -> None:
    found = refused(store, verbs.PutDocument("m", wrong, MODEL))
    assert isinstance(found, InvalidArgument)
    assert says in found.message
    assert ids(store) == []
    put(store, "m", A)


def test_keys_of_another_model_are_refused_everywhere(store: Store) -> None:
    other = replace(MODEL, rope='{"theta":1}')
    for verb in (
        verbs.PutDocument("m", A, other),
        verbs.BeginUpload("m", "a", 5, other),
        verbs.OpenSession("m", other),
    ):
        found = refused(store, verb)
        assert isinstance(found, WrongModel)
        assert "encode the documents again" in found.message


# --- Uploads --------------------------------------------------------------------------------------------------------


def test_an_upload_comes_in_chunks_of_any_order_and_becomes_the_document(store: Store) -> None:
    big = document("big", 5000, SPEC, "big")
    pieces = chunks(big)
    upload = store.run(ME, begin(big))
    assert (upload.parts, upload.missing) == (1, ((0, 0, len(pieces)),))
    for chunk in reversed(pieces[1:]):
        store.write_chunk(ME, "m", upload.id, chunk)
    store.write_chunk(ME, "m", upload.id, pieces[2])  # The same once more.
    assert store.run(ME, verbs.GetUpload("m", upload.id)).missing == ((0, 0, 1),)
    incomplete = refused(store, verbs.CommitUpload("m", upload.id))
    assert isinstance(incomplete, FailedPrecondition)
    assert "1,048,576 bytes" in incomplete.message
    assert ids(store) == []
    store.write_chunk(ME, "m", upload.id, pieces[0])
    info = store.run(ME, verbs.CommitUpload("m", upload.id))
    assert store.run(ME, verbs.CommitUpload("m", upload.id)) == info
    assert store.run(ME, verbs.GetUpload("m", upload.id)).committed == info
    got = store.run(ME, verbs.Fetch("m", "big", 7, 0, 5000))
    assert torch.equal(got.values, big.values[1])
    assert torch.equal(got.token_ids, big.token_ids)  # type: ignore[arg-type]


def test_the_same_request_id_finds_the_upload_again_and_then_the_document(store: Store) -> None:
    upload = store.run(ME, begin(A, request_id="r"))
    assert store.run(ME, begin(A, request_id="r")).id == upload.id
    store.write_chunk(ME, "m", upload.id, chunks(A)[0])
    info = store.run(ME, verbs.CommitUpload("m", upload.id))
    assert store.run(ME, begin(A, request_id="r")).committed == info
    assert put(store, "m", A, request_id="r") == info


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"part": 1}, "parts 0 to 0"),
        ({"part": -1}, "parts 0 to 0"),
        ({"offset": 1}, "multiple"),
        ({"offset": -(1 << 20)}, "multiple"),
        ({"offset": 1 << 40}, "multiple"),
        ({"data": b"short"}, "must have"),
        ({"crc32": 1}, "CRC-32"),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused(store: Store, wrong: dict[str, Any], says: str) -> None:
    upload = store.run(ME, begin(A))
    good = chunks(A)[0]
    bad = good._replace(**wrong)
    with pytest.raises(InvalidArgument, match=says):
        store.write_chunk(ME, "m", upload.id, bad)
    store.write_chunk(ME, "m", upload.id, good)
    assert store.run(ME, verbs.CommitUpload("m", upload.id)).tokens == 5


def test_infinity_is_refused_in_chunks_too(store: Store) -> None:
    wrong = replace(A, values=A.values.clone().fill_(torch.inf))
    upload = store.run(ME, begin(wrong))
    with pytest.raises(InvalidArgument, match="NaN or infinity"):
        store.write_chunk(ME, "m", upload.id, chunks(wrong)[0])
        store.run(ME, verbs.CommitUpload("m", upload.id))
    assert ids(store) == []


def test_an_aborted_upload_is_gone(store: Store) -> None:
    upload = store.run(ME, begin(A))
    for _ in range(2):
        store.run(ME, verbs.AbortUpload("m", upload.id))
    found = refused(store, verbs.CommitUpload("m", upload.id))
    assert isinstance(found, NotFound)
    assert "begin again" in found.message
    put(store, "m", A)


def test_an_upload_nobody_writes_to_ends_with_its_lease(place: Path | None) -> None:
    with Store.open(place, replace(OPTIONS, upload_lease_s=0.05)) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        upload = store.run(ME, begin(document("a", 5000, SPEC, 1)))
        time.sleep(0.1)
        assert isinstance(refused(store, verbs.GetUpload("m", upload.id)), NotFound)
    assert place is None or list((place / "staging").iterdir()) == []


def test_of_two_uploads_of_one_id_the_first_to_commit_wins(store: Store) -> None:
    first, second = store.run(ME, begin(A)), store.run(ME, begin(A))
    for upload in (first, second):
        store.write_chunk(ME, "m", upload.id, chunks(A)[0])
    store.run(ME, verbs.CommitUpload("m", second.id))
    assert isinstance(refused(store, verbs.CommitUpload("m", first.id)), AlreadyExists)
    assert ids(store) == ["a"]


def test_an_upload_into_a_deleted_memory_is_gone(store: Store) -> None:
    upload = store.run(ME, begin(A))
    store.run(ME, verbs.DeleteMemory("m"))
    store.run(ME, verbs.CreateMemory("m", SPEC))
    assert isinstance(refused(store, verbs.GetUpload("m", upload.id)), NotFound)


def test_many_writers_at_once_all_get_their_document(store: Store) -> None:
    answers: list[str] = []

    def write(number: int) -> None:
        for turn in range(5):
            one = document(f"{number}-{turn}", 3, SPEC, f"{number}-{turn}")
            answers.append(put(store, "m", one, request_id=one.id).id)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ids(store) == sorted(answers)
    assert len(answers) == 40
    infos = store.run(ME, verbs.ListDocuments("m")).items
    assert sorted(one.generation for one in infos) == list(range(1, 41))


def test_of_writers_of_one_id_exactly_one_succeeds(store: Store) -> None:
    outcomes: list[str] = []

    def write(number: int) -> None:
        try:
            outcomes.append(put(store, "m", document("same", 1 + number, SPEC, number)).id)
        except AlreadyExists:
            outcomes.append("refused")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 7 + ["same"]


def test_committed_documents_leave_nothing_behind_in_the_list_of_uploads(store: Store) -> None:
    for number in range(20):
        put(store, "m", document(str(number), 1, SPEC, number))
    assert store._documents._uploads._pending == {}  # It is walked at every put.
