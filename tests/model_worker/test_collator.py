"""The collator: what is in a batch, that a model reads it as one causal text, and which streams of draws there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from memory_service.errors import InvalidArgument
from model_worker.errors import UnsupportedModel
from model_worker.positions.cream import Branch, Cream, Pose, RandomPositions
from model_worker.training.collator import IGNORED, Collator, Mask, check_mask
from tests.model_worker.tiny import tiny_model

CREAM = Cream(48, 4)


def texts(*lengths: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(4, 260, (length,), generator=generator)} for length in lengths]


def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        out: Tensor = model(**inputs, use_cache=False).logits
    return out


def one_by_one(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The last logits of every prefix of the first row, each read through a cache that already holds what is before.

    Nobody takes a text that goes on in a cache for another one, so this is full attention over all segments.
    """
    rows, cache = [], None
    with torch.no_grad():
        for slot in range(batch["input_ids"].shape[1]):
            out = model(
                input_ids=batch["input_ids"][:1, slot : slot + 1],
                position_ids=batch["position_ids"][:1, slot : slot + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            rows.append(out.logits)
    return torch.cat(rows, dim=1)


# --- what is in a batch ---


def test_a_batch_holds_the_tokens_at_their_positions_and_labels_that_are_the_tokens() -> None:
    examples = texts(192, 300)
    batch = Collator(CREAM, seed=5)(examples)
    placements = CREAM.sample([192, 300], np.random.default_rng(5))
    for row, (example, (tokens, positions)) in enumerate(zip(examples, placements, strict=True)):
        assert torch.equal(batch["input_ids"][row], example["input_ids"][tokens])
        assert torch.equal(batch["position_ids"][row], positions)
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, [2, 48]),
        "position_ids": (torch.int64, [2, 48]),
        "labels": (torch.int64, [2, 48]),
        "attention_mask": (torch.float32, [2, 1, 48, 48]),
    }


def test_lists_arrays_and_tensors_are_texts_alike() -> None:
    [text] = texts(100)
    kinds = [text["input_ids"], text["input_ids"].numpy().astype(np.int32), text["input_ids"].tolist()]
    batches = [Collator(CREAM, seed=1)([{"input_ids": ids}]) for ids in kinds]
    assert all(torch.equal(batches[0]["input_ids"], batch["input_ids"]) for batch in batches)


def test_short_texts_are_padded_at_the_end_and_their_pads_count_for_nothing() -> None:
    batch = Collator(Pose(48, 4), seed=0, pad_token_id=2, mask=Mask.ONES)(texts(20, 100))
    assert batch["attention_mask"].tolist() == [[1] * 20 + [0] * 28, [1] * 48]
    assert (batch["input_ids"][0, 20:] == 2).all()
    assert (batch["labels"][0, 20:] == IGNORED).all() and (batch["labels"][0, :20] != IGNORED).all()
    assert (batch["position_ids"][0, 20:] == batch["position_ids"][0, 19]).all()


def test_labels_of_the_examples_are_taken_along() -> None:
    [text] = texts(100)
    text["labels"] = [IGNORED] * 60 + text["input_ids"].tolist()[60:]
    batch = Collator(RandomPositions(80, 4), seed=0)([text])
    assert (batch["labels"][0, :60] == IGNORED).all()
    assert torch.equal(batch["labels"][0, 60:], text["input_ids"][60:80])


def test_labels_at_borders_stay_unless_asked_and_go_only_where_the_text_does_not_go_on() -> None:
    kept, masked = (Collator(CREAM, seed=5, mask_borders=mask)(texts(48, 500)) for mask in (False, True))
    assert torch.equal(kept["input_ids"], masked["input_ids"])
    assert (kept["labels"] != IGNORED).all()
    assert (masked["labels"][0] != IGNORED).all()  # All its tokens follow each other; only positions jump.
    [(tokens, _)] = CREAM.sample([48, 500], np.random.default_rng(5))[1:]
    borders = (tokens.diff() != 1).nonzero().flatten() + 1
    assert (masked["labels"][1] == IGNORED).nonzero().flatten().tolist() == borders.tolist()
    assert 1 <= len(borders) <= 2


