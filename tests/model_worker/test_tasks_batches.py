"""Batches of training: what is scored can be known, what is asked stands in the memory of the window that asks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from memory_service.errors import InvalidArgument, NotFound
from model_worker import reference
from model_worker.tasks import corpus, dictionary, labels
from model_worker.tasks.corpus import Kind, Split, Text
from model_worker.tasks.landmark import DESCRIPTION
from model_worker.tasks.parts import Part, Role
from model_worker.tasks.tokens import Tokenizer, tokens_of
from model_worker.training.batches import Batch, Shape, Source, source_of
from model_worker.training.part_encoder import PartEncoder
from model_worker.training.reads import grouped
from model_worker.training.retrieval import WEIGHTS, RetrievalSource
from tests.model_worker.tiny import byte_tokenizer

SHAPE = Shape(documents=8, windows=2, group=4, keys=3, questions=3)
LINE = re.compile(r"\n(?:The|Note that the) ([a-z ]+?) is (\d+)\.(?: Remember it\. (\d+) is the ([a-z ]+?)\.)?\n")
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokens are not kept among those of the person who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return tokens_of(reference.path("reference"))


@pytest.fixture(scope="module")
def source(small: Tokenizer) -> RetrievalSource:
    return retrieval(small)


def retrieval(tokenizer: Tokenizer, seed: int = 3, **options: float) -> RetrievalSource:
    """With two short texts in place of everything that a machine has."""
    code = "".join(f"def function_{n}(x):\n    return x + {n}\n\n" for n in range(60))
    prose = "".join(f"Chapter {n}. It was a dark night, and nobody knew the hour. " for n in range(60))
    return RetrievalSource(tokenizer, seed, [Text("c", Kind.CODE, code), Text("p", Kind.PROSE, prose)], **options)


def documents(batch: Batch) -> list[list[int]]:
    """The tokens of each document, and the one after its last."""
    rows = batch.ids.view(-1, batch.rows_per_document * batch.ids.shape[1])
    last = batch.targets[batch.rows_per_document - 1 :: batch.rows_per_document, -1]
    return [[*row, int(end)] for row, end in zip(rows.tolist(), last, strict=True)]


def equal(one: Batch, other: Batch) -> bool:
    names = ("ids", "targets", "weights", "answers")
    return one.reads == other.reads and all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


# --- All sources ----------------------------------------------------------------------------------------------------


NAMES = ("retrieval", "dictionary", "documents")


def made(name: str, tokenizer: Tokenizer, folder: Path) -> Source:
    if name == "retrieval":
        return retrieval(tokenizer, uuid=0.3)
    if name == "dictionary":
        return source_of("dictionary", None, 3)
    for n in range(9):
        (folder / f"{n}.txt").write_text(f"text {n}: " + " ".join(map(str, range(40 * n))))
    return source_of("documents", tokenizer, 3, paths=[str(folder)])


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_follows_from_seed_step_and_shape_alone(small: Tokenizer, tmp_path: Path, name: str) -> None:
    one, other = (made(name, small, tmp_path) for _ in range(2))
    first = [one.batch(step, SHAPE) for step in range(4)]
    one.batch(9, Shape(documents=2, group=1))
    # Another process, going on after step 2, and the same one going back.
    assert equal(other.batch(3, SHAPE), first[3])
    assert equal(one.batch(1, SHAPE), first[1])
    assert not equal(first[0], first[1])


@pytest.mark.parametrize("name", NAMES)
def test_targets_run_on_from_window_to_window(small: Tokenizer, tmp_path: Path, name: str) -> None:
    shape = Shape(documents=4, windows=3, group=2, window=200)
    batch = made(name, small, tmp_path).batch(0, shape)
    assert batch.ids.shape == batch.targets.shape == batch.weights.shape == batch.answers.shape == (12, 200)
    assert (batch.ids.dtype, batch.weights.dtype, batch.answers.dtype) == (torch.int64, torch.float32, torch.bool)
    assert torch.equal(batch.ids.view(4, 600)[:, 1:], batch.targets.view(4, 600)[:, :-1])
    assert batch.rows_per_document == 3
    assert batch.reads == grouped(4, 3, 2)
    assert bool((batch.weights[batch.answers] > 0).all())
    assert batch.tokens == shape.tokens == 2400


def test_training_draws_real_text_from_files_that_evaluation_never_scores(
    small: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Split | None] = []

    def few(split: Split | None = None, kind: Kind | None = None) -> list[Text]:
        asked.append(split)
        return [Text("c", Kind.CODE, "x = 1\n" * 99)]

    monkeypatch.setattr(corpus, "texts", few)
    source_of("retrieval", small, 0).batch(0, SHAPE)
    assert asked == [Split.TRAIN]


def test_an_unknown_source_or_option_is_told_with_what_there_is(small: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match="there are retrieval, documents, dictionary"):
        source_of("passkeys", small, 0)
    with pytest.raises(InvalidArgument, match="no option uuids; it has uuid, plain"):
        source_of("retrieval", small, 0, uuids=0.1)
    with pytest.raises(InvalidArgument, match="needs the option paths"):
        source_of("documents", small, 0)
    with pytest.raises(InvalidArgument, match="give the configuration a tokenizer"):
        source_of("retrieval", None, 0)
    with pytest.raises(InvalidArgument, match="uuid is a share"):
        source_of("retrieval", small, 0, uuid=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"documents": 8, "group": 3}, "divides"), ({"windows": 0}, "windows"), ({"uuid": 1.5}, "share"),
     ({"weight": 0}, "weight")],
)  # fmt: skip
def test_a_shape_that_cannot_be_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Shape(**fields)  # type: ignore[arg-type]


# --- Retrieval ------------------------------------------------------------------------------------------------------


def test_every_answer_is_stated_in_the_own_document_and_labels_differ_in_a_group(
    small: Tokenizer, source: RetrievalSource
) -> None:
    asked = 0
    for step in range(6):
        batch = source.batch(step, SHAPE)
        texts = [small.decode(ids) for ids in documents(batch)]
        stated = [{label: key for label, key, _, _ in LINE.findall(text)} for text in texts]
        for group in range(0, len(texts), SHAPE.group):
            every = [label for one in stated[group : group + SHAPE.group] for label in one]
            assert len(every) == len(set(every))
            assert every.count(labels.PLAIN) <= 1
        for text, keys in zip(texts, stated, strict=True):
            for label, again, key in re.findall(r"\nWhat is the ([a-z ]+?)\? The ([a-z ]+?) is (\d+)\.", text):
                assert label == again and keys[label] == key
                asked += 1
    assert asked > 40


def test_the_answers_marked_are_the_keys_asked_for_and_nothing_else(small: Tokenizer, source: RetrievalSource) -> None:
    for step in range(4):
        batch = source.batch(step, SHAPE)
        assert not batch.answers[0::2].any()  # Memory windows answer nothing.
        for row in range(1, len(batch.ids), 2):
            marked = batch.answers[row].nonzero()[:, 0]
            runs = np.split(marked.numpy(), np.flatnonzero(np.diff(marked.numpy()) > 1) + 1)
            text = small.decode([*batch.ids[row].tolist(), int(batch.targets[row, -1])])
            for run in runs:
                before = small.decode(batch.ids[row, : run[0] + 1].tolist())
                key = small.decode(batch.targets[row, run].tolist())
                assert re.search(r"(\n|\? )The [a-z ]+ is $", before) and key.isdigit()
                assert text[len(before) + len(key)] == "."
                assert set(batch.weights[row, run].tolist()) == {WEIGHTS[Role.ANSWER]}
                # Where a key ends is known from memory alone as well.
                assert int(run[-1]) + 1 == 256 or batch.weights[row, run[-1] + 1] == WEIGHTS[Role.STOP]


def test_a_key_is_not_scored_where_it_is_first_stated_and_most_where_it_is_repeated(
    small: Tokenizer, source: RetrievalSource
) -> None:
    found = 0
    for step in range(4):
        batch = source.batch(step, SHAPE)
        for row, ids in enumerate(documents(batch)):
            weights = batch.weights.view(-1, 512)[row].tolist()
            text, ends = "", [0]
            for one in ids:
                text += small.decode([one])
                ends.append(len(text))
            for match in LINE.finditer(text):
                if match[3] is None or not text.isascii():
                    continue
                found += 1
                for group, weight in ((2, 0.0), (3, 3.0)):
                    first, last = ends.index(match.start(group)), ends.index(match.end(group))
                    assert set(weights[first - 1 : last - 1]) == {weight}
    assert found > 20


def test_words_kept_for_evaluation_never_stand_in_a_label(small: Tokenizer, source: RetrievalSource) -> None:
    kept = set(labels.words(held_out=True))
    for step in range(10):
        for ids in documents(source.batch(step, SHAPE)):
            for label, *_ in LINE.findall(small.decode(ids)):
                assert kept.isdisjoint(label.split())


def test_the_plain_label_is_in_as_many_groups_as_wanted_and_asked_where_it_is(small: Tokenizer) -> None:
    for share, low, high in ((0.0, 0, 0), (1.0, 40, 40)):
        source = retrieval(small, plain=share)
        texts = [small.decode(ids) for step in range(20) for ids in documents(source.batch(step, SHAPE))]
        stating = [text for text in texts if re.search(r"\n(The|Note that the) pass key is \d+\.", text)]
        assert low <= len(stating) <= high
        assert all(len(re.findall(r"The pass key is \d+\.(?! Remember)", text)) >= 1 for text in stating)


def test_documents_have_all_fillers_and_some_the_task_before_them(small: Tokenizer, source: RetrievalSource) -> None:
    texts = [small.decode(ids) for step in range(10) for ids in documents(source.batch(step, SHAPE))]
    count = {what: sum(what in text for text in texts) for what in ("sky is blue", "def function_", "a dark night")}
    assert all(n >= 3 for n in count.values())
    assert 0.1 < sum(text.startswith(DESCRIPTION[:20]) for text in texts) / len(texts) < 0.5


def test_some_lines_lie_across_the_border_of_two_windows(small: Tokenizer, source: RetrievalSource) -> None:
    shape = Shape(documents=8, windows=3, group=1, keys=1, questions=1)
    crossing = 0
    for step in range(6):
        for ids in documents(source.batch(step, shape)):
            first, whole = small.decode(ids[:256]), small.decode(ids)
            crossing += any(match.start() < len(first) < match.end() for match in LINE.finditer(whole))
    assert 6 * 8 * 0.15 < crossing < 6 * 8 * 0.7


# --- UUIDs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [2, 4])
def test_uuid_questions_are_answered_by_a_record_of_the_own_memory(
    small: Tokenizer, source: RetrievalSource, windows: int
) -> None:
    shape = Shape(documents=4, windows=windows, group=4, questions=3, uuid=1.0)
    forms: set[str] = set()
    for step in range(8):
        batch = source.batch(step, shape)
        for row, ids in enumerate(documents(batch)):
            memory = small.decode(ids[: (windows - 1) * 256])
            records = dict(re.findall(f'"({UUID})": "({UUID})"', memory))
            end = (row + 1) * windows - 1
            text = small.decode(ids[(windows - 1) * 256 :])
            questions = re.findall(f'Key: "({UUID})"\nThe value associated with the specified key is: ({UUID})\n', text)
            again = re.findall(f'\n{{"({UUID})": "({UUID})"}}', text)
            forms |= {"asked"} if questions else set()
            forms |= {"continued"} if again else set()
            assert questions or again or batch.answers[end].any()
            assert all(records[key] == value for key, value in [*questions, *again])
            answered = small.decode(batch.targets[end][batch.answers[end]].tolist())
            wanted = [value[:8] for _, value in [*questions, *again]]
            assert all(value in answered for value in wanted)
            assert len(answered) <= 8 * (len(wanted) + 1)  # One more may be cut by the window's end.
    assert forms == {"asked", "continued"}


def test_a_value_is_scored_whole_where_it_is_asked_and_not_at_all_where_it_is_listed(small: Tokenizer) -> None:
    batch = retrieval(small).batch(0, Shape(documents=8, windows=2, group=8, questions=1, uuid=1.0))
    for row in range(0, 16, 2):
        listed = list(re.finditer(UUID, small.decode(batch.targets[row].tolist())))
        ends = np.cumsum([len(small.decode([one])) for one in batch.targets[row].tolist()])
        assert len(listed) >= 4
        for match in listed:
            inside = (ends > match.start()) & (ends <= match.end())
            assert float(batch.weights[row][torch.from_numpy(inside)].max()) == 0.0
    # 8 digits that find the record, 28 characters that follow, once a document.
    scored = [(batch.weights[row] == WEIGHTS[Role.COPIED]).sum().item() for row in range(1, 16, 2)]
    assert scored == [28] * 8
    assert batch.answers.sum(-1)[1::2].tolist() == [8] * 8


def test_the_later_tokens_of_a_value_weigh_what_was_asked(small: Tokenizer) -> None:
    shape = Shape(documents=4, windows=2, group=4, questions=1, uuid=1.0)
    usual, heavy = retrieval(small).batch(0, shape), retrieval(small, copied=6.0).batch(0, shape)
    assert torch.equal(usual.ids, heavy.ids)
    copied = usual.weights == WEIGHTS[Role.COPIED]
    assert copied.sum() == 4 * 28
    assert torch.equal(heavy.weights, torch.where(copied, 6.0, usual.weights))


def test_some_uuid_questions_begin_their_window(small: Tokenizer) -> None:
    shape = Shape(documents=8, windows=2, group=8, questions=2, uuid=1.0)
    source = retrieval(small, bare=0.5)
    windows = [small.decode(ids[256:]) for step in range(20) for ids in documents(source.batch(step, shape))]
    bare = [text.startswith(('\n\nKey: "', '\n{"')) for text in windows]
    assert sum(bare) / len(bare) == pytest.approx(0.5, abs=0.12)
    assert all(re.search(UUID, text) for text in windows)


def test_the_share_of_uuid_documents_is_what_was_asked(small: Tokenizer) -> None:
    source = retrieval(small, uuid=0.25)
    texts = [small.decode(ids) for step in range(40) for ids in documents(source.batch(step, SHAPE))]
    assert sum(bool(re.search(UUID, text)) for text in texts) / len(texts) == pytest.approx(0.25, abs=0.08)
    none = source.batch(0, Shape(documents=8, group=4, uuid=0.0))
    assert not any(re.search(UUID, small.decode(ids)) for ids in documents(none))


def test_windows_too_short_for_what_is_asked_are_refused(small: Tokenizer, source: RetrievalSource) -> None:
    with pytest.raises(InvalidArgument, match="too short for UUID questions"):
        source.batch(0, Shape(window=128, uuid=1.0))
    with pytest.raises(InvalidArgument, match="2 windows or more"):
        source.batch(0, Shape(windows=1))
    with pytest.raises(InvalidArgument, match="fewer keys"):
        for step in range(20):
            source.batch(step, Shape(window=64, keys=9))


# --- Tokens of parts ------------------------------------------------------------------------------------------------


def test_parts_are_tokenised_as_the_whole_where_the_vocabulary_joins_over_their_borders(small: Tokenizer) -> None:
    parts = [Part("\nThe", Role.PLAIN), Part(" door", Role.PLAIN), Part(" is ", Role.PLAIN), Part("12", Role.NEW)]
    quick, exact = PartEncoder(small), PartEncoder(Joining(small))
    assert quick.separable and not exact.separable
    assert quick(parts) == small.encode_parts([part.text for part in parts])
    assert exact(parts) == Joining(small).encode_parts([part.text for part in parts])


class Joining:
    """Joins a full stop with the digit before it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.size, self.begin, self.end, self.name = tokenizer.size + 10, None, tokenizer.end, "joining"

    def encode(self, text: str) -> list[int]:
        return self.encode_parts([text])[0]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_parts(self, parts: list[str]) -> tuple[list[int], list[int]]:
        ids, owners = self._tokenizer.encode_parts(parts)
        stop, digits = self._tokenizer.encode(".")[0], [self._tokenizer.encode(str(n))[0] for n in range(10)]
        made: list[int] = []
        told: list[int] = []
        for one, owner in zip(ids, owners, strict=True):
            if one == stop and made and made[-1] in digits:
                made[-1], told[-1] = self._tokenizer.size + digits.index(made[-1]), owner
            else:
                made.append(one)
                told.append(owner)
        return made, told

    def decode(self, ids: list[int]) -> str:
        raise AssertionError("not asked for here")


