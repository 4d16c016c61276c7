"""What a training leaves: a checkpoint that others load, its card, its curves; LoRA is merged into it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from memory_service.errors import InvalidArgument
from model_worker.decoder.model import FotModel
from model_worker.settings import FotConfig
from model_worker.training import card, curves, metrics, record, snapshots
from model_worker.training.card import Score
from model_worker.training.config import LoraConfig
from model_worker.training.export import export, save_tokenizer
from model_worker.training.initial import start
from model_worker.training.lora import give_lora, merged
from model_worker.training.metrics import Row
from model_worker.training.run import train
from tests.model_worker.tiny import byte_tokenizer, save_tiny, tiny_model
from tests.model_worker.trainings import Echo, small

IDS = torch.arange(24)[None] % 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of six steps, from scratch."""
    out = tmp_path_factory.mktemp("trained") / "small"
    train(small(out, steps=6))
    return out


# --- the checkpoint ---


def test_an_exported_model_loads_as_a_plain_llama_with_the_trained_weights(trained: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(trained / "model")
    weights = snapshots.read(trained).weights
    loaded = dict(base.named_parameters())
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert not torch.equal(weights["model.norm.weight"], torch.ones(16))
    assert base.config._attn_implementation == "sdpa"


def test_an_exported_model_gets_its_memory_without_further_arguments(trained: Path) -> None:
    with FotModel.from_pretrained(trained / "model") as model:
        assert model.fot.mem_layers == (1,)
        assert (model.fot.window, model.fot.last_context_length) == (36, 18)
        plain = LlamaForCausalLM.from_pretrained(trained / "model")
        with torch.no_grad():
            want = plain(input_ids=IDS[:, :18]).logits
        torch.testing.assert_close(model(IDS[:, :18]).logits, want, atol=1e-4, rtol=0)
        assert model(IDS, logits_to_keep=1).logits.shape == (1, 1, 64)  # Longer: the beginning went to memory.


def test_a_tokenizer_of_one_file_is_saved_so_that_transformers_finds_it(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    (tmp_path / "alone").mkdir()
    file = (tmp_path / "whole" / "tokenizer.json").rename(tmp_path / "alone" / "words.json")
    (tmp_path / "out").mkdir()
    save_tokenizer(file, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("key 7")["input_ids"] == byte_tokenizer()("key 7")["input_ids"]


def test_a_model_from_scratch_takes_its_vocabulary_from_the_tokenizer_and_keeps_it(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "words")
    model = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    out = tmp_path / "out"
    train(small(out, steps=1, model={**model, "tokenizer": str(tmp_path / "words")}), source=Echo())
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.vocab_size == 260
    assert AutoTokenizer.from_pretrained(out / "model").decode([107 + 4]) == "k"


def test_an_export_replaces_the_one_before_and_is_readable_by_all(tmp_path: Path) -> None:
    base, place = tiny_model(), tmp_path / "model"
    for number in (1, 2):
        with export(place, base, FotConfig(mem_layers=(1,))) as folder:
            (folder / f"{number}.txt").write_text("there")
    assert not (place / "1.txt").exists() and (place / "2.txt").exists()
    assert [one.name for one in tmp_path.iterdir()] == ["model"]
    assert {one.stat().st_mode & 0o777 for one in place.iterdir()} == {0o644}


# --- going on from a checkpoint ---


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_checkpoint_is_fine_tuned_and_stays_what_it_was(tmp_path: Path, architecture: str) -> None:
    path = save_tiny(tmp_path / architecture, architecture)
    config = small(tmp_path / "out", steps=2, model={"path": architecture})  # Relative to the TOML file.
    result = train(config, source=Echo())
    before, after = (AutoModelForCausalLM.from_pretrained(one) for one in (path, result.model))
    assert type(after) is type(before)
    assert after.config.fot["mem_layers"] == [1]
    differ = {name for name, one in before.named_parameters() if not torch.equal(one, after.get_parameter(name))}
    assert differ == {name for name, _ in before.named_parameters()}
    assert (result.model / "tokenizer.json").exists()
    assert "from the checkpoint" in (result.model / "README.md").read_text()


def test_a_checkpoint_is_fine_tuned_on_ones_own_documents(tmp_path: Path) -> None:
    save_tiny(tmp_path / "before", "llama")
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Room {number} has a door. " * 20)
    config = small(
        tmp_path / "out",
        steps=4,
        model={"path": "before"},
        data={"source": "documents", "paths": ["texts"]},  # Beside the TOML file.
        level=[
            {"until_accuracy": 0.5, "max_steps": 2, "shapes": [{"documents": 2, "group": 1, "window": 32}]},
            {"shapes": [{"documents": 2, "group": 2, "window": 32}]},
        ],
    )
    result = train(config)
    assert result.level == 1 and result.last is not None
    assert result.last.answer_accuracy is None and result.last.text_loss == pytest.approx(result.last.loss)
    assert result.last.loss < metrics.read(config.out)[0].loss


def test_what_a_checkpoint_says_of_its_memory_holds_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    with export(tmp_path / "before", tiny_model(), FotConfig(mem_layers=(0, 2), window=64, overlap=8)):
        pass
    found = start(small(tmp_path / "out", model={"path": "before"}, fot={"window": 48}))
    assert (found.fot.mem_layers, found.fot.window, found.fot.overlap) == ((0, 2), 48, 8)


# --- LoRA ---


def test_lora_trains_its_factors_alone_and_is_merged_at_export(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "before", "llama")
    lora = {"rank": 2, "targets": ["q_proj", "v_proj"]}
    result = train(small(tmp_path / "out", steps=3, model={"path": "before"}, lora=lora), source=Echo())
    weights = snapshots.read(tmp_path / "out").weights
    assert weights and all(".lora_" in name for name in weights)
    before, after = (load_file(one / "model.safetensors") for one in (path, result.model))
    assert before.keys() == after.keys()
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ == {name for name in before if "q_proj" in name or "v_proj" in name}
    told = record.read(result.model)
    assert told.trained_parameters == 4 * 2 * (2 * (32 + 32) - 16) == sum(one.numel() for one in weights.values())
    assert told.parameters == sum(one.numel() for one in before.values())


def test_merged_weights_give_the_same_logits_and_leave_the_model_alone() -> None:
    base = tiny_model()
    give_lora(base, LoraConfig(rank=2, targets=("q_proj", "down_proj")), seed=0)
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)  # Else LoRA adds nothing yet.
    kept = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    plain = tiny_model(seed=1)
    plain.load_state_dict(merged(base))
    with torch.no_grad():
        want, have = base(input_ids=IDS).logits, plain(input_ids=IDS).logits
        assert not torch.allclose(want, tiny_model()(input_ids=IDS).logits, atol=0.1)
    torch.testing.assert_close(have, want, atol=1e-4, rtol=0)
    assert all(torch.equal(kept[name], tensor) for name, tensor in base.state_dict().items())


def test_lora_targets_that_the_model_has_not_are_told_with_those_it_has() -> None:
    with pytest.raises(InvalidArgument, match=r"\['c_attn'\] are not in this model, which has .*down_proj.*q_proj"):
        give_lora(tiny_model(), LoraConfig(targets=("c_attn",)), seed=0)


# --- the card ---


def test_a_card_says_how_the_model_was_trained_and_that_nothing_was_measured_yet(trained: Path) -> None:
    text = (trained / "model" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers")
    assert "# small" in text
    told = record.read(trained / "model")
    assert (told.steps, told.passed) == (6, [(4, told.passed[0][1])])
    for fact in (f"| tokens | {told.tokens:,} |", "| start | from scratch |", "| steps | 6 of 6 |", "Not measured yet"):
        assert fact in text
    assert "| 0 | 2 documents x 2 windows of 36, groups of 2 | step 4: 4 steps are over" in text
    rows = metrics.read(trained)
    assert told.final["loss"] == pytest.approx(sum(row.loss for row in rows) / 6)
    assert json.loads((trained / "model" / "training.json").read_text())["machine"]["cores"] >= 1


def test_a_card_is_written_anew_with_scores_and_limits(trained: Path, tmp_path: Path) -> None:
    for name in ("training.json",):
        (tmp_path / name).write_bytes((trained / "model" / name).read_bytes())
    score = Score("passkey, 4,096 tokens", "100 % of 20", "fot passkey --tokens 4096")
    place = card.write_card(tmp_path, "reference", [score], ["It knows English only."], about="A small model.")
    text = place.read_text()
    assert "| passkey, 4,096 tokens | 100 % of 20 | `fot passkey --tokens 4096` |" in text
    assert "- It knows English only." in text and "A small model." in text
    assert "Not measured yet" not in text


def test_a_card_needs_the_record_of_a_training(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is no model that fot train made"):
        card.write_card(tmp_path, "nothing")


# --- the curves ---


def row(step: int, **changes: float) -> Row:
    made = Row(step, 0, 4.0, 3.0, 0.5, 2.0, 1.0, 1.0, 1.0, False, step * 10, step * 1.0, 10.0)
    return replace(made, **changes)  # type: ignore[arg-type]  # only floats are changed


def size(place: Path) -> tuple[int, int]:
    data = place.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_curves_are_drawn_at_every_save(trained: Path) -> None:
    assert size(trained / "curves.png") == (1350, 1125)


def test_curves_show_what_there_is(tmp_path: Path) -> None:
    plain = [replace(row(step), answer_loss=None, answer_accuracy=None, text_loss=None) for step in (1, 2)]
    with_all = [row(1), row(2), row(3, level=1)]
    pictures = [curves.draw(rows, tmp_path / f"{len(rows)}.png").read_bytes() for rows in ([], plain, with_all)]
    assert len(set(pictures)) == 3


def test_smoothing_starts_from_the_first_value_and_forgets_it() -> None:
    assert curves.smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert curves.smooth([0.0, 1.0], share=0.5) == pytest.approx([0.0, 1 / 1.5])


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's reader uses what numpy deprecates.
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))  # type: ignore[no-untyped-call]
        events.Reload()  # type: ignore[no-untyped-call]
        found: Sequence[object] = events.Scalars(name)  # type: ignore[no-untyped-call]
    return [(one.step, one.value) for one in found]  # type: ignore[attr-defined]


def test_tensorboard_gets_every_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with curves.Board(tmp_path) as board:
        for step in (1, 2, 3):
            board.add(row(step, loss=float(step)))
    with curves.Board(tmp_path, done=2) as board:  # Killed after 3, resumed from 2.
        board.add(row(3, loss=30.0))
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_without_tensorboard_nothing_is_written_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    with curves.Board(tmp_path) as board:
        board.add(row(1))
    assert not list(tmp_path.iterdir())


# --- metrics.jsonl ---


def test_metrics_go_on_after_the_steps_that_were_kept(tmp_path: Path) -> None:
    with metrics.Rows(tmp_path) as rows:
        for step in (1, 2, 3):
            rows.add(row(step))
    with (tmp_path / metrics.NAME).open("a") as file:
        file.write('{"step": 4, "loss')  # A kill in the middle of a line.
    with metrics.Rows(tmp_path, done=2) as rows:
        rows.add(row(3, loss=9.0))
    assert metrics.read(tmp_path) == [row(1), row(2), row(3, loss=9.0)]
