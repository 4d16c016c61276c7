"""A corpus gets into a memory once, whatever happens on the way; only what changed is encoded again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memory_service import (
    AlreadyExists,
    DocumentInfo,
    DType,
    Fingerprint,
    InvalidArgument,
    Memory,
    MemorySpec,
    Unavailable,
    WrongModel,
)
from memory_service.types.conditions import Scalar
from model_worker.corpus import Note, Notes, Source, read
from model_worker.decoder.model import FotModel
from model_worker.ingestion.encoding import Encoded, Encoder
from model_worker.ingestion.ingest import ingest
from model_worker.ingestion.intake import CONTENT, IngestReport, settings_of
from model_worker.ingestion.uploads import Outgoing, Uploads
from model_worker.recall.passages import text_of
from tests.model_worker.tiny import byte_tokenizer, save_tiny_llama

SPEC = MemorySpec(Fingerprint("fake"), layers=(1, 3), kv_heads=2, head_dim=8, dtype=DType.F32)
TOKENIZER = byte_tokenizer()


class FakeEncoder:
    """Honours the contract of `Encoder` with keys that tell the token; counts what it was asked, looks two ahead."""

    spec = SPEC

    def __init__(self) -> None:
        self.documents: list[list[int]] = []

    def encode(self, documents: Iterable[Sequence[int] | Tensor]) -> Iterator[Encoded]:
        waiting: list[Encoded] = []
        for document in documents:
            ids = torch.as_tensor(document)
            self.documents.append(ids.tolist())
            keys = ids.to(torch.float32)[None, None, :, None].expand(2, 2, len(ids), 8).contiguous()
            waiting.append(Encoded(ids, keys, -keys))
            if len(waiting) == 3:
                yield waiting.pop(0)
        yield from waiting


@pytest.fixture
def memory() -> Iterator[Memory]:
    with Memory.open(":memory:", spec=SPEC) as memory:
        yield memory


def texts(**documents: str) -> list[Source]:
    return [Source(name, text, metadata={"root": "here"}) for name, text in documents.items()]


def run(
    sources: Iterable[Source],
    memory: Memory,
    encoder: FakeEncoder | None = None,
    *,
    settings: Mapping[str, Scalar] | None = None,
    replace: bool = False,
    belongs: Callable[[DocumentInfo], bool] | None = None,
    notes: Notes | None = None,
    on_progress: Callable[[IngestReport], None] = lambda _: None,
) -> IngestReport:
    return ingest(
        sources, encoder or FakeEncoder(), TOKENIZER, memory,
        settings=settings, replace=replace, belongs=belongs, notes=notes, on_progress=on_progress,
    )  # fmt: skip


def held(memory: Memory) -> dict[str, str]:
    """Every document's text, from the token ids that the memory keeps."""
    return {
        one.id: text_of(TOKENIZER, memory.fetch(one.id, 1, 0, one.tokens).token_ids.tolist())
        for one in memory.documents()
    }


# --- Once -----------------------------------------------------------------------------------------------------------


def test_documents_are_stored_with_their_keys_token_ids_and_metadata(memory: Memory) -> None:
    report = run(texts(a="one", b="twothree"), memory, settings={"window": 512})
    assert (report.added, report.tokens) == (2, 4 + 9)
    assert held(memory) == {"a": "one", "b": "twothree"}
    stored = memory.get("a").metadata
    assert stored["root"] == "here" and stored["fot.window"] == 512
    assert stored[CONTENT] == Source("a", "one").digest
    fetched = memory.fetch("b", 3, 0, 9)
    assert torch.equal(fetched.keys[0, :, 0], fetched.token_ids.to(torch.float32))
    assert torch.equal(fetched.values, -fetched.keys)


def test_a_second_run_encodes_nothing(memory: Memory) -> None:
    run(texts(a="one", b="two"), memory)
    before = [one.generation for one in memory.documents()]
    again = FakeEncoder()
    report = run(texts(a="one", b="two"), memory, again)
    assert (report.unchanged, report.stored, again.documents) == (2, 0, [])
    assert [one.generation for one in memory.documents()] == before


def test_only_what_changed_is_replaced(memory: Memory) -> None:
    run(texts(a="one", b="two"), memory)
    again = FakeEncoder()
    report = run(texts(a="one", b="new", c="three"), memory, again)
    assert (report.unchanged, report.replaced, report.added) == (1, 1, 1)
    assert len(again.documents) == 2
    assert held(memory) == {"a": "one", "b": "new", "c": "three"}