def test_retrieval_works_with_another_vocabulary() -> None:
    tokenizer = tokens_of(byte_tokenizer())
    batch = retrieval(tokenizer).batch(0, Shape(documents=2, window=600, uuid=0.0, group=2))
    row = batch.answers.any(-1).nonzero()[0, 0]
    answered = tokenizer.decode(batch.targets[row][batch.answers[row]].tolist())
    assert answered.isdigit()


# --- Dictionary -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [Shape(64, 2, 1, 36), Shape(4, 2, 4, 66), Shape(16, 2, 16, 256, hard=1.0),
                                   Shape(4, 3, 2, 126, hard=0.5), Shape(2, 2, 1, 61)])  # fmt: skip
def test_dictionary_questions_are_about_whole_records_of_the_own_memory_with_keys_of_their_own(shape: Shape) -> None:
    source = source_of("dictionary", None, 1)
    whole = (shape.window - 6) // 10
    for step in range(3):
        batch = source.batch(step, shape)
        answers = batch.answers.view(shape.documents, -1)
        assert answers.sum(-1).tolist() == [4 * whole] * shape.documents
        assert torch.equal(batch.weights, batch.answers.float())
        for first in range(0, shape.documents, shape.group):
            keys: list[tuple[int, ...]] = []
            for document in range(first, first + shape.group):
                ids = documents(batch)[document]
                stored: dict[tuple[int, ...], list[int]] = {}
                memory = (shape.windows - 1) * shape.window
                for at in range(memory - 9):
                    window = at // shape.window == (at + 9) // shape.window
                    if ids[at] == dictionary.KEY and window and ids[at + 5] == dictionary.VALUE:
                        stored[tuple(ids[at + 1 : at + 5])] = ids[at + 6 : at + 10]
                keys += stored
                marked = answers[document].nonzero()[:, 0].view(whole, 4).tolist()
                for spot in marked:
                    begin = spot[0] + 1 - 6  # A target stands one token on, the record begins six before its value.
                    assert ids[begin] == dictionary.QUESTION and begin >= memory
                    assert stored[tuple(ids[begin + 1 : begin + 5])] == ids[begin + 6 : begin + 10]
                assert len({tuple(ids[spot[0] - 4 : spot[0]]) for spot in marked}) == whole
            assert len(keys) == len(set(keys))