def test_malformed_examples_are_refused() -> None:
    collator = Collator(CREAM, seed=0)
    for examples, message in [
        ([], "at least one example"),
        ([{"text": "x"}], "needs input_ids"),
        ([{"input_ids": [[1, 2], [3, 4]]}], "one text"),
        ([{"input_ids": [1] * 60, "labels": [1] * 59}], "one text"),
        ([{"input_ids": [1] * 60, "attention_mask": [0] * 5 + [1] * 55}], "padded"),
        ([{"input_ids": [1] * 40}], "too short"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            collator(examples)
    with pytest.raises(InvalidArgument, match="seed"):
        Collator(CREAM, seed=-1)


def test_a_mask_of_a_batch_takes_the_memory_of_one_row() -> None:
    examples = texts(*[48] * 8)
    for mask, size in {Mask.ADDITIVE: 4, Mask.BOOLEAN: 1}.items():
        [tensor] = [Collator(CREAM, seed=0, mask=mask)(examples)["attention_mask"]]
        assert list(tensor.shape) == [8, 1, 48, 48]
        assert tensor.untyped_storage().nbytes() == size * 48 * 48


# --- how a model reads it ---

WORKING = [
    ("sdpa", Mask.ADDITIVE),
    ("sdpa", Mask.BOOLEAN),
    ("sdpa", Mask.ONES),
    ("eager", Mask.ADDITIVE),
    ("eager", Mask.ONES),
]


@pytest.mark.parametrize(("attention", "mask"), WORKING)
def test_every_token_sees_all_segments_before_it_and_would_not_without_the_mask(attention: str, mask: Mask) -> None:
    model = tiny_model("llama", attn_implementation=attention)
    batch = Collator(Cream(48, 4, branches=(Branch.RELATIVITY,)), seed=0, mask=mask)(texts(200, 200))
    have = logits(model, batch)
    torch.testing.assert_close(have[:1], one_by_one(model, batch), rtol=1e-4, atol=1e-4)
    # The trap: transformers takes the jumps for borders of packed texts.
    trapped = logits(model, {name: tensor for name, tensor in batch.items() if name != "attention_mask"})
    assert torch.allclose(trapped[:, :16], have[:, :16], atol=1e-4)
    assert (trapped[:, 16:] - have[:, 16:]).abs().max() > 0.5


@pytest.mark.parametrize(("attention", "mask"), WORKING)
def test_padding_changes_no_logits(attention: str, mask: Mask) -> None:
    model = tiny_model("llama", attn_implementation=attention)
    examples = texts(20, 100)
    both = Collator(Pose(48, 4), seed=0, mask=mask)(examples)
    alone = Collator(Pose(48, 4), seed=0, mask=mask)(examples[:1])
    assert torch.equal(both["position_ids"][0, :20], alone["position_ids"][0])
    torch.testing.assert_close(logits(model, both)[0, :20], logits(model, alone)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", Mask)
def test_a_bfloat16_model_trains_on_any_mask(mask: Mask) -> None:
    model = tiny_model("llama").to(torch.bfloat16).train()
    batch = Collator(CREAM, seed=0, mask=mask, dtype=torch.bfloat16)(texts(100, 100))
    check_mask(model, batch)
    assert model.training
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi"])
def test_the_check_passes_for_every_architecture(architecture: str) -> None:
    for attention, mask in WORKING:
        model = tiny_model(architecture, attn_implementation=attention)
        check_mask(model, Collator(Pose(48, 4), seed=3, mask=mask)(texts(30, 200)))


def test_the_check_finds_the_trap() -> None:
    batch = Collator(CREAM, seed=0)(texts(100))
    del batch["attention_mask"]
    with pytest.raises(UnsupportedModel, match="takes a jump of the positions for the start of another text"):
        check_mask(tiny_model("llama"), batch)


def test_the_check_finds_a_mask_that_eager_attention_adds_as_numbers() -> None:
    model = tiny_model("llama", attn_implementation="eager")
    with pytest.raises(UnsupportedModel, match=r"use Mask\.ADDITIVE"):
        check_mask(model, Collator(CREAM, seed=0, mask=Mask.BOOLEAN)(texts(100)))


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_the_check_finds_sliding_layers_that_a_mask_made_full(architecture: str) -> None:
    model = tiny_model(architecture)
    with pytest.raises(UnsupportedModel, match="sliding attention"):
        check_mask(model, Collator(CREAM, seed=0, mask=Mask.ADDITIVE)(texts(100)))
    check_mask(model, Collator(CREAM, seed=0, mask=Mask.ONES)(texts(100)))


def test_the_check_needs_a_jump() -> None:
    with pytest.raises(InvalidArgument, match="take another"):
        check_mask(tiny_model("llama"), Collator(RandomPositions(48, 1), seed=0)(texts(100)))


# --- streams of draws ---


def positions_of(loader: DataLoader[Any]) -> list[list[int]]:
    return [row for batch in loader for row in batch["position_ids"].tolist()]


def test_a_seed_gives_the_same_batches_and_goes_on_over_epochs() -> None:
    data = texts(*[100] * 8)

    def epochs(seed: int) -> list[list[list[int]]]:
        collator = Collator(CREAM, seed=seed)
        return [positions_of(DataLoader(data, batch_size=2, collate_fn=collator)) for _ in range(2)]

    first, second = epochs(7)
    assert epochs(7) == [first, second]
    assert first != second
    assert epochs(8)[0] != first


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later: torch's threads are idle.
def test_workers_and_epochs_have_streams_of_their_own_and_repeat_with_the_seeds() -> None:
    data = texts(*[100] * 8)

    def epochs(torch_seed: int) -> list[list[list[int]]]:
        loader = DataLoader(
            data,
            batch_size=2,
            num_workers=2,
            collate_fn=Collator(CREAM, seed=7),
            generator=torch.Generator().manual_seed(torch_seed),
        )
        return [positions_of(loader) for _ in range(2)]

    first, second = epochs(0)
    assert first[:2] != first[2:4]  # The first batches of the two workers.
    assert first != second
    assert epochs(0) == [first, second]
    assert epochs(1)[0] != first


def test_a_loop_of_ones_own_learns() -> None:
    model = tiny_model("llama").train()
    batch = Collator(CREAM, seed=0)(texts(100, 100))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