@pytest.mark.parametrize("change", ["settings", "metadata", "tokenizer"])
def test_other_settings_metadata_or_tokens_encode_again(memory: Memory, change: str) -> None:
    encoder = FakeEncoder()
    run(texts(a="one"), memory, encoder, settings={"overlap": 0})
    sources, settings, tokenizer = texts(a="one"), {"overlap": 0}, byte_tokenizer()
    if change == "settings":
        settings = {"overlap": 32}
    elif change == "metadata":
        sources = [replace(sources[0], metadata={"root": "here", "year": 2020})]
    else:
        tokenizer.add_tokens(["one"])
    report = ingest(sources, encoder, tokenizer, memory, settings=settings)
    assert (report.replaced, report.unchanged) == (1, 0)
    assert len(list(memory.documents())) == 1


def test_token_ids_are_stored_as_given(memory: Memory) -> None:
    report = ingest([Source("a", token_ids=(7, 8, 9))], FakeEncoder(), None, memory)
    assert report.added == 1
    assert memory.fetch("a", 1, 0, 3).token_ids.tolist() == [7, 8, 9]


def test_documents_without_tokens_are_told_and_not_stored(memory: Memory) -> None:
    notes = Notes()
    report = ingest(texts(a="", b="x"), FakeEncoder(), TOKENIZER, memory, special_tokens=False, notes=notes)
    assert list(held(memory)) == ["b"]
    assert [(one.first, one.why) for one in report.left_out] == [("a", "is empty")]


def test_progress_ends_with_what_is_stored_and_read(memory: Memory) -> None:
    told: list[IngestReport] = []
    sources = [Source(str(n), "x" * 10, size=10) for n in range(20)]
    report = run(sources, memory, on_progress=told.append)
    assert report.added == 20 and report.bytes_read == 200
    assert [one.bytes_read for one in told] == sorted(one.bytes_read for one in told)
    assert told[-1].added == 20


# --- Whose documents ------------------------------------------------------------------------------------------------


def test_documents_of_others_are_replaced_only_on_demand(memory: Memory) -> None:
    memory.put("a", torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8))
    with pytest.raises(AlreadyExists, match="'a' that was not ingested"):
        run(texts(a="one"), memory)
    assert run(texts(a="one"), memory, replace=True).replaced == 1


def test_documents_from_another_root_are_replaced_only_on_demand(memory: Memory) -> None:
    run(texts(a="one"), memory)
    elsewhere = [Source("a", "two", metadata={"root": "there"})]
    with pytest.raises(AlreadyExists, match="'a' from here, not from there"):
        run(elsewhere, memory)
    assert run(elsewhere, memory, replace=True).replaced == 1


def test_pruning_removes_what_belongs_and_is_gone(memory: Memory) -> None:
    memory.put("mine", torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8))
    run(texts(a="one", b="two", **{"other/c": "three"}), memory)
    assert run(texts(a="one"), memory).removed == 0
    report = run(texts(a="one"), memory, belongs=lambda document: not document.id.startswith("other/"))
    assert report.removed == 1
    assert sorted(one.id for one in memory.documents()) == ["a", "mine", "other/c"]


def test_nothing_is_pruned_if_part_of_the_corpus_could_not_be_read(memory: Memory) -> None:
    run(texts(a="one", b="two"), memory)
    notes = Notes()
    notes(Note("b", "cannot be read: Permission denied", unread=True))
    report = run(texts(a="one"), memory, belongs=lambda _: True, notes=notes)
    assert report.removed == 0 and len(list(memory.documents())) == 2
    assert any("not pruned" in one.why for one in report.left_out)


# --- Errors ---------------------------------------------------------------------------------------------------------


def test_an_error_while_reading_keeps_what_was_stored_and_the_next_run_goes_on(memory: Memory) -> None:
    def broken() -> Iterator[Source]:
        yield from texts(**{f"d{n}": f"text {n}" for n in range(10)})
        raise InvalidArgument("line 11 is no JSON")

    told: list[IngestReport] = []
    with pytest.raises(InvalidArgument, match="line 11"):
        run(broken(), memory, on_progress=told.append)
    stored = len(list(memory.documents()))
    assert told[-1].added == stored == 8  # The fake looks two documents ahead.
    report = run(texts(**{f"d{n}": f"text {n}" for n in range(10)}), memory)
    assert (report.unchanged, report.added) == (8, 2)