def test_records_stand_at_any_place_of_a_window() -> None:
    source = source_of("dictionary", None, 1)
    batch = source.batch(0, Shape(64, 2, 1, 66))
    starts = {int((row == dictionary.KEY).nonzero()[0, 0]) for row in batch.ids[0::2]}
    assert len(starts) >= 7


def test_a_dictionary_window_too_short_for_a_record_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="16 tokens or more"):
        source_of("dictionary", None, 1).batch(0, Shape(window=15))


# --- Documents ------------------------------------------------------------------------------------------------------


def test_documents_go_on_from_window_to_window_and_batch_to_batch(small: Tokenizer, tmp_path: Path) -> None:
    words = [f"w{n} " + " ".join(str(Random(n).randint(0, 999)) for _ in range(300)) for n in range(3)]
    for n, text in enumerate(words):
        (tmp_path / f"{n}.txt").write_text(text)
    source = source_of("documents", small, 0, paths=[str(tmp_path)])
    shape = Shape(documents=1, windows=2, group=1, window=64)
    ids = torch.cat([source.batch(step, shape).ids.view(-1) for step in range(40)]).tolist()
    assert ids[0] == small.begin
    pieces = [piece for piece in small.decode(ids).split("<s>") if piece.endswith("</s>")]
    assert {piece.removesuffix("</s>") for piece in pieces} == set(words)
    assert len(pieces) > 3  # Once more from the start.
    weights = torch.cat([source.batch(step, shape).weights.view(-1) for step in range(40)])
    targets = torch.cat([source.batch(step, shape).targets.view(-1) for step in range(40)])
    assert torch.equal(weights == 0, targets == small.begin)


