"""Files, rows and datasets become documents: ids, texts, metadata, and what is said of the rest."""

from __future__ import annotations

import codecs
import gzip
import json
import os
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from hashlib import sha256
from pathlib import Path

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from pyarrow import parquet
from tokenizers import processors

from memory_service import InvalidArgument, NotFound
from memory_service.store.uploads import Request
from memory_service.types.documents import MAX_METADATA_BYTES, MAX_METADATA_KEYS
from model_worker.corpus import (
    BadBytes,
    Choice,
    Columns,
    Format,
    Note,
    Notes,
    Source,
    corpus_bytes,
    read,
    token_ids,
    tokenizer_digest,
)
from model_worker.corpus.source import fitting
from tests.model_worker.tiny import byte_tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A directory with a bit of everything."""
    root = tmp_path / "corpus"
    for name, content in {
        "readme.md": b"# Title\r\n",
        "notes.txt": b"plain",
        "LICENSE": b"free",
        "package/module.py": b"x = 1\n",
        "package/deep/table.csv": b"a,b\n",
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0\0",
        ".hidden/secret.txt": b"no",
        ".env": b"no",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(sources: Iterator[Source]) -> list[str]:
    return [source.id for source in sources]


# --- Files ----------------------------------------------------------------------------------------------------------


def test_a_directory_is_read_in_order_and_documents_are_called_by_their_paths(corpus: Path) -> None:
    assert ids(read([corpus])) == ["LICENSE", "notes.txt", "package/deep/table.csv", "package/module.py", "readme.md"]


def test_hidden_and_binary_files_are_left_out_and_told(corpus: Path) -> None:
    told: list[Note] = []
    list(read([corpus], note=told.append))
    assert [(note.where, note.why) for note in told] == [
        (".env", "is hidden"), (".hidden", "is hidden"), ("picture.png", "is binary"),
    ]  # fmt: skip


def test_a_text_is_the_files_content_byte_for_byte(corpus: Path) -> None:
    (found,) = read([corpus / "readme.md"])
    assert found.text == "# Title\r\n"
    assert found.digest == sha256(b"# Title\r\n").hexdigest()


def test_metadata_of_a_file_say_what_it_is(corpus: Path) -> None:
    found = {source.id: source.metadata for source in read([corpus])}
    assert found["package/module.py"] == {
        "path": "package/module.py", "root": "corpus", "name": "module.py", "suffix": "py", "lang": "python",
        "format": "code", "size": 6,
    }  # fmt: skip
    assert found["readme.md"]["format"] == "markdown"
    assert found["notes.txt"]["format"] == "text"
    assert "suffix" not in found["LICENSE"] and "lang" not in found["LICENSE"]


def test_given_metadata_and_prefix_are_added_to_every_document(corpus: Path) -> None:
    found = list(read([corpus], prefix="manual/", metadata={"year": 2020, "lang": "german"}))
    assert {source.metadata["year"] for source in found} == {2020}
    assert {source.metadata["lang"] for source in found} == {"german"}
    assert found[0].id == "manual/LICENSE"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(include=("*.py",)), ["package/module.py"]),
        (Choice(include=("**/*.md",)), ["readme.md"]),
        (Choice(include=("package/*",)), ["package/deep/table.csv", "package/module.py"]),
        (Choice(exclude=("package/*", "LICENSE")), ["notes.txt", "readme.md"]),
        (Choice(include=("*.md", "*.txt"), exclude=("read*",)), ["notes.txt"]),
    ],
)
def test_patterns_choose_files(corpus: Path, choice: Choice, expected: list[str]) -> None:
    assert ids(read([corpus], choice=choice)) == expected


def test_the_bytes_of_a_corpus_are_those_its_documents_and_notes_say_they_read(corpus: Path) -> None:
    notes = Notes()
    assert sum(source.size for source in read([corpus], note=notes)) + notes.bytes_read == corpus_bytes([corpus])


def test_a_path_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file or directory"):
        list(read([tmp_path / "absent"]))
    with pytest.raises(NotFound, match="give a pattern as include"):
        list(read([tmp_path / "*.py"]))


def test_documents_are_called_from_the_directory_that_holds_all_paths(tmp_path: Path) -> None:
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "same.txt").write_text(directory)
    expected = ["a/same.txt", "b/same.txt"]
    assert ids(read([tmp_path])) == expected
    assert ids(read([tmp_path / "a", tmp_path / "b"])) == expected
    assert ids(read(sorted(tmp_path.glob("*/*.txt")))) == expected
    assert {source.metadata["root"] for source in read(sorted(tmp_path.glob("*/*.txt")))} == {tmp_path.name}
    assert ids(read([tmp_path / "a"])) == ids(read([tmp_path / "b/../a/same.txt"])) == ["same.txt"]


def test_two_documents_of_one_name_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(InvalidArgument, match=r"two documents are called 'file.txt', the second is in .*/file.txt"):
        list(read([tmp_path, tmp_path / "file.txt"]))


def test_links_are_followed_to_files_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("here")
    (tmp_path / "link.txt").symlink_to("file.txt")
    (tmp_path / "circle").symlink_to(".")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    told: list[Note] = []
    assert ids(read([tmp_path], note=told.append)) == ["file.txt", "link.txt"]
    assert [(note.where, note.why) for note in told] == [
        ("broken.txt", "is no file"), ("circle", "is a link to a directory"),
    ]  # fmt: skip


def test_names_that_cannot_be_printed_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "two\nlines.txt").write_text("x")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("x")
    assert ids(read([tmp_path])) == ["two%0Alines.txt", "%FF.txt"]


# --- Bytes to text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.py", b"# coding: latin-1\ns = '\xe9'\n", "# coding: latin-1\ns = 'é'\n"),
        ("a.py", b"# coding: unheard-of\n", "# coding: unheard-of\n"),
        ("a.txt", b"# coding: latin-1\n", "# coding: latin-1\n"),
        ("a.txt", codecs.BOM_UTF8 + "é".encode(), "é"),
        ("a.txt", "wörld".encode("utf-16"), "wörld"),
        ("a.txt", codecs.BOM_UTF32_BE + "wörld".encode("utf-32-be"), "wörld"),
        ("a.txt", b"bad \xff byte", "bad \ufffd byte"),
    ],
)
def test_bytes_are_read_in_the_encoding_they_tell(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert [source.text for source in read([tmp_path])] == [text]


def test_bad_bytes_are_replaced_skipped_or_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a long enough line, then \xff")
    told: list[Note] = []
    assert len(list(read([tmp_path], note=told.append))) == 1
    assert not list(read([tmp_path], bad_bytes=BadBytes.SKIP, note=told.append))
    assert [note.why for note in told] == ["is not valid utf-8: bad bytes were replaced", "is not valid utf-8"]
    assert [note.unread for note in told] == [False, True]
    with pytest.raises(InvalidArgument, match="not valid utf-8 at byte 25"):
        list(read([tmp_path], bad_bytes=BadBytes.FAIL))


def test_a_file_of_undecodable_bytes_is_binary_unless_it_is_asked_for_as_text(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(range(128, 256)))
    told: list[Note] = []
    assert not list(read([tmp_path], note=told.append))
    assert told[0].why == "is binary"
    assert len(list(read([tmp_path], choice=Choice(Format.TEXT)))) == 1


# --- Rows -----------------------------------------------------------------------------------------------------------


def test_lines_of_json_are_documents_with_their_plain_fields_as_metadata(tmp_path: Path) -> None:
    file = rows(
        tmp_path / "rows.jsonl",
        {"text": "one", "year": 2020, "score": 0.5, "good": True, "tags": ["x"], "none": None},
        {"text": "two", "path": "of the row"},
    )
    first, second = read([file])
    assert (first.id, first.text) == ("rows.jsonl#0", "one")
    assert first.metadata == {
        "path": "rows.jsonl", "root": tmp_path.name, "format": "jsonl", "row": 0, "year": 2020, "score": 0.5,
        "good": True,
    }  # fmt: skip
    assert second.metadata["path"] == "of the row"


def test_empty_lines_count_and_empty_texts_are_told(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('\n{"text": null}\n{"text": "x"}\n{"text": " "}\n{"input_ids": []}')
    told: list[Note] = []
    assert ids(read([file], note=told.append)) == ["rows.jsonl#2"]
    assert [(note.where, note.why) for note in told] == [(f"rows.jsonl#{n}", "has no text") for n in (1, 3, 4)]


def test_gzipped_lines_are_read_and_damaged_ones_refused(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "x"}\n' * 3)
    (tmp_path / "rows.jsonl.gz").write_bytes(packed)
    assert len(list(read([tmp_path]))) == 3
    (tmp_path / "rows.jsonl.gz").write_bytes(packed[:-9])
    with pytest.raises(InvalidArgument, match="is damaged"):
        list(read([tmp_path]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "x"}\nnonsense', r"line 2 of .*rows.jsonl is no JSON"),
        ("[1]", "no JSON object but a list"),
        ('{"body": "x"}', "neither 'text' nor 'input_ids'; name the field of the text, of body"),
        ('{"text": 3}', "field 'text' of rows.jsonl#0 holds a int, not text"),
        ('{"input_ids": [1, -1]}', "should hold token ids"),
        ('{"input_ids": "12"}', "should hold token ids"),
    ],
)
def test_lines_that_are_not_as_announced_are_errors(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(InvalidArgument, match=message):
        list(read([tmp_path]))


def test_fields_can_be_named(tmp_path: Path) -> None:
    file = rows(tmp_path / "rows.jsonl", {"body": "one", "key": 7, "lang": "py", "size": 3})
    (found,) = read([file], columns=Columns(text="body", id="key", metadata=("lang",)), prefix="x:")
    assert (found.id, found.text) == ("x:7", "one")
    assert found.metadata["lang"] == "py" and "size" not in found.metadata


def test_ids_of_rows_must_be_there_and_differ(tmp_path: Path) -> None:
    file = rows(tmp_path / "rows.jsonl", {"text": "a", "key": "same"}, {"text": "b", "key": "same"})
    with pytest.raises(InvalidArgument, match="two documents are called 'same'"):
        list(read([file], columns=Columns(id="key")))
    with pytest.raises(InvalidArgument, match=r"field 'other' of rows.jsonl#0 should be the document's id"):
        list(read([file], columns=Columns(id="other")))
    rows(file, {"text": "a", "key": "x" * 513})
    with pytest.raises(InvalidArgument, match="1 to 512 bytes"):
        list(read([file], columns=Columns(id="key")))


def test_token_ids_win_over_text_and_padding_is_dropped(tmp_path: Path) -> None:
    file = rows(tmp_path / "rows.jsonl", {"text": "no", "input_ids": [2, 2, 5, 6], "attention_mask": [0, 0, 1, 1]})
    (found,) = read([file])
    assert (found.text, found.token_ids) == (None, (5, 6))
    assert "attention_mask" not in found.metadata


def test_parquet_rows_are_documents_and_only_needed_columns_are_read(tmp_path: Path) -> None:
    table = {
        "text": [f"row {n}" for n in range(100)],
        "when": [date(2020, 1, 1)] * 100,
        "price": [Decimal("1.50")] * 100,
        "huge": pyarrow.array([2**64 - 1] * 100, pyarrow.uint64()),
        "nested": [[1, 2]] * 100,
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    found = list(read([tmp_path]))
    assert [source.text for source in found] == table["text"]
    assert found[99].id == "rows.parquet#99"
    assert found[99].metadata == {
        "path": "rows.parquet", "root": tmp_path.name, "format": "parquet", "row": 99, "when": "2020-01-01",
        "price": "1.50", "huge": str(2**64 - 1),
    }  # fmt: skip


def test_parquet_without_the_field_or_damaged_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": ["x"]}), file)
    with pytest.raises(InvalidArgument, match=r"rows.parquet has neither 'text' nor 'input_ids'.* of body"):
        list(read([file]))
    with pytest.raises(InvalidArgument, match="no field 'year'; there are body"):
        list(read([file], columns=Columns(text="body", metadata=("year",))))
    file.write_bytes(b"PAR1 or not")
    with pytest.raises(InvalidArgument, match="cannot be read as Parquet"):
        list(read([file]))


def test_a_saved_dataset_is_read_row_by_row(tmp_path: Path) -> None:
    features = Features(
        {"input_ids": Sequence(Value("int32")), "attention_mask": Sequence(Value("int8")), "label": ClassLabel(2)}
    )
    saved = Dataset.from_dict(
        {"input_ids": [[5, 6], [2, 7]], "attention_mask": [[1, 1], [0, 1]], "label": [0, 1]}, features
    ).with_format("torch")
    saved.save_to_disk(tmp_path / "saved")
    found = list(read([tmp_path / "saved"]))
    assert [(source.id, source.token_ids) for source in found] == [("saved#0", (5, 6)), ("saved#1", (7,))]
    assert found[1].metadata == {"path": "saved", "root": tmp_path.name, "format": "dataset", "row": 1, "label": 1}
    assert ids(read([tmp_path])) == ["saved#0", "saved#1"]


def test_splits_are_part_of_the_ids(tmp_path: Path) -> None:
    splits = {"train": Dataset.from_dict({"text": ["a", "b"]}), "test": Dataset.from_dict({"text": ["c"]})}
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    found = {source.id: source.text for source in read([tmp_path / "both"])}
    assert found == {"both/train#0": "a", "both/train#1": "b", "both/test#0": "c"}


def test_a_directory_that_is_no_dataset_is_not_read_as_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="holds no dataset"):
        list(read([tmp_path], choice=Choice(Format.DATASET)))
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InvalidArgument, match="read it as auto or dataset, not as text"):
        list(read([tmp_path / "saved"], choice=Choice(Format.TEXT)))


# --- Metadata and tokens --------------------------------------------------------------------------------------------


def test_metadata_that_fit_are_taken_by_a_memory_and_the_rest_is_told() -> None:
    kept, out = fitting({f"field {n}": "x" * 900 for n in range(100)} | {"long": "x" * 2000, "fot.x": 1, "list": []})
    Request("id", 1, kept | {f"fot.{n}": "y" * 64 for n in range(8)}, conflict=None, request_id="").check()  # type: ignore[arg-type]
    assert len(json.dumps(kept)) > MAX_METADATA_BYTES * 0.8
    assert "hold" in out["field 99"] and "longer" in out["long"] and "begins" in out["fot.x"] and "list" in out["list"]
    many, _ = fitting({str(n): n for n in range(100)})
    assert len(many) == MAX_METADATA_KEYS - 8


def test_a_field_that_is_no_metadata_is_noted_once_however_many_rows_have_it(tmp_path: Path) -> None:
    file = rows(tmp_path / "rows.jsonl", *({"text": "t", "summary": "x" * 2000, "tags": []} for _ in range(5)))
    notes = Notes()
    assert len(list(read([file], note=notes))) == 5
    (one,) = notes.left_out
    assert "'summary'" in one.why and one.times == 5


def test_what_reads_like_a_special_token_stays_text() -> None:
    tokenizer = byte_tokenizer()
    found = token_ids(Source("a", "x</s>"), tokenizer)
    assert found.tolist() == [0, *(byte + 4 for byte in b"x</s>")]
    assert token_ids(Source("a", "x"), tokenizer, special_tokens=False).tolist() == [ord("x") + 4]


def test_an_empty_file_is_a_document_of_one_token_where_there_is_one_for_it() -> None:
    tokenizer = byte_tokenizer()
    assert token_ids(Source("a", ""), tokenizer).tolist() == [0]
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    tokenizer.bos_token = None
    assert token_ids(Source("a", "x"), tokenizer).tolist() == [ord("x") + 4]
    assert token_ids(Source("a", ""), tokenizer).tolist() == [1]
    assert token_ids(Source("a", ""), tokenizer, special_tokens=False).tolist() == []


def test_token_ids_of_another_tokenizer_are_refused() -> None:
    assert token_ids(Source("a", token_ids=(259,)), byte_tokenizer()).tolist() == [259]
    with pytest.raises(InvalidArgument, match="has token 260, the tokenizer has 260"):
        token_ids(Source("a", token_ids=(260,)), byte_tokenizer())
    with pytest.raises(InvalidArgument, match="needs a tokenizer"):
        token_ids(Source("a", "text"), None)


def test_the_digest_of_a_tokenizer_changes_with_its_ids_only() -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=1)
    assert tokenizer_digest(tokenizer) == before == tokenizer_digest(byte_tokenizer())
    tokenizer.add_tokens(["hello"])
    assert tokenizer_digest(tokenizer) != before
