"""A batcher gives every request what it would get alone, whoever joins, leaves, fails or is cancelled beside it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from memory_service import DType, InvalidArgument, Memory, NotFound, SessionExpired, Unavailable, WrongModel
from memory_service.errors import FotError, ResourceExhausted
from model_worker.answering.answers import Answer, Sampling, answer
from model_worker.decoder.fitting import spec_of
from model_worker.decoder.model import FotModel
from model_worker.serving.batcher import Batcher
from model_worker.serving.load import Load
from model_worker.serving.requests import Event, Failed, Finish, Finished, Request, Text, Ticket
from model_worker.serving.settings import BatchSettings
from model_worker.settings import FotConfig, Read, Recall
from tests.model_worker.texts import text
from tests.model_worker.tiny import byte_tokenizer, tiny_model

FOT = FotConfig(mem_layers=(1, 2), window=48, last_context_length=24, mem_dtype=DType.F32)
TOP = Recall(top_k=8)
PATIENCE_S = 60.0


@dataclass
class Heard:
    """All a listener was told."""

    events: list[Event] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        (self.begun if isinstance(event, Text) else self.done).set()

    @property
    def last(self) -> Event:
        assert self.done.wait(PATIENCE_S), "no last event came"
        return self.events[-1]

    @property
    def finished(self) -> Finished:
        last = self.last
        assert isinstance(last, Finished), last
        return last

    @property
    def error(self) -> Exception:
        last = self.last
        assert isinstance(last, Failed), last
        return last.error

    @property
    def text(self) -> str:
        assert self.done.wait(PATIENCE_S)
        return "".join(event.text for event in self.events if isinstance(event, Text))


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def memory(base: PreTrainedModel) -> Iterator[Memory]:
    with Memory.open(":memory:", spec=spec_of(base, FOT)) as made:
        plant(made, 3)
        yield made


@pytest.fixture
def model(base: PreTrainedModel, memory: Memory) -> Iterator[FotModel]:
    with FotModel(base, FOT, memory) as made:
        yield made


@pytest.fixture
def endless(model: FotModel) -> Iterator[FotModel]:
    """The same, and no token ends an answer: one that should be under way is, however slow the machine."""
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    yield model
    model.generation_config.eos_token_id = before


def plant(memory: Memory, seed: int) -> None:
    """Documents of random keys and values."""
    dice = torch.Generator().manual_seed(seed)
    for number in range(4):
        tokens = 20 + 10 * number
        keys, values = torch.randn(2, 2, 2, tokens, 8, generator=dice)
        memory.put(f"doc-{number}", keys, values, token_ids=list(range(4, 4 + tokens)))


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    return [tuple(text(length, seed=length).tolist()) for length in lengths]


def submitted(batcher: Batcher, requests: Sequence[Request]) -> list[Heard]:
    heard = [Heard() for _ in requests]
    for request, one in zip(requests, heard, strict=True):
        batcher.submit(request, one)
    return heard


def alone(model: FotModel, tokenizer: PreTrainedTokenizerFast, request: Request) -> Answer:
    return answer(
        model,
        tokenizer,
        request.ids,
        recall=request.recall,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        telling=request.telling,
    )


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


# --- The same as alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recall", [Recall(), TOP, Recall(())], ids=["dense", "top-k", "no documents"])
def test_every_request_gets_the_text_and_sources_it_would_get_alone(
    model: FotModel, tokenizer: PreTrainedTokenizerFast, recall: Recall
) -> None:
    # Shorter than the window, longer than it, and longer than it by several windows; all of them overflow.
    requests = [Request(ids, 20 + 5 * number, recall=recall) for number, ids in enumerate(prompts(3, 30, 200, 47, 90))]
    with Batcher(model, tokenizer, BatchSettings(max_rows=3, step_tokens=16, idle_tokens=40)) as batcher:
        heard = submitted(batcher, requests)
        for request, one in zip(requests, heard, strict=True):
            finished, told = one.finished, alone_after(batcher, model, tokenizer, request)
            assert one.text == told.text
            assert finished.completion_tokens == len(told.token_ids) and finished.prompt_tokens == told.prompt_tokens
            assert finished.reason is (Finish.STOP if 1 in told.token_ids else Finish.LENGTH)
            assert finished.sources.engine == told.sources.engine
            assert finished.sources.window_mass == pytest.approx(told.sources.window_mass, abs=1e-4)
            # Dense attention tells its sources by the mean of a call's queries, and prompts are read in smaller calls.
            near = 1e-4 if recall.top_k else 2e-3
            assert finished.sources.session_mass == pytest.approx(told.sources.session_mass, abs=near)
            masses = {source.document: source.mass for source in told.sources.documents}
            assert {s.document: s.mass for s in finished.sources.documents} == pytest.approx(masses, abs=near)
    assert model.memory is not None and model.memory.stats().sessions == 0


def alone_after(batcher: Batcher, model: FotModel, tokenizer: PreTrainedTokenizerFast, request: Request) -> Answer:
    """The oracle, once the batcher rests: a model is for one thread at a time."""
    until(lambda: batcher.load().running == batcher.load().queued == 0)
    return alone(model, tokenizer, request)


def test_a_rows_own_dice_give_its_text_whoever_stands_beside_it(
    model: FotModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    hot = [
        Sampling(temperature=1.2, top_p=0.9, seed=1),
        Sampling(temperature=0.8, top_k=20, repetition_penalty=1.3, seed=2),
        Sampling(temperature=2.0, seed=3),
        Sampling(repetition_penalty=1.5),
        Sampling(),
    ]
    requests = [
        Request(ids, 16, sampling=sampling, recall=TOP)
        for ids, sampling in zip(prompts(20, 31, 12, 60, 25), hot, strict=True)
    ]
    with Batcher(model, tokenizer) as batcher:
        texts = [one.text for one in submitted(batcher, requests)]
        until(lambda: batcher.load().running == 0)
        assert [alone(model, tokenizer, request).text for request in requests] == texts
        again = submitted(batcher, [requests[1], Request(requests[0].ids, 16, sampling=Sampling(2.0), recall=TOP)])
        assert again[0].text == texts[1]


def test_whoever_stands_beside_a_row_does_not_change_it_while_rows_come_and_go(
    model: FotModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    request = Request(prompts(33)[0], 60, recall=TOP)
    with Batcher(model, tokenizer, BatchSettings(step_tokens=16)) as batcher:
        (first,) = submitted(batcher, [request])
        others = []
        for number, ids in enumerate(prompts(10, 70, 5, 40)):
            first.begun.wait(PATIENCE_S)
            others += submitted(batcher, [Request(ids, 3 + 4 * number, recall=TOP)])
            others[-1].begun.wait(PATIENCE_S)
        assert [one.finished.completion_tokens for one in others] == [3, 7, 11, 15]
        told = alone_after(batcher, model, tokenizer, request)
        assert first.text == told.text


def test_a_model_without_memory_layers_is_served_too(tokenizer: PreTrainedTokenizerFast) -> None:
    requests = [Request(ids, 12) for ids in prompts(5, 30, 17)]
    with FotModel(tiny_model("llama"), FotConfig(window=64, last_context_length=32)) as plain:
        with Batcher(plain, tokenizer) as batcher:
            texts = [one.text for one in submitted(batcher, requests)]
        assert [alone(plain, tokenizer, request).text for request in requests] == texts


def test_requests_of_several_memories_each_read_their_own(
    base: PreTrainedModel, model: FotModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (ids,) = prompts(40)
    with Memory.open(":memory:", spec=model.spec) as other:
        plant(other, 9)
        with Batcher(model, tokenizer) as batcher:
            mine, theirs = submitted(
                batcher, [Request(ids, 24, recall=TOP), Request(ids, 24, recall=TOP, memory=other)]
            )
            assert mine.finished.sources != theirs.finished.sources
        with FotModel(tiny_model("llama"), FOT, other) as elsewhere:
            assert theirs.text == alone(elsewhere, tokenizer, Request(ids, 24, recall=TOP)).text
        assert other.stats().sessions == 0
    assert mine.text == alone(model, tokenizer, Request(ids, 24, recall=TOP)).text != theirs.text


def test_a_step_asks_the_memory_once_a_layer_for_all_rows(
    model: FotModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.memory is not None
    calls: list[int] = []
    attend = model.memory.attend_groups

    def counted(layer: int, groups: Sequence[object], *args: object, **kwargs: object) -> object:
        calls.append(len(groups))
        return attend(layer, groups, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(model.memory, "attend_groups", counted)
    with Batcher(model, tokenizer) as batcher:
        for one in submitted(batcher, [Request(ids, 20, recall=TOP) for ids in prompts(9, 11, 13, 15)]):
            assert one.finished.completion_tokens > 10
        steps = batcher.load().steps
    # Two memory layers. The four prompts were read in one pass, or in more if they came one by one.
    assert 2 * (steps + 1) <= len(calls) <= 2 * (steps + 4)
    assert calls.count(4) >= 2 * 7


# --- Text -----------------------------------------------------------------------------------------------------------


def test_a_stop_text_ends_the_answer_across_tokens_and_is_not_told(
    model: FotModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    request = Request(prompts(30)[0], 24, recall=TOP, sampling=Sampling(temperature=1.0, seed=5))
    whole = alone(model, tokenizer, request).text
    stop = whole[6:9]
    with Batcher(model, tokenizer) as batcher:
        (one,) = submitted(batcher, [replace(request, stop=("never this", stop))])
        assert one.finished.reason is Finish.STOP
        assert one.text == whole[: whole.index(stop)]
        assert one.finished.completion_tokens < 24
        (other,) = submitted(batcher, [replace(request, stop=("never this", whole[-1] + "x"))])
        assert other.finished.reason is Finish.LENGTH and other.text == whole


def test_any_of_several_tokens_ends_an_answer(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    request = Request(prompts(30)[0], 24, recall=TOP)
    said = alone(model, tokenizer, request).token_ids
    model.generation_config.eos_token_id = [1, said[5]]
    try:
        with Batcher(model, tokenizer) as batcher:
            (one,) = submitted(batcher, [request])
            assert one.finished.reason is Finish.STOP
            assert one.finished.completion_tokens == said.index(said[5]) + 1
    finally:
        model.generation_config.eos_token_id = 1


def test_pieces_count_their_tokens_and_times_are_told(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with Batcher(model, tokenizer) as batcher:
        (one,) = submitted(batcher, [Request(prompts(30)[0], 24, recall=TOP)])
        finished = one.finished
    assert sum(event.tokens for event in one.events if isinstance(event, Text)) <= finished.completion_tokens
    assert 0 <= finished.queued_s <= finished.first_token_s <= finished.seconds


# --- Fairness -------------------------------------------------------------------------------------------------------


def test_answers_go_on_while_a_long_prompt_is_read(endless: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    short, long = prompts(8, 3000)
    with Batcher(endless, tokenizer, BatchSettings(step_tokens=48)) as batcher:
        (talker,) = submitted(batcher, [Request(short, 40, recall=TOP)])
        talker.begun.wait(PATIENCE_S)
        (reader,) = submitted(batcher, [Request(long, 2, recall=Recall(()))])
        assert talker.finished.completion_tokens == 40
        assert not reader.begun.is_set()
        assert reader.finished.completion_tokens == 2
        assert reader.text == alone_after(batcher, endless, tokenizer, Request(long, 2, recall=Recall(()))).text


def test_a_full_queue_refuses_and_says_what_to_do(endless: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    (ids,) = prompts(20)
    with Batcher(endless, tokenizer, BatchSettings(max_rows=1, max_queued=1)) as batcher:
        first = Heard()
        ticket = batcher.submit(Request(ids, 10_000, recall=Recall(())), first)
        first.begun.wait(PATIENCE_S)
        (second,) = submitted(batcher, [Request(ids, 2, recall=TOP)])
        load = batcher.load()
        assert (load.queued, load.running, load.max_rows) == (1, 1, 1)
        with pytest.raises(ResourceExhausted, match="try again later") as refused:
            batcher.submit(Request(ids, 2), Heard())
        assert refused.value.retry_after_s
        ticket.cancel()
        assert second.finished.completion_tokens == 2 and second.finished.queued_s > 0


def test_windows_stay_within_their_bytes_one_row_aside(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    most: list[Load] = []
    with Batcher(model, tokenizer, BatchSettings(window_bytes=1)) as batcher:
        heard = submitted(batcher, [Request(ids, 6, recall=TOP) for ids in prompts(5, 6, 7)])
        while not all(one.done.is_set() for one in heard):
            most.append(batcher.load())
    assert max(load.running for load in most) == 1
    assert all(one.finished.completion_tokens == 6 for one in heard)


# --- What goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["reading", "writing"])
def test_an_error_of_one_row_is_its_own(endless: FotModel, tokenizer: PreTrainedTokenizerFast, when: str) -> None:
    assert endless.memory is not None
    good, bad = (
        Request(prompts(30)[0], 60, recall=TOP),
        Request(prompts(20)[0], 300, recall=replace(TOP, documents="doc-1")),
    )
    if when == "reading":
        endless.memory.delete("doc-1")
    with Batcher(endless, tokenizer) as batcher:
        first, second = submitted(batcher, [good, bad])
        if when == "writing":
            second.begun.wait(PATIENCE_S)
            endless.memory.delete("doc-1")
        assert isinstance(second.error, NotFound) and "doc-1" in str(second.error)
        assert first.finished.completion_tokens == 60
        assert endless.memory.stats().sessions == 0
        assert batcher.load().failed == 1


def test_a_lost_session_fails_its_row_only(endless: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert endless.memory is not None
    with Batcher(endless, tokenizer) as batcher:
        lost, kept = submitted(batcher, [Request(prompts(150)[0], 4000), Request(prompts(5)[0], 30)])
        lost.begun.wait(PATIENCE_S)
        kept.begun.wait(PATIENCE_S)
        until(lambda: any(line.row.stretches for line in batcher._writing.lines))  # It joins after its first text.
        next(line for line in batcher._writing.lines if line.row.stretches).row.stretches[0].session.close()
        assert isinstance(lost.error, SessionExpired)
        assert kept.finished.completion_tokens == 30


def test_a_listener_that_fails_ends_its_own_request(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    def broken(_: Read) -> None:
        raise ZeroDivisionError

    with Batcher(model, tokenizer) as batcher:
        one, two = submitted(
            batcher,
            [Request(prompts(9)[0], 9, recall=replace(TOP, on_read=broken)), Request(prompts(9)[0], 9, recall=TOP)],
        )
        assert isinstance(one.error, ZeroDivisionError)
        assert two.finished.completion_tokens == 9


def test_a_step_that_fails_fails_those_in_it_and_the_next_request_is_answered(
    model: FotModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.memory is not None
    step = model.step

    def failing(*args: object) -> object:
        monkeypatch.setattr(model, "step", step)
        raise RuntimeError("out of memory")

    with Batcher(model, tokenizer) as batcher:
        monkeypatch.setattr(model, "step", failing)
        (one,) = submitted(batcher, [Request(prompts(90)[0], 9, recall=TOP)])
        assert "out of memory" in str(one.error)
        (two,) = submitted(batcher, [Request(prompts(9)[0], 9, recall=TOP)])
        assert two.finished.completion_tokens == 9
        until(lambda: model.memory is not None and model.memory.stats().sessions == 0)


def test_what_cannot_be_answered_is_refused_at_once(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    foreign = FotConfig(mem_layers=(1, 2), window=48, last_context_length=24)
    spec = spec_of(tiny_model("llama", seed=7), foreign)
    with Batcher(model, tokenizer) as batcher, Memory.open(":memory:", spec=spec) as other:
        refused: list[tuple[Request, type[FotError]]] = [
            (Request((), 5), InvalidArgument),
            (Request((5,), 0), InvalidArgument),
            (Request((100_000,), 5), InvalidArgument),
            (Request((5,), 5, stop=("",)), InvalidArgument),
            (Request((5,), 5, memory=other), WrongModel),
        ]
        for request, kind in refused:
            with pytest.raises(kind):
                batcher.submit(request, Heard())


# --- Leaving --------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_frees_its_session_and_row_at_once(
    endless: FotModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert endless.memory is not None
    with Batcher(endless, tokenizer, BatchSettings(max_rows=2, step_tokens=48)) as batcher:
        heard, tickets = [Heard() for _ in range(4)], list[Ticket]()
        for one, ids in zip(heard, prompts(120, 30, 9000, 10), strict=True):
            tickets.append(batcher.submit(Request(ids, 5000, recall=Recall(())), one))
        heard[1].begun.wait(PATIENCE_S)
        for place in (3, 1, 0, 2):  # One that waits, one that is written, …
            tickets[place].cancel()
            tickets[place].cancel()
            finished = heard[place].finished
            assert finished.reason is Finish.CANCELLED
        assert math.isnan(heard[3].finished.first_token_s) and heard[3].text == ""
        assert endless.memory.stats().sessions == 0
        assert batcher.load().running == 0 and batcher.load().cancelled == 4


@pytest.mark.parametrize("drain", [True, False])
def test_closing_answers_what_there_is_or_cancels_it(
    endless: FotModel, tokenizer: PreTrainedTokenizerFast, drain: bool
) -> None:
    assert endless.memory is not None
    batcher = Batcher(endless, tokenizer, BatchSettings(max_rows=1))
    heard = submitted(batcher, [Request(ids, 30, recall=TOP) for ids in prompts(60, 10)])
    heard[0].begun.wait(PATIENCE_S)
    batcher.close(drain=drain)
    batcher.close()
    assert [one.finished.reason for one in heard] == [Finish.LENGTH if drain else Finish.CANCELLED] * 2
    assert endless.memory.stats().sessions == 0
    with pytest.raises(Unavailable):
        batcher.submit(Request((5,), 5), Heard())


# --- Conversations --------------------------------------------------------------------------------------------------


def said(model: FotModel, tokenizer: PreTrainedTokenizerFast, heard: Heard, request: Request) -> tuple[int, ...]:
    """Prompt and answer as token ids."""
    return (*request.ids, *alone(model, tokenizer, request).token_ids)


def test_a_conversation_goes_on_from_what_was_held(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert model.memory is not None
    first = Request(prompts(70)[0], 30, recall=TOP, conversation="talk")
    with Batcher(model, tokenizer) as batcher:
        (one,) = submitted(batcher, [first])
        assert one.finished.cached_tokens == 0
        until(lambda: batcher.load().conversations == 1)
        assert model.memory.stats().sessions == 1
        whole = (*said(model, tokenizer, one, first), *prompts(25)[0])
        (two,) = submitted(batcher, [replace(first, ids=whole)])
        assert two.finished.cached_tokens == 70 + 30 - 1  # The last token was told, and never fed.
        with model.start(TOP) as state:
            held = torch.tensor([whole[: 70 + 29]])
            model.generate(held[:, :70], past_key_values=state, max_new_tokens=30, do_sample=False, pad_token_id=2)
            plain = model.generate(
                torch.tensor([whole]), past_key_values=state, max_new_tokens=30, do_sample=False, pad_token_id=2
            )
        assert two.text == tokenizer.decode(plain[0, len(whole) :], skip_special_tokens=True)
        assert batcher.load().cached_tokens == 99
    assert model.memory.stats().sessions == 0


def test_another_beginning_scope_or_memory_is_read_from_scratch(
    base: PreTrainedModel, model: FotModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = Request(prompts(30)[0], 8, recall=TOP, conversation="talk")
    with Memory.open(":memory:", spec=model.spec) as other, Batcher(model, tokenizer) as batcher:
        plant(other, 9)
        for change in ({"ids": prompts(44)[0]}, {"recall": Recall(("doc-1",), top_k=8)}, {"memory": other}):
            assert submitted(batcher, [first])[0].finished.completion_tokens == 8
            longer = replace(first, ids=(*first.ids, *prompts(9)[0]))
            changed = replace(longer, **change)
            assert submitted(batcher, [changed])[0].finished.cached_tokens == 0


def test_the_last_words_are_taken_back_where_the_next_prompt_has_others(
    model: FotModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    # All of it fits the window, or what is in memory would differ from a prompt read at once.
    first = Request(prompts(12)[0], 8, recall=TOP, conversation="talk")
    second = replace(first, ids=(*first.ids, *prompts(9)[0]))
    with Batcher(model, tokenizer) as batcher:
        assert submitted(batcher, [first])[0].finished.completion_tokens == 8
        (one,) = submitted(batcher, [second])
        assert one.finished.cached_tokens == 12
        assert one.text == alone_after(batcher, model, tokenizer, replace(second, conversation=None)).text


def test_conversations_are_few_and_end(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert model.memory is not None
    settings = BatchSettings(conversations=2, conversation_s=0.5)
    with Batcher(model, tokenizer, settings) as batcher:
        talks = [Request(prompts(60)[0], 3, recall=TOP, conversation=name) for name in ("a", "b", "c")]
        for talk in talks:
            assert submitted(batcher, [talk])[0].finished.completion_tokens == 3
        assert batcher.load().conversations == 2
        until(lambda: batcher.load().conversations == 0)
        until(lambda: model.memory is not None and model.memory.stats().sessions == 0)


def test_a_conversation_whose_session_is_lost_is_read_anew(model: FotModel, tokenizer: PreTrainedTokenizerFast) -> None:
    first = Request(prompts(70)[0], 8, recall=TOP, conversation="talk")
    with Batcher(model, tokenizer) as batcher:
        assert submitted(batcher, [first])[0].finished.completion_tokens == 8
        (kept,) = batcher._kept._kept.values()
        kept.state.lines[0].row.stretches[0].session.close()
        second = replace(first, ids=(*first.ids, *prompts(40)[0]))
        (one,) = submitted(batcher, [second])
        assert one.finished.cached_tokens == 0
        assert one.text == alone_after(batcher, model, tokenizer, replace(second, conversation=None)).text
