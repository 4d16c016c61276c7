"""Documents and what a text put into memory itself are one memory: one softmax over both, whoever stored them when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memory_service import ALL_DOCUMENTS, Attended, Coverage, DType, Memory, Scope, Unavailable
from model_worker.decoder.model import FotModel, spec_of
from model_worker.settings import FotConfig, Read, Recall
from tests.model_worker import oracle
from tests.model_worker.texts import text
from tests.model_worker.tiny import tiny_model

LAYERS = (1, 3)
FOT = FotConfig(mem_layers=LAYERS, window=24, last_context_length=12, mem_dtype=DType.F32)
NONE = Recall(documents=())
LENGTHS = {"a": 5, "b": 17, "c": 1, "d": 40}
LANGUAGES = {"a": "py", "b": "rs", "c": "py", "d": "md"}


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_model("llama").requires_grad_(False)


def document(name: str) -> tuple[Tensor, Tensor]:
    """Random keys and values [L, K, T, D] of a document; keys as large as the model's own."""
    drawn = torch.randn(2, 2, 2, LENGTHS[name], 8, generator=torch.Generator().manual_seed(ord(name)))
    return 1.5 * drawn[0], drawn[1]


def together(names: Sequence[str]) -> oracle.Memory:
    """Documents one after another, as the oracle takes them: keys and values [K, M, D] of every layer."""
    found = [document(name) for name in names]
    if not found:
        return {}
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    return {layer: (keys[number], values[number]) for number, layer in enumerate(LAYERS)}


@contextmanager
def opened(
    base: PreTrainedModel, order: Sequence[str] = "abcd", fot: FotConfig = FOT, recall: Recall | None = None
) -> Iterator[FotModel]:
    """The model with these documents in its memory, put there in this order."""
    with Memory.open(":memory:", spec=spec_of(base, fot)) as memory:
        for name in order:
            memory.put(name, *document(name), metadata={"lang": LANGUAGES[name]})
        with FotModel(base, fot, memory, recall) as model:
            yield model


