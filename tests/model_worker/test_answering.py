"""Answers stream whole characters, are the same as `generate`'s, and say which passages they attended to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from memory_service import DType, Memory, NotFound
from memory_service.errors import InvalidArgument
from model_worker.answering.answers import (
    Answer,
    Answering,
    Sampling,
    _Streamer,
    answer,
    chat_ids,
    prompt_ids,
    token_ids,
)
from model_worker.decoder.model import FotModel, spec_of
from model_worker.recall.sources import Telling, listened, sources_of
from model_worker.recall.tally import Tally
from model_worker.settings import FotConfig, Read, Recall
from tests.model_worker.tiny import byte_tokenizer, tiny_model

FOT = FotConfig(mem_layers=(1, 2), window=48, last_context_length=24, mem_dtype=DType.F32)
TEXTS = {
    f"room-{number}.md": f"The code of room {number} is {4711 * (number + 1)}. " * (number + 1) for number in range(5)
}
QUESTION = "What is the code?"
TOP = Recall(top_k=16)


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def model(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Iterator[FotModel]:
    """A model whose memory holds five texts, and a sixth document without token ids."""
    dice = torch.Generator().manual_seed(3)
    with Memory.open(":memory:", spec=spec_of(base, FOT)) as memory, FotModel(base, FOT, memory) as made:
        for name, text in TEXTS.items():
            ids = tokenizer(text)["input_ids"]
            keys = torch.randn(2, 2, len(ids), 8, generator=dice)
            memory.put(name, keys, keys, token_ids=ids)
        silent = torch.randn(2, 2, 30, 8, generator=dice)
        memory.put("silent", silent, silent)
        yield made


def everything(told: Answer) -> float:
    """All masses together."""
    sources = told.sources
    return sources.window_mass + sources.session_mass + sources.other_mass + sum(d.mass for d in sources.documents)


# --- Text -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_what_generate_gives(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    pieces: list[str] = []
    told = answer(model, tokenizer, QUESTION, recall=TOP, max_new_tokens=12, on_text=pieces.append)
    ids = torch.tensor([tokenizer(QUESTION)["input_ids"]])
    plain = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, recall=TOP, pad_token_id=2
    )
    assert told.token_ids == tuple(plain[0, ids.shape[1] :].tolist())
    assert told.prompt_tokens == ids.shape[1] and told.seconds > 0
    assert told.text == "".join(pieces) == tokenizer.decode(told.token_ids, skip_special_tokens=True)


def test_a_stream_gives_the_same_text_and_answer(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    told = answer(model, tokenizer, QUESTION, recall=TOP, max_new_tokens=12)
    with Answering(model, tokenizer, QUESTION, recall=TOP, max_new_tokens=12) as pieces:
        text = "".join(pieces)
        assert list(pieces) == []
        assert replace(pieces.answer, seconds=told.seconds) == told
    assert text == told.text


def test_characters_of_several_tokens_come_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    text, pieces = "Grüße, 漢字 und 🦊!", []
    streamer = _Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[0, 70, 71]]))
    for token in tokenizer(text)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == list(text)


def test_half_a_character_at_the_end_is_told_at_last(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces: list[str] = []
    streamer = _Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[0]]))
    for token in tokenizer("aü")["input_ids"][:-1]:
        streamer.put(torch.tensor([token]))
    assert pieces == ["a"]
    streamer.end()
    assert pieces == ["a", "\ufffd"]


def test_sampling_repeats_itself_with_a_seed_and_leaves_the_generator_alone(
    model: FotModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    def sampled(seed: int) -> str:
        hot = Sampling(temperature=1.5, top_p=0.95, top_k=100, seed=seed)
        return answer(model, tokenizer, QUESTION, max_new_tokens=8, sampling=hot).text

    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    assert sampled(1) == sampled(1) != sampled(2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_stream_can_be_left_early(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    heard: list[Read] = []
    recall = replace(TOP, on_read=heard.append)
    with Answering(model, tokenizer, QUESTION, recall=recall, max_new_tokens=10_000) as pieces:
        first = next(iter(pieces))
    pieces.close()
    assert pieces.answer.text.startswith(first)
    assert len(pieces.answer.token_ids) < 10_000
    assert model.memory is not None and model.memory.stats().sessions == 0


# --- Sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 16])
@pytest.mark.parametrize("prompt", [QUESTION, QUESTION * 9], ids=["short", "long"])
def test_all_masses_sum_to_one(model: FotModel, tokenizer: PreTrainedTokenizerFast, top_k: int, prompt: str) -> None:
    told = answer(model, tokenizer, prompt, recall=Recall(top_k=top_k), max_new_tokens=6, telling=Telling(2, 2, 16))
    assert everything(told) == pytest.approx(1, abs=1e-5)
    assert len(told.sources.documents) == 2 and told.sources.other_documents >= 1
    assert (told.sources.session_mass > 0) == (prompt != QUESTION)
    assert told.sources.engine == ("exact" if top_k else "dense") and told.sources.coverage == 1


def test_passages_are_told_with_their_own_words(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    told = answer(model, tokenizer, QUESTION, recall=TOP, max_new_tokens=6, telling=Telling(6, 4, 16))
    sources = {source.document: source for source in told.sources.documents}
    assert set(sources) == {*TEXTS, "silent"}
    assert [source.mass for source in told.sources.documents] == sorted(
        (s.mass for s in sources.values()), reverse=True
    )
    for name, text in TEXTS.items():
        assert sources[name].tokens == len(text) + 1
        for passage in sources[name].passages:
            first = max(passage.first_token - 1, 0)  # Token 0 is <s>, which has no text.
            assert passage.text == text[first : passage.first_token - 1 + passage.tokens]
        assert sum(passage.mass for passage in sources[name].passages) <= sources[name].mass + 1e-6
    assert [passage.text for passage in sources["silent"].passages] == [None, None]


def test_what_the_text_itself_put_into_memory_is_told_too(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = "".join(f"Line {number} of a long prompt. " for number in range(12))
    told = answer(model, tokenizer, prompt, recall=Recall((), top_k=16), max_new_tokens=6, telling=Telling(3, 20, 16))
    assert told.sources.documents == () and told.sources.session_mass > 0
    assert sum(p.mass for p in told.sources.session) == pytest.approx(told.sources.session_mass)
    for passage in told.sources.session:
        assert passage.text == prompt[max(passage.first_token - 1, 0) : passage.first_token - 1 + passage.tokens]


def test_only_what_was_read_while_answering_counts(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    heard: list[Read] = []
    told = answer(model, tokenizer, QUESTION, recall=replace(TOP, on_read=heard.append), max_new_tokens=6)
    tally = Tally(first_token=told.prompt_tokens - 1)
    for read in heard:
        tally(read)
    assert tally.masses().queries == 2 * len(told.token_ids)
    shares = tally.masses().by_source()
    assert {source.document: source.mass for source in told.sources.documents}.items() <= shares.items()


def test_without_sources_the_memory_is_asked_for_nothing_more(
    model: FotModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    heard: list[Read] = []
    recall = replace(TOP, on_read=heard.append)
    told = answer(model, tokenizer, QUESTION, recall=recall, max_new_tokens=4, telling=Telling(0))
    assert all(read.attended.tokens is None and read.attended.attribution is None for read in heard)
    assert told.sources.documents == () and everything(told) == pytest.approx(1)
    assert 0 < told.sources.other_mass < 1


def test_a_model_without_memory_layers_has_its_window_only(tokenizer: PreTrainedTokenizerFast) -> None:
    with FotModel(tiny_model("llama"), FotConfig(window=64, last_context_length=32)) as plain:
        told = answer(plain, tokenizer, QUESTION, max_new_tokens=4)
    assert told.sources.window_mass == 1 and told.sources.engine == "" and told.sources.documents == ()


def test_a_document_deleted_since_is_told_without_words(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert model.memory is not None
    tally = Tally()
    ids = torch.tensor([tokenizer(QUESTION)["input_ids"]])
    with model.start(listened(TOP, tally)) as state:
        model(ids, past_key_values=state)
    model.memory.delete("room-4.md")
    sources = sources_of(tally, model.memory, tokenizer, ids[0].tolist(), Telling())
    (gone,) = [source for source in sources.documents if source.document == "room-4.md"]
    assert gone.mass > 0 and gone.tokens == 0 and {passage.text for passage in gone.passages} == {None}


# --- Prompts --------------------------------------------------------------------------------------------------------


def test_a_question_goes_into_its_template(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(prompt_ids(tokenizer, "Why {x}?", "Q: {question} A:")) == "<s>Q: Why {x}? A:"
    assert prompt_ids(tokenizer, "Why?") == token_ids(tokenizer, "Why?") == tokenizer("Why?")["input_ids"]
    with pytest.raises(InvalidArgument, match=r"\{question\}"):
        prompt_ids(tokenizer, "Why?", "Q: A:")


def test_a_chat_template_is_used_where_there_is_one() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(InvalidArgument, match="no chat template"):
        chat_ids(tokenizer, "Why?")
    tokenizer.chat_template = (
        "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} [assistant]{% endif %}"
    )
    ids = prompt_ids(tokenizer, "Why?")
    assert ids == chat_ids(tokenizer, "Why?")
    assert tokenizer.decode(ids) == "<s>[user] Why? [assistant]"
    assert tokenizer.decode(prompt_ids(tokenizer, "Why?", "{question}")) == "<s>Why?"


# --- What can be wrong ----------------------------------------------------------------------------------------------


def test_an_error_of_the_memory_reaches_whoever_listens(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    lost = Recall("no such document", top_k=4)
    with pytest.raises(NotFound, match="no such document"):
        answer(model, tokenizer, QUESTION, recall=lost)
    with Answering(model, tokenizer, QUESTION, recall=lost) as pieces:
        with pytest.raises(NotFound, match="no such document"):
            list(pieces)
        with pytest.raises(NotFound):
            _ = pieces.answer


def test_an_error_of_the_listener_reaches_the_caller(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    def closed(_: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        answer(model, tokenizer, QUESTION, max_new_tokens=4, on_text=closed)
    assert model.memory is not None and model.memory.stats().sessions == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_arguments_are_refused(
    model: FotModel, tokenizer: PreTrainedTokenizerFast, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        answer(model, tokenizer, **arguments)  # type: ignore[arg-type]


def test_bad_values_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        prompt_ids(tokenizer, " \n")
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"repetition_penalty": 0}):
        with pytest.raises(InvalidArgument, match="sampling needs"):
            Sampling(**wrong)  # type: ignore[arg-type]
    for numbers in ((-1, 3, 64), (3, -1, 64), (3, 3, 0)):
        with pytest.raises(InvalidArgument, match="≥"):
            Telling(*numbers)
