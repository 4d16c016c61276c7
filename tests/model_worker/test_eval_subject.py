"""What studies ask of a model over documents: answers token by token, what was read, how surprising a text is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from torch.nn.functional import cross_entropy

from memory_service import AttendOptions, InvalidArgument, Unavailable
from model_worker.evaluation.bootstrap import mean_of
from model_worker.evaluation.haystacks import Cloze, haystack_of, keys_haystack, uuid_haystack
from model_worker.evaluation.place import Place
from model_worker.evaluation.subject import Library, Settings, Subject
from model_worker.settings import Recall
from model_worker.tasks.tokens import tokens_of
from tests.memory_service.places import serving
from tests.model_worker.texts import text
from tests.model_worker.tiny import save_tiny_llama

LAYER = 2
WINDOW = 96
DOCUMENTS = {f"document-{number}": text(70 + 40 * number, seed=number) for number in range(3)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def subject(checkpoint: Path) -> Iterator[Subject]:
    with Subject.open(checkpoint, Settings(mem_layers=(LAYER,), window=WINDOW)) as opened:
        yield opened


@pytest.fixture
def library(subject: Subject) -> Iterator[Library]:
    with subject.library() as opened:
        opened.put(DOCUMENTS)
        yield opened


def cloze(prompt: int, answer: int, seed: int = 9) -> Cloze:
    ids = text(prompt + answer, seed=seed).tolist()
    return Cloze(ids[:prompt], ids[prompt:])


# --- Answers --------------------------------------------------------------------------------------------------------


def test_what_greedy_decoding_says_is_right_and_any_other_token_is_wrong_at_its_place(library: Library) -> None:
    prompts = [text(20 + 7 * seed, seed=seed).tolist() for seed in range(4)]
    said = library.generate(prompts, 6)
    answers = library.ask([Cloze(prompt, answer) for prompt, answer in zip(prompts, said, strict=True)])
    assert all(one.exact and len(one.right) == 6 for one in answers)
    other = 4 if said[0][5] != 4 else 5
    assert library.ask([Cloze(prompts[0], [*said[0][:5], other])])[0].right == (True,) * 5 + (False,)


def test_a_question_among_others_is_answered_as_alone(library: Library) -> None:
    questions = [cloze(5 + 11 * seed, 3 + seed, seed) for seed in range(5)]
    together = library.ask(questions)
    for question, one in zip(questions, together, strict=True):
        (alone,) = library.ask([question])
        assert one.right == alone.right
        torch.testing.assert_close(one.reads[0].attended.lse, alone.reads[0].attended.lse, atol=1e-4, rtol=1e-4)


def test_a_prompt_of_one_token_is_enough(library: Library) -> None:
    (answer,) = library.ask([cloze(1, 8)])
    assert len(answer.right) == 8 and answer.reads[0].attended.lse.shape[1] == 8


def test_only_the_queries_that_predict_the_answer_are_told(library: Library) -> None:
    (answer,) = library.ask([cloze(30, 5)])
    assert [(read.layer, read.attended.output.shape[1]) for read in answer.reads] == [(LAYER, 5)]


def test_queries_asked_alone_find_what_the_model_reads(library: Library) -> None:
    questions = [cloze(30, 5, 1), cloze(12, 9, 2)]
    recall = Recall(top_k=8)
    asked, answers = library.queries(questions), library.ask(questions, recall=recall)
    for found, answer in zip(library.attend(asked, AttendOptions(top_k=8)), answers, strict=True):
        torch.testing.assert_close(found.lse, answer.reads[0].attended.lse, atol=1e-4, rtol=1e-4)


def test_questions_can_be_narrowed_to_documents(library: Library) -> None:
    (answer,) = library.ask([cloze(30, 5)], ["document-1"], Recall(attribution=True))
    attribution = answer.reads[0].attended.attribution
    assert attribution is not None and [one.source for one in attribution] == ["document-1"]


@pytest.mark.parametrize(("prompt", "answer"), [(60, 40), (0, 3), (3, 0)])
def test_a_question_that_cannot_be_asked_is_refused(library: Library, prompt: int, answer: int) -> None:
    with pytest.raises(InvalidArgument, match=r"window of 96|at least one token"):
        library.ask([cloze(prompt, answer)])


def test_a_row_that_is_done_is_cut_there(library: Library) -> None:
    prompts = [text(20, seed=1).tolist(), text(31, seed=2).tolist()]
    free = library.generate(prompts, 5)
    assert library.generate(prompts, 5, done=lambda ids: len(ids) == 2) == [one[:2] for one in free]
    assert [len(one) for one in free] == [5, 5]


# --- Surprise -------------------------------------------------------------------------------------------------------


def test_without_documents_a_text_surprises_as_it_does_the_plain_model(subject: Subject, library: Library) -> None:
    ids = text(2, 60, seed=5)
    found = library.surprise(ids)
    with library.model.off() as base:
        logits = base(input_ids=ids, use_cache=False).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(library.surprise(ids, ["document-0"]), expected, atol=1e-3)


def test_a_text_longer_than_the_window_is_refused(library: Library) -> None:
    with pytest.raises(InvalidArgument, match="do not fit the window"):
        library.surprise(text(1, WINDOW + 1))


# --- Places ---------------------------------------------------------------------------------------------------------


def test_a_library_lives_at_any_place_and_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    question = cloze(30, 5)
    found = []
    with serving(tmp_path / "served") as target:
        for place in (":memory:", str(tmp_path / "data"), target):
            settings = Settings(place=Place(place), mem_layers=(LAYER,), window=WINDOW)
            with Subject.open(checkpoint, settings) as subject:
                with subject.library() as library:
                    library.put(DOCUMENTS)
                    found.append(library.ask([question])[0].reads[0].attended.lse)
                assert list(subject.client.memories()) == []
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-5)


def test_documents_are_indexed_where_the_study_asks_an_index(checkpoint: Path) -> None:
    settings = Settings(Recall(top_k=4, engine="index"), mem_layers=(LAYER,), window=WINDOW)
    with Subject.open(checkpoint, settings) as subject, subject.library("Flat") as library:
        library.put(DOCUMENTS)
        (answer,) = library.ask([cloze(30, 5)])
        assert answer.reads[0].attended.engine == "index:Flat"
        exact = library.ask([cloze(30, 5)], recall=replace(library.model.recall, engine="exact"))
        torch.testing.assert_close(answer.reads[0].attended.lse, exact[0].reads[0].attended.lse)


def test_a_service_that_does_not_answer_is_told_at_once(checkpoint: Path) -> None:
    settings = Settings(place=Place("grpc://127.0.0.1:1", timeout_s=2), mem_layers=(LAYER,), window=WINDOW)
    with pytest.raises(Unavailable), Subject.open(checkpoint, settings) as subject, subject.library():
        pass


def test_a_checkpoint_without_memory_layers_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InvalidArgument, match="--mem-layers"):
        Subject.open(checkpoint)


# --- Haystacks ------------------------------------------------------------------------------------------------------


def test_a_haystack_of_records_is_as_long_as_asked_and_holds_the_answers(checkpoint: Path) -> None:
    tokenizer = tokens_of(checkpoint)
    haystack = uuid_haystack(tokenizer, 2000, 5, Random(1), 0)
    assert 2000 - 80 < len(haystack.ids) <= 2000 and len(haystack.questions) == 5 < haystack.facts
    whole = tokenizer.decode(haystack.ids)
    for question in haystack.questions:
        key, value = tokenizer.decode(question.prompt).split('"')[1], tokenizer.decode(question.answer)
        assert f'"{key}": "{value}"' in whole and len(value) == 36


def test_a_haystack_of_keys_is_as_long_as_asked_and_spreads_them(checkpoint: Path) -> None:
    tokenizer = tokens_of(checkpoint)
    haystack = keys_haystack(tokenizer, 3000, 4, Random(1), 0)
    assert len(haystack.ids) == 3000
    whole = tokenizer.decode(haystack.ids)
    places = []
    for question in haystack.questions:
        label = tokenizer.decode(question.prompt).split(" is ")[-2].split("? The ")[-1]
        places.append(whole.index(f"The {label} is {tokenizer.decode(question.answer)}."))
    assert places == sorted(places) and min(b - a for a, b in pairwise(places)) > 400


@pytest.mark.parametrize("name", ["keys", "lookup"])
@pytest.mark.parametrize("local", [300, 500, 5000])
def test_questions_begin_with_the_end_of_the_text_which_memory_does_not_hold(
    checkpoint: Path, name: str, local: int
) -> None:
    tokenizer = tokens_of(checkpoint)
    whole, cut = (haystack_of(name, tokenizer, 3000, 4, Random(1), room) for room in (0, local))
    for bare, question in zip(whole.questions, cut.questions, strict=True):
        assert question.answer == bare.answer
        assert [*cut.ids, *question.prompt] == [*whole.ids, *bare.prompt]
    longest = max(len(one.prompt) + len(one.answer) for one in cut.questions)
    assert longest == local if local < 3000 else not cut.ids


def test_a_haystack_too_short_for_its_facts_is_refused(checkpoint: Path) -> None:
    tokenizer = tokens_of(checkpoint)
    with pytest.raises(InvalidArgument, match="give more tokens"):
        keys_haystack(tokenizer, 300, 10, Random(1), 0)
    with pytest.raises(InvalidArgument, match="give more"):
        uuid_haystack(tokenizer, 120, 1, Random(1), 0)


# --- Means ----------------------------------------------------------------------------------------------------------


def test_a_mean_lies_within_its_interval_and_repeats_itself() -> None:
    values = [0.1 * number for number in range(20)]
    mean = mean_of(values, seed=3)
    assert mean.value == pytest.approx(0.95) and mean.low < 0.95 < mean.high and mean == mean_of(values, seed=3)
    assert mean_of([2.0] * 5).low == mean_of([2.0] * 5).high == 2.0


def test_values_of_one_group_make_a_mean_less_sure() -> None:
    values = [0.0] * 10 + [1.0] * 10
    alone = mean_of(values)
    grouped = mean_of(values, ["a"] * 10 + ["b"] * 10)
    assert grouped.value == alone.value and grouped.high - grouped.low > alone.high - alone.low