def close(have: Tensor, want: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(have, want, atol=atol, rtol=0)


# --- What is seen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [9, 70])
@pytest.mark.parametrize(
    ("recall", "seen"),
    [
        (Recall(), "abcd"),
        (Recall(documents=ALL_DOCUMENTS), "abcd"),
        (Recall(documents=()), ""),
        (Recall(documents=("b",)), "b"),
        (Recall(documents=["d", "a"]), "ad"),
        (Recall(where="lang = py"), "ac"),
        (Recall(where="lang != py"), "bd"),
        (Recall(documents=("a", "b"), where="lang = rs"), "b"),
        (Recall(documents=Scope(documents=("a", "d"))), "ad"),
        (Recall(where="lang = none"), ""),
    ],
)
def test_a_text_sees_its_documents_and_itself(base: PreTrainedModel, recall: Recall, seen: str, tokens: int) -> None:
    """70 tokens are 3 windows into memory and a last one: all of them see the documents, and those before them."""
    want, _ = oracle.expected(base, text(tokens), FOT, together(seen))
    with opened(base) as model:
        with model.start(recall) as state:
            close(model(text(tokens)[None], past_key_values=state).logits[0], want)
        close(model(text(tokens)[None], recall=recall).logits[0], want)


def test_documents_of_the_model_itself_are_the_default(base: PreTrainedModel) -> None:
    want, _ = oracle.expected(base, text(30), FOT, together("b"))
    without, _ = oracle.expected(base, text(30), FOT)
    with opened(base, recall=Recall(documents=("b",))) as model:
        close(model(text(30)[None]).logits[0], want)
        close(model(text(30)[None], recall=NONE).logits[0], without)
        with model.start() as state:
            close(model(text(30)[None], past_key_values=state, recall=NONE).logits[0], without)


def test_a_document_that_is_not_there_is_said_to_be_missing(base: PreTrainedModel) -> None:
    with opened(base) as model, pytest.raises(Exception, match="nowhere"):
        model(text(9)[None], recall=Recall(documents=("nowhere",)))


def test_what_a_generation_may_remember_is_said_with_it(base: PreTrainedModel) -> None:
    """The documents that are left out might as well not be there, also after the window overflows."""
    how: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    prompt = {"input_ids": text(20)[None], "attention_mask": torch.ones(1, 20)}
    with opened(base, "abcd") as model:
        narrow = model.generate(**prompt, **how, recall=Recall(documents=("a", "b")))
        wide = model.generate(**prompt, **how)
    with opened(base, "ab") as model:
        assert torch.equal(narrow, model.generate(**prompt, **how))
    assert not torch.equal(narrow, wide)


def test_documents_are_seen_by_every_row_and_sessions_by_their_own(base: PreTrainedModel) -> None:
    rows = [text(50), text(50, seed=2)]
    with opened(base, "ab") as model:
        out = model(torch.stack(rows)).logits
    for number, row in enumerate(rows):
        close(out[number], oracle.expected(base, row, FOT, together("ab"))[0])


def test_what_a_state_was_told_before_is_remembered_with_it(base: PreTrainedModel) -> None:
    said, question = text(40), text(9, seed=2)
    want, _ = oracle.expected(base, torch.cat([said, question]), replace(FOT, last_context_length=9), together("a"))
    without, _ = oracle.expected(base, question, FOT, together("a"))
    with opened(base, "a", replace(FOT, last_context_length=24)) as model:
        with model.start() as state:
            # Windows of 24 and 16 tokens, as 49 tokens with a last context of 9 are cut.
            for part in said.split([24, 16]):
                model(part[None], past_key_values=state, use_cache=False)
                assert state.local_length == 0
            assert state.memory_tokens() == 40
            close(model(question[None], past_key_values=state).logits[0], want[40:])
        close(model(question[None]).logits[0], without)


# --- What does not matter -------------------------------------------------------------------------------------------


def test_the_order_of_ingestion_changes_nothing(base: PreTrainedModel) -> None:
    answers = []
    for order in ("abcd", "dcba", "cadb"):
        with opened(base, order) as model:
            answers.append(model(text(60)[None]).logits)
    close(answers[1], answers[0], 1e-5)
    close(answers[2], answers[0], 1e-5)


def test_many_segments_are_as_good_as_one(base: PreTrainedModel) -> None:
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*(document(name) for name in "abcd"), strict=True))
    answers = []
    for cuts in ([63], [1, 62], [7] * 9, [1] * 63):
        with Memory.open(":memory:", spec=spec_of(base, FOT)) as memory:
            pieces = zip(keys.split(cuts, dim=2), values.split(cuts, dim=2), strict=True)
            for number, (some_keys, some_values) in enumerate(pieces):
                memory.put(f"part-{number}", some_keys, some_values)
            with FotModel(base, FOT, memory) as model:
                answers.append(model(text(60)[None]).logits)
    for answer in answers[1:]:
        close(answer, answers[0], 1e-5)


@pytest.mark.parametrize("engine", ["auto", "exact"])
def test_a_top_k_of_everything_is_dense(base: PreTrainedModel, engine: str) -> None:
    with opened(base) as model:
        dense = model(text(60)[None]).logits
        close(model(text(60)[None], recall=Recall(top_k=200, engine=engine)).logits, dense, 1e-5)
        few = model(text(60)[None], recall=Recall(top_k=2, engine=engine)).logits
    assert (few - dense).abs().max() > 0.01


def test_the_top_k_of_a_query_are_its_highest_scores(base: PreTrainedModel) -> None:
    """With the model's own attention over only the k best keys of every query, in the layer that reads them."""
    fot = replace(FOT, mem_layers=(1,))
    (keys, values), heard = document("d"), []
    with Memory.open(":memory:", spec=spec_of(base, fot)) as memory:
        memory.put("d", keys[:1], values[:1])
        recall = Recall(top_k=3, tokens=True, on_read=heard.append)
        with FotModel(base, fot, memory, recall) as model:
            model(text(9)[None])
            dense: list[Read] = []
            model(text(9)[None], recall=Recall(top_k=40, tokens=True, on_read=dense.append))
    (few,), (everything,) = (([read] for read in reads) for reads in (heard, dense))
    few_found, all_found = few[0].attended.tokens, everything[0].attended.tokens
    assert few_found is not None and all_found is not None
    assert torch.equal(few_found.offset, all_found.offset[..., :3])
    close(few_found.score, all_found.score[..., :3], 1e-5)
    weights = all_found.score[..., :3].softmax(-1)  # [H, n, 3]
    picked = values[0].repeat_interleave(2, dim=0)[torch.arange(4)[:, None, None], few_found.offset]
    close(few[0].attended.output, (weights[..., None] * picked).sum(2), 1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(DType.BF16, 0.05), (DType.F16, 0.01)])
