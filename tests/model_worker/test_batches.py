"""A row in a batch is the row alone, however long its neighbours are and however far it has overflowed its window."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from memory_service import DType, Memory
from memory_service.bench.harness import served
from model_worker.bench.reference import Reference
from model_worker.decoder.model import FotModel, spec_of
from model_worker.settings import Cut, FotConfig, Overflow, SelfExtend
from tests.model_worker.oracle import expected
from tests.model_worker.texts import padded, text
from tests.model_worker.tiny import tiny_model

FOT = FotConfig(mem_layers=(1, 3), window=24, last_context_length=12, mem_dtype=DType.F32)
LENGTHS = (7, 30, 55, 1)


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_model("llama").requires_grad_(False)


@contextmanager
def attached(base: PreTrainedModel, fot: FotConfig = FOT, target: str = ":memory:") -> Iterator[FotModel]:
    with Memory.open(target, spec=spec_of(base, fot)) as memory, FotModel(base, fot, memory) as model:
        yield model


def continued(model: FotModel, rows: list[Tensor], tokens: int, **how: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, tokens] and the logits [B, tokens, V] each was taken from."""
    out = model.generate(
        **padded(rows),
        **{"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, **how},
        output_logits=True,
        return_dict_in_generate=True,
    )
    out.past_key_values.close()
    return out.sequences[:, -tokens:], torch.stack(out.logits, dim=1)


# --- Rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", Overflow)
@pytest.mark.parametrize("positionals", [True, False])
def test_generation_of_a_row_does_not_depend_on_its_neighbours(
    base: PreTrainedModel, overflow: Overflow, positionals: bool
) -> None:
    rows = [text(length, seed=seed) for seed, length in enumerate(LENGTHS)]
    with attached(base, replace(FOT, overflow=overflow, mem_positionals=positionals)) as model:
        together, scores = continued(model, rows, 40)  # Each row overflows its window of 24 at least once.
        for number, row in enumerate(rows):
            alone, alone_scores = continued(model, [row], 40)
            torch.testing.assert_close(scores[number], alone_scores[0], atol=1e-4, rtol=0)
            assert torch.equal(together[number], alone[0])


def test_self_extend_in_a_batch_does_not_depend_on_the_neighbours(base: PreTrainedModel) -> None:
    rows = [text(length, seed=seed) for seed, length in enumerate(LENGTHS)]
    fot = FotConfig(window=256, last_context_length=256, self_extend=SelfExtend(4, 8))
    with FotModel(base, fot) as model:
        together, scores = continued(model, rows, 30)
        for number, row in enumerate(rows):
            alone, alone_scores = continued(model, [row], 30)
            torch.testing.assert_close(scores[number], alone_scores[0], atol=1e-4, rtol=0)
            assert torch.equal(together[number], alone[0])


def test_rows_that_grow_unequally_between_calls_stay_themselves(base: PreTrainedModel) -> None:
    """Every call brings each row another number of tokens; one row gets more than fits its window."""
    calls = [
        [text(5, seed=1), text(20, seed=2)],
        [text(14, seed=3), text(2, seed=4)],
        [text(40, seed=5), text(9, seed=6)],
        [text(1, seed=7), text(30, seed=8)],
    ]
    with attached(base) as model:
        alone: list[list[Tensor]] = [[], []]
        for row in range(2):
            with model.start() as state:
                for call in calls:
                    alone[row].append(model(call[row][None], past_key_values=state).logits[0])
        with model.start() as state:
            for number, call in enumerate(calls):
                out = model(**padded(call), past_key_values=state).logits
                for row in range(2):
                    torch.testing.assert_close(
                        out[row, -len(call[row]) :], alone[row][number], atol=1e-4, rtol=0, msg=f"row {row}: {number}"
                    )


def test_cut_by_the_padded_length_is_what_the_authors_do(base: PreTrainedModel) -> None:
    fot = replace(FOT, cut=Cut.BATCH, overflow=Overflow.FLUSH)
    batch = padded([text(50), text(33, seed=2)])
    want, _ = Reference(base, fot).forward(batch["input_ids"], batch["attention_mask"])
    tokens, _ = Reference(base, fot).generate(batch["input_ids"], 30, batch["attention_mask"])
    with attached(base, fot) as model:
        have = model(**batch).logits
        greedy = model.generate(**batch, max_new_tokens=30, do_sample=False, eos_token_id=None)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(have[real], want[real], atol=1e-4, rtol=0)
    assert torch.equal(greedy[:, 50:], tokens)


def test_a_window_that_slides_keeps_its_newest_tokens(base: PreTrainedModel) -> None:
    """The reference counts the new token among those that stay, we do not: hence 15 and 16."""
    fot = replace(FOT, last_context_length=15)
    want, want_scores = Reference(base, replace(FOT, last_context_length=16)).generate(text(10)[None], 40)
    with attached(base, fot) as model:
        have, scores = continued(model, [text(10)], 40)
        torch.testing.assert_close(scores, want_scores, atol=1e-4, rtol=0)
        assert torch.equal(have, want)
        sizes = []
        with model.start() as state:
            for token in text(34):
                model(token[None, None], past_key_values=state)
                sizes.append((state.local_length, state.memory_tokens()))
    assert sizes[22:26] == [(23, 0), (24, 0), (16, 9), (17, 9)]
    assert sizes[31:34] == [(23, 9), (24, 9), (16, 18)]


def test_windows_load_in_blocks_of_any_size(base: PreTrainedModel) -> None:
    rows = [text(length, seed=seed) for seed, length in enumerate((90, 61))]
    want = [expected(base, row, FOT)[0] for row in rows]
    for block_tokens in (1, 30, 48, 100, 8192):
        with attached(base, replace(FOT, block_tokens=block_tokens)) as model:
            have = model(**padded(rows)).logits
        for number, row in enumerate(rows):
            torch.testing.assert_close(have[number, -len(row) :], want[number], atol=1e-4, rtol=0)


@pytest.mark.parametrize("overlap", [4, 23])
def test_left_context_is_seen_and_not_stored(base: PreTrainedModel, overlap: int) -> None:
    fot, row = replace(FOT, overlap=overlap), text(70)
    want, remembered = expected(base, row, fot)
    with attached(base, fot) as model, model.start() as state:
        have = model(**padded([row, text(40, seed=2)]), past_key_values=state).logits[0]
        torch.testing.assert_close(have, want, atol=1e-4, rtol=0)
        assert state.memory_tokens(0) == 58
        torch.testing.assert_close(state.memory(1)[0], remembered[1][0], atol=1e-5, rtol=0)
    disjoint, _ = expected(base, row, FOT)
    assert (want[24:58] - disjoint[24:58]).abs().max() > 0.01


# --- Generation -----------------------------------------------------------------------------------------------------


def test_the_last_logits_alone_are_those_of_all(base: PreTrainedModel) -> None:
    batch = padded([text(70), text(20, seed=2)])
    with attached(base) as model:
        everything = model(**batch).logits
        for keep in (1, 5, 12, 40):
            torch.testing.assert_close(
                model(**batch, logits_to_keep=keep).logits, everything[:, -keep:], atol=1e-5, rtol=0
            )


def test_a_token_at_a_time_is_the_same_as_generate(base: PreTrainedModel) -> None:
    rows = [text(30), text(9, seed=2)]
    with attached(base) as model:
        tokens, scores = continued(model, rows, 30)
        with model.start() as state:
            out = model(**padded(rows), past_key_values=state).logits[:, -1:]
            for step in range(30):
                torch.testing.assert_close(out[:, 0], scores[:, step], atol=1e-5, rtol=0)
                assert torch.equal(out.argmax(-1)[:, 0], tokens[:, step])
                out = model(tokens[:, step : step + 1], past_key_values=state).logits


def test_beams_share_what_they_have_in_common(base: PreTrainedModel) -> None:
    """Beam search equals beam search by hand: every beam a text of its own, run from its start."""
    prompt = text(40)
    with attached(base) as model:
        out = model.generate(
            prompt[None],
            attention_mask=torch.ones(1, 40),
            num_beams=3,
            max_new_tokens=25,
            do_sample=False,
            eos_token_id=None,
            num_return_sequences=3,
            output_scores=True,
            return_dict_in_generate=True,
        )
        out.past_key_values.close()
        found = out.sequences[:, 40:]
        for beam in range(3):
            with model.start() as state:
                steps = [model(prompt[None], past_key_values=state, logits_to_keep=1)]
                steps += [model(token[None, None], past_key_values=state) for token in found[beam, :-1]]
            told = torch.stack([step.logits[0, -1].log_softmax(-1) for step in steps])
            score = told.gather(1, found[beam][:, None]).sum() / 25
            torch.testing.assert_close(score, out.sequences_scores[beam], atol=1e-4, rtol=0)
    assert len({tuple(one.tolist()) for one in found}) == 3


def test_sampling_is_repeatable_and_several_sequences_go_their_own_ways(base: PreTrainedModel) -> None:
    batch = padded([text(40), text(11, seed=2)])
    with attached(base) as model:

        def sampled(seed: int, sequences: int = 2) -> Tensor:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                out: Tensor = model.generate(
                    **batch, do_sample=True, max_new_tokens=30, num_return_sequences=sequences, eos_token_id=None
                )
            return out[:, 40:]

        assert torch.equal(sampled(1), sampled(1))
        assert not torch.equal(sampled(1), sampled(2))
        assert len({tuple(row.tolist()) for row in sampled(1, 3)}) == 6


def test_a_streamer_hears_every_token_as_it_comes(base: PreTrainedModel) -> None:
    class Heard(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    heard, prompt = Heard(), text(30)
    with attached(base) as model:
        out = model.generate(
            prompt[None], attention_mask=torch.ones(1, 30), max_new_tokens=20, do_sample=False, streamer=heard
        )
    assert heard.tokens == out[0].tolist()
    assert heard.ended


@pytest.mark.parametrize("whole", [True, False])
def test_a_conversation_goes_on_from_its_state(base: PreTrainedModel, whole: bool) -> None:
    """The next turn may be given alone or with everything said before; a state fed by hand tells what is right."""
    first, second = text(30), text(17, seed=2)
    with attached(base) as model:
        with model.start() as state:
            reply = [model(first[None], past_key_values=state).logits[0, -1].argmax()]
            for _ in range(9):
                reply.append(model(reply[-1][None, None], past_key_values=state).logits[0, -1].argmax())
            # The last token of the reply was chosen but not fed yet: it comes with the next turn.
            turn = torch.cat([reply[-1][None], second])
            want = [model(turn[None], past_key_values=state).logits[0, -1].argmax()]
            for _ in range(9):
                want.append(model(want[-1][None, None], past_key_values=state).logits[0, -1].argmax())
        with model.start() as state:
            mask = torch.ones(1, 30)
            said = model.generate(
                first[None], attention_mask=mask, past_key_values=state, max_new_tokens=10, do_sample=False,
                eos_token_id=None,
            )  # fmt: skip
            assert said[0, 30:].tolist() == [int(one) for one in reply]
            turn = torch.cat([said[0], second]) if whole else turn
            more = model.generate(
                turn[None], attention_mask=torch.ones(1, len(turn)), past_key_values=state, max_new_tokens=10,
                do_sample=False, eos_token_id=None,
            )  # fmt: skip
            assert more[0, len(turn) :].tolist() == [int(one) for one in want]


def test_a_conversation_of_rows_that_grow_unequally_is_each_rows_own(base: PreTrainedModel) -> None:
    """Whole conversations, of which one row has more to say than the other."""
    before, after = [text(10), text(12, seed=2)], [text(6, seed=3), text(2, seed=4)]
    whole = [torch.cat(both) for both in zip(before, after, strict=True)]
    with attached(base) as model:

        def turn(rows: list[int]) -> Tensor:
            with model.start() as state:
                model(**padded([before[row] for row in rows]), past_key_values=state)
                out: Tensor = model.generate(
                    **padded([whole[row] for row in rows]), past_key_values=state, max_new_tokens=8, do_sample=False,
                    eos_token_id=None,
                )  # fmt: skip
                assert [len(seen) for seen in state.texts] == [len(whole[row]) + 7 for row in rows]
            return out[:, -8:]

        together = turn([0, 1])
        assert torch.equal(together[0], turn([0])[0])
        assert torch.equal(together[1], turn([1])[0])


def test_a_prompt_without_a_mask_is_a_prompt_without_padding(base: PreTrainedModel) -> None:
    """Transformers takes the padding token for padding wherever it stands in a prompt that comes without a mask."""
    prompt = text(20)
    prompt[:2] = base.config.pad_token_id
    with attached(base) as model:
        masked = model.generate(prompt[None], attention_mask=torch.ones(1, 20), max_new_tokens=5, do_sample=False)
        assert torch.equal(model.generate(prompt[None], max_new_tokens=5, do_sample=False), masked)
        prompt[[0, 7]] = prompt[[7, 0]]
        assert model.generate(prompt[None], max_new_tokens=1, do_sample=False).shape == (1, 21)


def test_generation_over_grpc_is_generation_in_process(base: PreTrainedModel, tmp_path: Any) -> None:
    rows = [text(length, seed=seed) for seed, length in enumerate(LENGTHS)]
    with attached(base) as model:
        want = continued(model, rows, 30)
    with served(tmp_path / "data") as target, attached(base, target=target) as model:
        have = continued(model, rows, 30)
        assert torch.equal(have[0], want[0])
        torch.testing.assert_close(have[1], want[1], atol=1e-5, rtol=0)
        beams = model.generate(**padded(rows), num_beams=2, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert model.memory is not None and model.memory.stats().sessions == 0
    assert beams.shape == (4, 67)


def test_sessions_close_when_a_generation_ends(base: PreTrainedModel) -> None:
    with attached(base) as model:
        model.generate(**padded([text(60), text(40)]), max_new_tokens=20, do_sample=False)
        model.generate(**padded([text(60), text(40)]), max_new_tokens=20, num_beams=3, do_sample=False)
        assert model.memory is not None
        assert model.memory.stats().sessions == 0