def test_documents_can_be_read_as_the_authors_let_them(small: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Title\n\n" + "some words " * 500)
    source = source_of("documents", small, 0, paths=[str(tmp_path)], cross_batch_range=3, stepping=True)
    assert source.batch(0, Shape(documents=2, windows=4, window=32)).reads[3] == (2, 1, 0)


def test_no_documents_is_an_error_that_names_the_place(small: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        source_of("documents", small, 0, paths=[str(tmp_path / "nowhere")])
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(InvalidArgument, match="has 1000 tokens or more"):
        source_of("documents", small, 0, paths=[str(tmp_path)], min_tokens=1000)
    with pytest.raises(InvalidArgument, match="needs paths"):
        source_of("documents", small, 0, paths=[])


# --- What the models that come with the package were trained on -------------------------------------------------------


def digest(source: Source, shape: Shape) -> str:
    made = sha256()
    for step in range(3):
        batch = source.batch(step, shape)
        made.update(batch.ids.numpy().tobytes() + batch.weights.numpy().tobytes() + batch.answers.numpy().tobytes())
    return made.hexdigest()[:16]


def test_batches_stay_what_they_were_when_the_shipped_models_were_trained(small: Tokenizer) -> None:
    # Whoever changes them on purpose trains the models again.
    shape = Shape(documents=8, windows=2, group=8, keys=4, questions=4)
    assert digest(retrieval(small, uuid=0.3), shape) == "2c28e13492b879a8"
    assert digest(retrieval(small, uuid=1.0, bare=0.3, copied=6.0), shape) == "b62a3ccfea9aa570"
    assert digest(retrieval(small, uuid=0.1, close=0.3), shape) == "4a738aacaacc35bf"
    assert digest(source_of("dictionary", None, 3), Shape(8, 2, 8, 256, hard=0.5)) == "d3dcd3e92d669134"