def test_the_first_failed_upload_stops_the_run(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    put = memory.put

    def failing(document: str, *args: Tensor, **options: object) -> DocumentInfo:
        if document == "d3":
            raise Unavailable("the service went away")
        return put(document, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(memory, "put", failing)
    many, encoder = texts(**{f"d{n}": "text" for n in range(1000)}), FakeEncoder()
    told: list[IngestReport] = []

    def slow() -> Iterator[Source]:
        for source in many:
            time.sleep(0.001)
            yield source

    with pytest.raises(Unavailable, match="went away"):
        run(slow(), memory, encoder, on_progress=told.append)
    assert len(encoder.documents) < 900
    assert told[-1].added == len(list(memory.documents()))
    monkeypatch.undo()
    run(many, memory)
    assert len(held(memory)) == 1000


def test_an_interrupted_run_finishes_what_is_under_way(memory: Memory) -> None:
    def interrupted() -> Iterator[Source]:
        yield from texts(**{f"d{n}": "text" for n in range(5)})
        raise KeyboardInterrupt

    told: list[IngestReport] = []
    with pytest.raises(KeyboardInterrupt):
        run(interrupted(), memory, on_progress=told.append)
    assert told[-1].added == len(list(memory.documents())) == 3


def test_a_memory_of_another_model_is_refused_before_anything_is_encoded() -> None:
    encoder = FakeEncoder()
    with (
        Memory.open(":memory:", spec=replace(SPEC, fingerprint=Fingerprint("fake", weights="others"))) as memory,
        pytest.raises(WrongModel),
    ):
        run(texts(a="one"), memory, encoder)
    assert encoder.documents == []


# --- Uploads --------------------------------------------------------------------------------------------------------


def outgoing(name: str, tokens: int = 4, *, metadata: Mapping[str, Scalar] | None = None) -> Outgoing:
    zeros = torch.zeros(2, 2, tokens, 8)
    return Outgoing(name, zeros, zeros, torch.zeros(tokens, dtype=torch.int64), metadata or {}, False)


def test_uploads_run_at_once_but_no_more_bytes_than_allowed(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    put, size = memory.put, outgoing("x").nbytes
    at_once, most, lock = 0, 0, threading.Lock()

    def watched(*args: object, **options: object) -> DocumentInfo:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.01)
        with lock:
            at_once -= 1
        return put(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(memory, "put", watched)
    with Uploads(memory, lambda _: None, most_bytes=3 * size) as uploads:
        for number in range(20):
            uploads.put(outgoing(str(number)))
        uploads.put(outgoing("larger than all that is allowed", 100))
    assert 2 <= most <= 3
    assert len(list(memory.documents())) == 21


def test_a_document_that_somebody_else_just_stored_alike_is_no_error(memory: Memory) -> None:
    memory.put("a", torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8), metadata={"fot.sha256": "x"})
    with Uploads(memory, lambda _: None) as uploads:
        uploads.put(outgoing("a", metadata={"fot.sha256": "x"}))
    with pytest.raises(AlreadyExists), Uploads(memory, lambda _: None) as uploads:
        uploads.put(outgoing("a", metadata={"fot.sha256": "y"}))


# --- The real encoder -----------------------------------------------------------------------------------------------


def test_a_directory_goes_through_a_real_model_and_its_text_comes_back(tmp_path: Path) -> None:
    for name in ("encoder.py", "decoder.py"):
        (tmp_path / name).write_text(f"# {name}\n" + "x = 1\n" * 40)
    with FotModel.from_pretrained(save_tiny_llama(tmp_path / ".model"), mem_layers=(1, 2), window=64) as model:
        encoder = Encoder(model, overlap=16)
        with Memory.open(tmp_path / ".memory", spec=encoder.spec) as memory:
            report = ingest(read([tmp_path]), encoder, TOKENIZER, memory, settings=settings_of(encoder))
            assert report.added == 2
            assert held(memory)["encoder.py"] == (tmp_path / "encoder.py").read_text()
            ids = memory.fetch("encoder.py", 1, 0, memory.get("encoder.py").tokens)
            (alone,) = encoder.encode([ids.token_ids])
            torch.testing.assert_close(alone.keys[0], ids.keys, rtol=0, atol=0.02)
            again = ingest(read([tmp_path]), encoder, TOKENIZER, memory, settings=settings_of(encoder))
            assert again.unchanged == 2
            wider = Encoder(model, overlap=8)
            changed = ingest(read([tmp_path]), wider, TOKENIZER, memory, settings=settings_of(wider))
            assert changed.replaced == 2
