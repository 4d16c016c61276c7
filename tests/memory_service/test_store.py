"""What every verb does, in RAM and in a directory."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_service import verbs
from memory_service.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    QuotaExceeded,
    ResourceExhausted,
    SessionExpired,
    Unavailable,
    WrongModel,
)
from memory_service.settings import StoreOptions
from memory_service.storage.parts import PartLayout
from memory_service.storage.vfs import OsVfs
from memory_service.store.recovery import rebuild_catalog
from memory_service.store.store import Store
from memory_service.store.warm_tokens import WarmTokens
from memory_service.types.callers import Cancel, Identity, Role
from memory_service.types.conditions import Compare, Condition
from memory_service.types.documents import Document
from memory_service.types.operations import OperationKind, OperationState
from memory_service.types.questions import AttendGroup, AttendOptions, Engine
from memory_service.types.scopes import Scope, SessionScope
from memory_service.types.sessions import SessionAppend
from memory_service.types.specs import DType, Fingerprint, IndexPolicy
from memory_service.types.uploads import Chunk
from tests.memory_service.oracle import (
    ME,
    MODEL,
    append,
    attend,
    document,
    error,
    everything_in_small_pieces,
    finish,
    names,
    put,
    reference,
    refused,
    spec_of,
    tensors,
    warm,
)

SPEC = spec_of()
OTHER = Identity("other", Role.ADMIN)
OPTIONS = StoreOptions(background=False)
QUERIES = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(5))
A = document("a", 5, SPEC, "a", {"n": 1, "kind": "x"})
B = document("b", 7, SPEC, "b", {"n": 2})


@pytest.fixture(params=["ram", "directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "ram" else tmp_path / "data"


@pytest.fixture
def store(place: Path | None) -> Iterator[Store]:
    """A store with one empty memory, "m"."""
    with Store.open(place, OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        yield store


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Store]:
    """The same, in a directory."""
    with Store.open(tmp_path / "data", OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        yield store


def ids(store: Store, **narrowed: Any) -> list[str]:
    return names(store.run(ME, verbs.ListDocuments("m", **narrowed)).items)


def chunks(one: Document) -> list[Chunk]:
    """A one-part document as it travels."""
    layout = PartLayout.of(SPEC, one.tokens)
    assert one.token_ids is not None
    tensors = (one.keys, one.values, one.token_ids.to(torch.int32))
    payload = b"".join(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)
    assert len(payload) == layout.nbytes
    pieces = [(at, payload[at : at + (1 << 20)]) for at in range(0, len(payload), 1 << 20)]
    return [Chunk(0, at, zlib.crc32(piece), piece) for at, piece in pieces]


def begin(one: Document, **more: Any) -> verbs.BeginUpload:
    return verbs.BeginUpload("m", one.id, one.tokens, MODEL, one.metadata, **more)


# --- Memories -------------------------------------------------------------------------------------------------------


def test_a_memory_is_created_once_and_described(store: Store) -> None:
    info = store.run(ME, verbs.GetMemory("m"))
    assert (info.name, info.spec, info.documents, info.tokens, info.bytes) == ("m", SPEC, 0, 0, 0)
    assert store.run(ME, verbs.CreateMemory("m", SPEC)) == info


def test_the_same_name_with_another_spec_already_exists(store: Store) -> None:
    found = refused(store, verbs.CreateMemory("m", spec_of(DType.BF16)))
    assert isinstance(found, AlreadyExists)
    assert "another spec" in found.message


@pytest.mark.parametrize("name", ["", "-a", "a/b", "..", "a" * 64, "ä", "a b", "a\n"])
def test_a_memory_needs_a_plain_name(store: Store, name: str) -> None:
    assert isinstance(refused(store, verbs.CreateMemory(name, SPEC)), InvalidArgument)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": ()},
        {"layers": (2, 1)},
        {"layers": (1, 1)},
        {"layers": (-1,)},
        {"kv_heads": 0},
        {"kv_heads": 1 << 40},
        {"head_dim": 0},
        {"head_dim": 1 << 40},
        {"fingerprint": Fingerprint("")},
        {"index": IndexPolicy(min_tokens=0)},
    ],
)
def test_a_spec_beyond_its_limits_is_refused(store: Store, wrong: dict[str, Any]) -> None:
    assert isinstance(refused(store, verbs.CreateMemory("x", replace(SPEC, **wrong))), InvalidArgument)


def test_memories_are_listed_in_pages_by_name(store: Store) -> None:
    for name in ("z", "b", "y"):
        store.run(ME, verbs.CreateMemory(name, SPEC))
    first = store.run(ME, verbs.ListMemories(page_size=3))
    rest = store.run(ME, verbs.ListMemories(page_size=3, page_token=first.next))
    assert [one.name for one in first.items] == ["b", "m", "y"]
    assert ([one.name for one in rest.items], rest.next) == (["z"], "")


def test_a_deleted_memory_is_gone_and_its_name_is_free(store: Store) -> None:
    put(store, "m", A)
    store.run(ME, verbs.DeleteMemory("m"))
    assert isinstance(refused(store, verbs.GetMemory("m")), NotFound)
    assert isinstance(refused(store, verbs.DeleteMemory("m")), NotFound)
    store.run(ME, verbs.CreateMemory("m", spec_of(DType.BF16)))
    assert ids(store) == []


def test_a_deleted_memory_leaves_nothing_on_disk(disk: Store, tmp_path: Path) -> None:
    put(disk, "m", A)
    disk.run(ME, verbs.DeleteMemory("m"))
    assert list((tmp_path / "data" / "memories").iterdir()) == []


@pytest.mark.parametrize(
    "verb",
    [
        verbs.GetMemory("none"),
        verbs.DeleteMemory("none"),
        verbs.PutDocument("none", A, MODEL),
        verbs.BeginUpload("none", "a", 1, MODEL),
        verbs.GetDocument("none", "a"),
        verbs.GetDocument("m", "none"),
        verbs.DeleteDocument("m", "none"),
        verbs.ListDocuments("none"),
        verbs.OpenSession("none", MODEL),
        verbs.GetUpload("m", "none"),
        verbs.CommitUpload("m", "none"),
        verbs.RenewSession("m", "none"),
        verbs.Attend("none", 3, (AttendGroup(Scope(), QUERIES),)),
        verbs.Attend("m", 3, (AttendGroup(Scope(("none",)), QUERIES),)),
        verbs.Attend("m", 3, (AttendGroup(Scope.session("none"), QUERIES),)),
        verbs.Fetch("m", "none", 3),
        verbs.Fetch("m", "session:none", 3),
        verbs.GetStats("none"),
        verbs.StartOperation("none", OperationKind.COMPACT),
        verbs.GetOperation("none"),
        verbs.CancelOperation("none"),
        verbs.ListOperations("none"),
    ],
    ids=repr,
)
def test_what_does_not_exist_is_not_found(store: Store, verb: verbs.Verb[Any]) -> None:
    assert isinstance(refused(store, verb), NotFound)


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


def _shape(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Document("d", _shape(2, 2, 5, 16), _shape(2, 2, 4, 16)), "values must be"),
        (Document("d", _shape(1, 2, 5, 16), _shape(1, 2, 5, 16)), "keys must be"),
        (Document("d", _shape(2, 3, 5, 16), _shape(2, 3, 5, 16)), "keys must be"),
        (Document("d", _shape(2, 2, 5, 17), _shape(2, 2, 5, 17)), "keys must be"),
        (Document("d", _shape(2, 2, 0, 16), _shape(2, 2, 0, 16)), "1 to"),
        (Document("d", _shape(2, 2, 5, 16, dtype=torch.float16), _shape(2, 2, 5, 16)), "keys must be f32"),
        (Document("d", _shape(2, 2, 5, 16), _shape(2, 2, 5, 16), torch.zeros(4, dtype=torch.int64)), "token_ids"),
        (Document("d", _shape(2, 2, 5, 16), _shape(2, 2, 5, 16), torch.full((5,), -1)), "token_ids"),
        (Document("d", _shape(2, 2, 5, 16), _shape(2, 2, 5, 16), torch.full((5,), 2**32)), "token_ids"),
        (Document("d", _shape(2, 2, 5, 16), _shape(2, 2, 5, 16), torch.zeros(5)), "token_ids"),
        (Document("d", _shape(2, 2, 5, 16) + torch.nan, _shape(2, 2, 5, 16)), "NaN or infinity"),
        (Document("d", _shape(2, 2, 5, 16), _shape(2, 2, 5, 16) - torch.inf), "NaN or infinity"),
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


# --- Quotas ---------------------------------------------------------------------------------------------------------


def test_a_tenant_holds_no_more_bytes_than_its_quota(place: Path | None) -> None:
    size = 5 * (SPEC.bytes_per_token + 4)
    with Store.open(place, replace(OPTIONS, tenant_bytes=2 * size)) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        put(store, "m", A)
        waiting = store.run(ME, begin(replace(A, id="b")))
        found = refused(store, verbs.PutDocument("m", replace(A, id="c"), MODEL))
        assert isinstance(found, QuotaExceeded)
        assert "delete documents" in found.message
        store.run(OTHER, verbs.CreateMemory("m", SPEC))
        store.run(OTHER, verbs.PutDocument("m", A, MODEL))
        store.run(ME, verbs.AbortUpload("m", waiting.id))
        put(store, "m", replace(A, id="c"))
        store.run(ME, verbs.DeleteDocument("m", "a"))
        put(store, "m", replace(A, id="d"))


def test_a_tenant_holds_no_more_memories_than_its_limit(place: Path | None) -> None:
    with Store.open(place, replace(OPTIONS, tenant_memories=2)) as store:
        for name in ("a", "b"):
            store.run(ME, verbs.CreateMemory(name, SPEC))
        assert isinstance(refused(store, verbs.CreateMemory("c", SPEC)), QuotaExceeded)
        store.run(OTHER, verbs.CreateMemory("c", SPEC))


def test_documents_that_wait_in_ram_are_bounded(place: Path | None) -> None:
    with Store.open(place, replace(OPTIONS, staging_bytes=10_000)) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        waiting = store.run(ME, begin(document("a", 15, SPEC, 1)))
        found = refused(store, begin(document("b", 15, SPEC, 1)))
        assert isinstance(found, ResourceExhausted)
        assert found.retry_after_s
        store.run(ME, verbs.AbortUpload("m", waiting.id))
        put(store, "m", document("b", 15, SPEC, 1))


# --- Sessions -------------------------------------------------------------------------------------------------------


def test_a_session_is_visible_at_once_and_only_where_it_is_named(store: Store) -> None:
    put(store, "m", A)
    session = store.run(ME, verbs.OpenSession("m", MODEL))
    assert (session.memory, session.tokens) == ("m", (0, 0))
    keys, values = tensors(SPEC, 9, "s")
    append(store, "m", session.id, SPEC, keys, values, 0)
    alone = attend(store, "m", 3, QUERIES, Scope.session(session.id))
    assert error(alone, reference(QUERIES, keys[0], values[0])) <= 1e-5
    both = attend(store, "m", 3, QUERIES, Scope(sessions=(SessionScope(session.id),)))
    together = [torch.cat(pair, dim=1) for pair in ((A.keys[0], keys[0]), (A.values[0], values[0]))]
    assert error(both, reference(QUERIES, *together)) <= 1e-5
    assert error(attend(store, "m", 3, QUERIES), reference(QUERIES, A.keys[0], A.values[0])) <= 1e-5


@pytest.mark.parametrize("until", [0, 1, 5, 9, 100])
def test_until_hides_what_comes_at_or_after_it(store: Store, until: int) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    keys, values = tensors(SPEC, 9, "s")
    append(store, "m", session, SPEC, keys, values, 0)
    answer = attend(store, "m", 3, QUERIES, Scope((), None, (SessionScope(session, until),)), top_k=4)
    assert error(answer, reference(QUERIES, keys[0, :, :until], values[0, :, :until], top_k=4)) <= 1e-5
    assert answer.coverage.in_scope == min(until, 9)


def test_layers_of_a_session_grow_apart(store: Store) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    keys, values = tensors(SPEC, 9, "s")
    ids = torch.arange(9)
    first = SessionAppend(session, (7,), 0, keys[1:, :, :6], values[1:, :, :6], ids[:6])
    (info,) = store.run(ME, verbs.AppendSessions("m", (first,)))
    assert info.tokens == (0, 6)
    both = SessionAppend(session, (3, 7), 6, keys[:, :, 6:], values[:, :, 6:])
    assert isinstance(refused(store, verbs.AppendSessions("m", (both,))), InvalidArgument)
    later = SessionAppend(session, (3,), 0, keys[:1, :, :6], values[:1, :, :6])
    (info,) = store.run(ME, verbs.AppendSessions("m", (later,)))
    (info,) = store.run(ME, verbs.AppendSessions("m", (both,)))
    assert info.tokens == (9, 9)
    got = store.run(ME, verbs.Fetch("m", f"session:{session}", 7, 2, 5))
    assert torch.equal(got.keys, keys[1, :, 2:7])
    assert got.token_ids.tolist() == [2, 3, 4, 5, 0]  # The layer without ids left those of the other alone.


def test_a_repeated_append_is_harmless_and_a_gap_is_refused(store: Store) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    keys, values = tensors(SPEC, 4, "s")
    for _ in range(2):
        append(store, "m", session, SPEC, keys, values, 0)
    for wrong in (5, 2):
        found = refused(store, verbs.AppendSessions("m", (SessionAppend(session, (3, 7), wrong, keys, values),)))
        assert isinstance(found, InvalidArgument)
        assert "append at 4" in found.message
    assert store.run(ME, verbs.RenewSession("m", session)).tokens == (4, 4)


def _append(**changed: Any) -> SessionAppend:
    return replace(SessionAppend("?", (3, 7), 0, _shape(2, 2, 4, 16), _shape(2, 2, 4, 16)), **changed)


@pytest.mark.parametrize(
    "wrong",
    [
        _append(layers=()),
        _append(layers=(3,)),
        _append(layers=(3, 3)),
        _append(layers=(3, 4)),
        _append(first_token=-4),
        _append(keys=_shape(2, 2, 4, 15)),
        _append(values=_shape(2, 2, 3, 16)),
        _append(keys=_shape(2, 2, 4)),
        _append(keys=_shape(2, 2, 0, 16), values=_shape(2, 2, 0, 16)),
        _append(keys=_shape(2, 2, 4, 16, dtype=torch.bfloat16)),
        _append(values=_shape(2, 2, 4, 16) + torch.nan),
        _append(token_ids=torch.zeros(3, dtype=torch.int64)),
        _append(token_ids=torch.zeros(4)),
        _append(token_ids=torch.full((4,), -1)),
    ],
)
def test_a_wrong_append_is_refused_and_nothing_stays(store: Store, wrong: SessionAppend) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    found = refused(store, verbs.AppendSessions("m", (replace(wrong, session=session),)))
    assert isinstance(found, InvalidArgument)
    assert store.run(ME, verbs.RenewSession("m", session)).tokens == (0, 0)


def test_several_sessions_are_appended_to_in_one_call(store: Store) -> None:
    sessions = [store.run(ME, verbs.OpenSession("m", MODEL)).id for _ in range(3)]
    appends = tuple(SessionAppend(one, (3, 7), 0, *tensors(SPEC, 2 + n, n)) for n, one in enumerate(sessions))
    infos = store.run(ME, verbs.AppendSessions("m", appends))
    assert [one.id for one in infos] == sessions
    assert [one.tokens for one in infos] == [(2, 2), (3, 3), (4, 4)]


def test_a_closed_session_is_gone_and_its_bytes_are_free(store: Store) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    append(store, "m", session, SPEC, *tensors(SPEC, 9, "s"), 0)
    stats = store.run(ME, verbs.GetStats("m"))
    assert (stats.sessions, stats.session_bytes) == (1, 9 * SPEC.bytes_per_token)
    for _ in range(2):
        store.run(ME, verbs.CloseSession("m", session))
    stats = store.run(ME, verbs.GetStats("m"))
    assert (stats.sessions, stats.session_bytes) == (0, 0)
    found = refused(store, verbs.Attend("m", 3, (AttendGroup(Scope.session(session), QUERIES),)))
    assert isinstance(found, SessionExpired)
    assert "append the prompt again" in found.message


def test_a_lease_runs_out_unless_it_is_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now)
    session = store.run(ME, verbs.OpenSession("m", MODEL, 10.0))
    assert session.expires_at == now + 10
    for elapsed in (9, 18, 27):
        monkeypatch.setattr("time.time", lambda elapsed=elapsed: now + elapsed)
        attend(store, "m", 3, QUERIES, Scope.session(session.id))
    monkeypatch.setattr("time.time", lambda: now + 38)
    assert isinstance(refused(store, verbs.RenewSession("m", session.id)), SessionExpired)
    assert store.run(ME, verbs.GetStats("m")).sessions == 0


@pytest.mark.parametrize("lease", [0.0, 0.5, -1.0, 1e9, float("nan"), float("inf")])
def test_a_lease_must_be_sensible(store: Store, lease: float) -> None:
    assert isinstance(refused(store, verbs.OpenSession("m", MODEL, lease)), InvalidArgument)


def test_a_tenant_opens_no_more_sessions_than_its_limit(place: Path | None) -> None:
    with Store.open(place, replace(OPTIONS, tenant_sessions=2)) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        first, _ = (store.run(ME, verbs.OpenSession("m", MODEL)) for _ in range(2))
        assert isinstance(refused(store, verbs.OpenSession("m", MODEL)), QuotaExceeded)
        store.run(ME, verbs.CloseSession("m", first.id))
        store.run(ME, verbs.OpenSession("m", MODEL))


def test_all_sessions_together_hold_no_more_than_the_limit(place: Path | None) -> None:
    with Store.open(place, replace(OPTIONS, session_bytes=10 * SPEC.bytes_per_token)) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        one, two = (store.run(ME, verbs.OpenSession("m", MODEL)).id for _ in range(2))
        append(store, "m", one, SPEC, *tensors(SPEC, 9, "s"), 0)
        over = verbs.AppendSessions("m", (SessionAppend(two, (3, 7), 0, *tensors(SPEC, 2, "s")),))
        found = refused(store, over)
        assert isinstance(found, ResourceExhausted)
        assert found.retry_after_s
        store.run(ME, verbs.CloseSession("m", one))
        store.run(ME, over)


def test_sessions_do_not_outlive_their_memory(store: Store) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    store.run(ME, verbs.DeleteMemory("m"))
    store.run(ME, verbs.CreateMemory("m", SPEC))
    assert isinstance(refused(store, verbs.RenewSession("m", session)), SessionExpired)


def test_readers_see_whole_appends_while_a_session_grows(store: Store) -> None:
    session = store.run(ME, verbs.OpenSession("m", MODEL)).id
    keys, values = tensors(SPEC, 3000, "s")
    stop = threading.Event()

    def grow() -> None:
        for first in range(0, 3000, 50):
            append(store, "m", session, SPEC, keys[:, :, first : first + 50], values[:, :, first : first + 50], first)
        stop.set()

    writer = threading.Thread(target=grow)
    writer.start()
    seen = set()
    while not stop.is_set() or 3000 not in seen:
        answer = attend(store, "m", 3, QUERIES, Scope.session(session), top_k=4)
        count = answer.coverage.searched
        seen.add(count)
        assert count % 50 == 0
        assert error(answer, reference(QUERIES, keys[0, :, :count], values[0, :, :count], top_k=4)) <= 1e-5
    writer.join()


# --- Attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            verbs.Attend("m", 4, (AttendGroup(Scope(), QUERIES),)),
            r"layer 4 is not kept by this memory; it keeps \[3, 7",
        ),
        (verbs.Attend("m", 3, ()), "groups"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES[0]),)), "queries must be"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES[:3]),)), "multiple of 2"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES[..., :8]),)), "queries must be"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES[:, :0]),)), "queries must be"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES / 0),)), "NaN or infinity"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES.long()),)), "floating point"),
        (verbs.Attend("m", 3, (AttendGroup(Scope(), torch.zeros(1).expand(2, 40_000, 16)),)), "split the call"),
        *(
            (verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES),), options), says)
            for options, says in (
                (AttendOptions(top_k=-1), "top_k"),
                (AttendOptions(top_k=4097), "top_k"),
                (AttendOptions(scale=0.0), "scale"),
                (AttendOptions(scale=float("nan")), "scale"),
                (AttendOptions(scale=float("inf")), "scale"),
                (AttendOptions(logit_gap=1.0), "logit_gap"),
                (AttendOptions(top_k=1, logit_gap=-1.0), "logit_gap"),
                (AttendOptions(top_k=1, logit_gap=float("nan")), "logit_gap"),
                (AttendOptions(tokens=True), "tokens"),
                (AttendOptions(engine=Engine.INDEX), "INDEX"),
            )
        ),
        (verbs.Search("m", 3, (AttendGroup(Scope(), QUERIES),), AttendOptions()), "top_k"),
        (verbs.Fetch("m", "a", 4), "layer 4"),
        (verbs.Fetch("m", "a", 3, -1), "first_token"),
        (verbs.Fetch("m", "a", 3, 0, 0), "tokens"),
        (verbs.Fetch("m", "a", 3, 5), "5 tokens"),
    ],
)
def test_a_wrong_question_is_refused_with_a_sentence(store: Store, wrong: verbs.Verb[Any], says: str) -> None:
    put(store, "m", A)
    with pytest.raises(InvalidArgument, match=says):
        store.run(ME, wrong)


def test_the_index_cannot_answer_before_it_is_built(store: Store) -> None:
    put(store, "m", A)
    options = AttendOptions(top_k=1, engine=Engine.INDEX)
    found = refused(store, verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES),), options))
    assert isinstance(found, FailedPrecondition)
    assert "start the operation INDEX" in found.message


def test_a_filter_narrows_the_documents_named(store: Store) -> None:
    put(store, "m", A)
    put(store, "m", B)
    where = Condition("n", Compare.GT, (1,))
    for scope in (Scope(where=where), Scope(("a", "b"), where), Scope(("b", "b"))):
        answer = attend(store, "m", 7, QUERIES, scope)
        assert error(answer, reference(QUERIES, B.keys[1], B.values[1])) <= 1e-5
    assert attend(store, "m", 7, QUERIES, Scope(("a",), where)).coverage.in_scope == 0


def test_half_precision_queries_are_widened(store: Store) -> None:
    put(store, "m", A)
    half = QUERIES.bfloat16()
    assert error(attend(store, "m", 3, half), reference(half.float(), A.keys[0], A.values[0])) <= 1e-5


def test_a_cancelled_call_stops(store: Store) -> None:
    put(store, "m", A)
    cancel = Cancel()
    cancel.cancel()
    verb = verbs.Attend("m", 3, (AttendGroup(Scope(), QUERIES),))
    with pytest.raises(Cancelled):
        store.run(ME, verb, cancel)
    with pytest.raises(DeadlineExceeded):
        store.run(ME, verb, Cancel(timeout_s=-1.0))


@pytest.mark.parametrize("top_k", [0, 8])
def test_work_under_way_stops_soon_after_it_is_cancelled(store: Store, top_k: int) -> None:
    put(store, "m", document("big", 40_000, SPEC, 1))
    queries = torch.randn(2, 4096, 16)
    cancel = Cancel()
    timer = threading.Timer(0.1, cancel.cancel)
    start = time.monotonic()
    timer.start()
    with pytest.raises(Cancelled):
        for _ in range(100):
            store.run(ME, verbs.Attend("m", 3, (AttendGroup(Scope(), queries),), AttendOptions(top_k)), cancel)
    assert time.monotonic() - start < 5
    timer.join()


def test_readers_go_on_while_documents_come_and_go(store: Store) -> None:
    put(store, "m", A)
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                answer = attend(store, "m", 3, QUERIES, Scope(("a",)), top_k=3)
                assert error(answer, reference(QUERIES, A.keys[0], A.values[0], top_k=3)) <= 1e-5
        except BaseException as problem:
            failures.append(problem)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(15):
        put(store, "m", document(f"x{number}", 40, SPEC, number))
        warm(store, "m")
        if number > 2:
            store.run(ME, verbs.DeleteDocument("m", f"x{number - 3}"))
        if number % 5 == 0:
            finish(store, "m", OperationKind.COMPACT)
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []


def test_a_query_during_the_tidying_of_ram_sees_every_token(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with everything_in_small_pieces(SPEC.bytes_per_token):
        store.run(ME, verbs.CreateMemory("t", SPEC))
        for number in range(5):
            put(store, "t", document(str(number), 18, SPEC, number))
        warm(store, "t")
        for number in (0, 1, 4):
            store.run(ME, verbs.DeleteDocument("t", str(number)))
        kept = [document(str(number), 18, SPEC, number) for number in (2, 3)]
        expected = reference(
            QUERIES, torch.cat([d.keys[0] for d in kept], 1), torch.cat([d.values[0] for d in kept], 1)
        )
        move, seen = WarmTokens.move, []

        def watched(self: WarmTokens, *where: Any) -> Any:
            seen.append(error(attend(store, "t", 3, QUERIES), expected))
            moved = move(self, *where)
            seen.append(error(attend(store, "t", 3, QUERIES, Scope(("2", "3"))), expected))
            return moved

        monkeypatch.setattr(WarmTokens, "move", watched)
        finish(store, "t", OperationKind.COMPACT)
        assert len(seen) >= 2
        assert max(seen) <= 1e-5
        assert error(attend(store, "t", 3, QUERIES), expected) <= 1e-5
        assert store.run(ME, verbs.GetStats("t")).resident_tokens == 36


# --- Operations and statistics ----------------------------------------------------------------------------------------


def test_an_operation_is_watched_to_its_end(store: Store) -> None:
    put(store, "m", A)
    done = finish(store, "m", OperationKind.VERIFY)
    assert (done.memory, done.kind, done.state) == ("m", OperationKind.VERIFY, OperationState.DONE)
    assert store.run(ME, verbs.ListOperations("m")).items == (done,)
    assert store.run(ME, verbs.CancelOperation(done.id)) == done


def test_operations_are_listed_in_pages_newest_first(store: Store) -> None:
    made = [finish(store, "m", OperationKind.VERIFY).id for _ in range(3)]
    first = store.run(ME, verbs.ListOperations(page_size=2))
    rest = store.run(ME, verbs.ListOperations(page_size=2, page_token=first.next))
    assert [one.id for one in (*first.items, *rest.items)] == made[::-1]
    assert rest.next == ""
    assert isinstance(refused(store, verbs.ListOperations(page_token="none")), InvalidArgument)


def test_the_same_work_is_not_started_twice(store: Store) -> None:
    put(store, "m", A)
    memory = store._memories.get("default", "m")
    with memory.filling:  # The compaction must wait for it.
        first = store.run(ME, verbs.StartOperation("m", OperationKind.COMPACT))
        again = store.run(ME, verbs.StartOperation("m", OperationKind.COMPACT))
    assert again.id == first.id


def test_compaction_frees_what_was_deleted_and_keeps_the_rest(disk: Store, tmp_path: Path) -> None:
    for number in range(4):
        put(disk, "m", document(str(number), 50, SPEC, number))
    for number in (0, 2):
        disk.run(ME, verbs.DeleteDocument("m", str(number)))
    assert disk.run(ME, verbs.GetStats("m")).dead_bytes == 100 * (SPEC.bytes_per_token + 4)
    assert finish(disk, "m", OperationKind.COMPACT).state is OperationState.DONE
    stats = disk.run(ME, verbs.GetStats("m"))
    assert (stats.dead_bytes, stats.segments, stats.tokens) == (0, 1, 100)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    for number in (1, 3):
        got = disk.run(ME, verbs.Fetch("m", str(number), 3, 0, 50))
        assert torch.equal(got.keys, document(str(number), 50, SPEC, number).keys[0])


def test_a_reader_keeps_the_files_it_reads_until_it_is_done(disk: Store, tmp_path: Path) -> None:
    put(disk, "m", A)
    put(disk, "m", B)
    put(disk, "m", document("c", 5, SPEC, "c"))
    disk.run(ME, verbs.DeleteDocument("m", "b"))
    memory = disk._memories.get("default", "m")
    with memory.reading():
        old = memory.documents["a"]
        finish(disk, "m", OperationKind.COMPACT)
        assert torch.equal(memory.read(old, 0, 0, 5)[0], A.keys[0])
        assert len(list(tmp_path.rglob("*.safetensors"))) == 4  # The three old ones and the new one.
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_compacting_again_while_a_reader_holds_the_old_files_is_fine(disk: Store) -> None:
    put(disk, "m", A)
    put(disk, "m", B)
    disk.run(ME, verbs.DeleteDocument("m", "b"))
    with disk._memories.get("default", "m").reading():
        for _ in range(2):
            done = finish(disk, "m", OperationKind.COMPACT)
            assert done.state is OperationState.DONE, done.message
    assert torch.equal(disk.run(ME, verbs.Fetch("m", "a", 3, 0, 5)).keys, A.keys[0])
    assert finish(disk, "m", OperationKind.VERIFY).state is OperationState.DONE


def test_statistics_count_what_is_there(store: Store) -> None:
    put(store, "m", A)
    store.run(ME, verbs.CreateMemory("n", SPEC))
    put(store, "n", B)
    one, both = store.run(ME, verbs.GetStats("m")), store.run(ME, verbs.GetStats())
    assert (one.documents, one.tokens, one.bytes) == (1, 5, 5 * (SPEC.bytes_per_token + 4))
    assert (both.documents, both.tokens, both.memory) == (2, 12, "")


# --- Life -------------------------------------------------------------------------------------------------------------


def test_a_closed_store_answers_nothing(place: Path | None) -> None:
    store = Store.open(place, OPTIONS)
    assert store.ready is True
    for _ in range(2):
        store.close()
        assert store.ready is False
    assert isinstance(refused(store, verbs.ListMemories()), Unavailable)


def test_one_directory_is_open_once(disk: Store, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="in use"):
        Store.open(tmp_path / "data", OPTIONS)
    disk.close()
    Store.open(tmp_path / "data", OPTIONS).close()


def test_everything_acknowledged_is_there_after_a_restart(tmp_path: Path) -> None:
    with Store.open(tmp_path / "data", OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        first = put(store, "m", A, request_id="r")
        put(store, "m", B)
        put(store, "m", document("b", 3, SPEC, 9, {"new": True}), replacing=True)
        put(store, "m", document("c", 3, SPEC, 9))
        store.run(ME, verbs.DeleteDocument("m", "c", request_id="d"))
        session = store.run(ME, verbs.OpenSession("m", MODEL)).id
        info, listed = store.run(ME, verbs.GetMemory("m")), store.run(ME, verbs.ListDocuments("m"))
        before = attend(store, "m", 3, QUERIES)
        operation = finish(store, "m", OperationKind.VERIFY)
    with Store.open(tmp_path / "data", OPTIONS) as store:
        assert store.run(ME, verbs.GetMemory("m")) == info
        assert store.run(ME, verbs.ListDocuments("m")) == listed
        assert torch.equal(attend(store, "m", 3, QUERIES).output, before.output)
        assert store.run(ME, verbs.GetOperation(operation.id)) == operation
        assert isinstance(refused(store, verbs.RenewSession("m", session)), SessionExpired)
        assert put(store, "m", A, request_id="r") == first
        store.run(ME, verbs.DeleteDocument("m", "c", request_id="d"))
        assert put(store, "m", document("d", 1, SPEC, 1)).generation == 5


def test_a_catalogue_gone_missing_is_told_not_replaced(tmp_path: Path) -> None:
    with Store.open(tmp_path / "data", OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        put(store, "m", A)
    (tmp_path / "data" / "catalog.sqlite").unlink()
    with pytest.raises(DataLoss, match="rebuild-catalog"):
        Store.open(tmp_path / "data", OPTIONS)


def test_an_id_used_again_after_a_rebuild_is_not_mistaken_for_the_one_deleted_before(tmp_path: Path) -> None:
    root = tmp_path / "data"
    with Store.open(root, OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        put(store, "m", A)
        put(store, "m", B)
        store.run(ME, verbs.DeleteDocument("m", "b"))
        finish(store, "m", OperationKind.COMPACT)  # No segment remembers the generation of b.
    rebuild_catalog(root / "catalog.sqlite", root, OsVfs())
    with Store.open(root, OPTIONS) as store:
        assert ids(store) == ["a"]
        put(store, "m", B)
    with Store.open(root, OPTIONS) as store:
        assert ids(store) == ["a", "b"]


def test_deleting_a_memory_gives_all_its_ram_back(disk: Store) -> None:
    put(disk, "m", A)
    warm(disk, "m")
    memory = disk._memories.get("default", "m")
    disk.run(ME, verbs.DeleteMemory("m"))
    for late in (lambda: disk._upkeep.warm(memory, Cancel()), memory.tidy, memory.send_away):
        late()  # The background thread may have been about to.
        assert disk._memories.residency.used == 0


def test_background_work_brings_documents_into_ram_by_itself(tmp_path: Path) -> None:
    with Store.open(tmp_path / "data", replace(OPTIONS, background=True)) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        put(store, "m", A)
        end = time.monotonic() + 10
        while store.run(ME, verbs.GetStats("m")).resident_tokens < 5:
            assert time.monotonic() < end
            time.sleep(0.05)