def test_a_memory_of_half_the_size_is_close(base: PreTrainedModel, dtype: DType, atol: float) -> None:
    with opened(base) as model:
        exact = model(text(60)[None]).logits
    with opened(base, fot=replace(FOT, mem_dtype=dtype)) as model:
        close(model(text(60)[None]).logits, exact, atol)


# --- Who listens ----------------------------------------------------------------------------------------------------


def test_every_read_is_told_with_its_share_of_the_softmax(base: PreTrainedModel) -> None:
    heard: list[Read] = []
    recall = Recall(attribution=True, on_read=heard.append)
    with opened(base, "bd", recall=recall) as model, model.start() as state:
        model(torch.stack([text(9), text(9, seed=2)]), past_key_values=state)
        assert [(read.layer, read.row, read.first_token) for read in heard] == [
            (1, 0, 0),
            (1, 1, 0),
            (3, 0, 0),
            (3, 1, 0),
        ]
        for read in heard:
            assert read.share.shape == read.attended.lse.shape == (4, 9)
            assert ((read.share > 0) & (read.share < 1)).all()
            assert read.attended.attribution is not None
            masses = {one.source: one.mass for one in read.attended.attribution}
            assert set(masses) == {"b", "d"}
            assert sum(masses.values()) == pytest.approx(1, abs=1e-5)
        heard.clear()
        model(torch.tensor([[7], [8]]), past_key_values=state)
        assert [(read.layer, read.row, read.first_token) for read in heard] == [
            (1, 0, 9),
            (1, 1, 9),
            (3, 0, 9),
            (3, 1, 9),
        ]


def test_the_share_is_what_the_memory_took_of_one_softmax(base: PreTrainedModel) -> None:
    """The first token of a text sees itself and the memory: its share follows from both scores."""
    heard: list[Read] = []
    with opened(base, "b") as model:
        model(text(1)[None], recall=Recall(on_read=heard.append))
    layer: Any = base.get_submodule("model.layers.1")
    inputs = base.model(text(1)[None], output_hidden_states=True).hidden_states[1]
    normed = layer.input_layernorm(inputs)
    query = layer.self_attn.q_proj(normed).view(4, 8)
    own = layer.self_attn.k_proj(normed).view(2, 8).repeat_interleave(2, dim=0)
    keys = document("b")[0][0].repeat_interleave(2, dim=0)  # [H, M, D]
    near, far = (query * own).sum(1) / 8**0.5, torch.einsum("hd,hmd->hm", query, keys) / 8**0.5
    close(heard[0].share[:, 0], far.exp().sum(1) / (far.exp().sum(1) + near.exp()), 1e-5)


# --- When the memory is not whole -----------------------------------------------------------------------------------


def test_an_answer_from_less_than_was_asked_for_is_an_error(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(base) as model:
        memory = model.memory
        assert memory is not None
        whole = memory.attend_groups

        def partly(*given: Any, **named: Any) -> tuple[Attended, ...]:
            answers = whole(*given, **named)
            return tuple(
                replace(one, coverage=Coverage(one.coverage.in_scope - 10, one.coverage.in_scope)) for one in answers
            )

        monkeypatch.setattr(memory, "attend_groups", partly)
        with pytest.raises(Unavailable, match="only 53 of 63 tokens in scope were searched"):
            model(text(9)[None])
        with pytest.raises(Unavailable, match="min_coverage=1"):
            model.generate(text(9)[None], attention_mask=torch.ones(1, 9), max_new_tokens=3)
        assert memory.stats().sessions == 0
        model(text(9)[None], recall=Recall(min_coverage=0.8))
