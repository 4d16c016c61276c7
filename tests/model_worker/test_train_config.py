"""A training's TOML: what it becomes, and a sentence with the key and what it takes for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memory_service.errors import InvalidArgument
from model_worker.errors import UnsupportedModel
from model_worker.training import config as configuration
from model_worker.training.config import Kind, Level, Precision, TrainConfig
from model_worker.training.initial import start
from model_worker.training.shapes import Shape
from tests.model_worker.trainings import MODEL, SMALL, small, tables

TOML = """
seed = 3
out = "runs/x"
steps = 100
dtype = "bfloat16"

[model]
tokenizer = "words"
hidden_size = 16

[fot]
mem_layers = [1]

[optimizer]
kind = "adamw"
adamw_lr = 1          # whole numbers are numbers

[data]
source = "retrieval"
uuid = 0.2

[[level]]
until_accuracy = 0.9
shapes = [{documents = 4, group = 2}, {documents = 8, weight = 2.5}]

[[level]]
temperatures = [1.0, 0.5]
shapes = [{}]
"""


def test_a_file_becomes_frozen_values_with_paths_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text(TOML)
    config = configuration.read(file, steps=7, threads=None)
    assert (config.seed, config.steps, config.out, config.dtype) == (3, 7, Path("runs/x"), Precision.BFLOAT16)
    assert config.model.tokenizer == tmp_path / "words"
    assert config.model.llama == {"hidden_size": 16}
    assert config.optimizer.kind is Kind.ADAMW and config.optimizer.adamw_lr == 1.0
    assert (config.data.source, config.data.options) == ("retrieval", {"uuid": 0.2})
    assert config.levels[0].shapes == (Shape(documents=4, group=2), Shape(documents=8, weight=2.5))
    assert config.levels[1] == Level((Shape(),), temperatures=(1.0, 0.5))
    json.dumps(config.described())


def test_what_is_told_of_a_training_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text(TOML)
    told = configuration.read(file).described()
    assert told["model"]["tokenizer"] == "words" and told["model"]["path"] is None
    assert str(tmp_path) not in json.dumps(told)


def broken(**changes: Any) -> TrainConfig:
    return configuration.of_tables({**tables(), **changes}, Path())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepps": 3}, r"the top of the file has a key 'stepps' that nothing reads: did you mean steps\?"),
        ({"steps": "many"}, "steps must be a whole number, got 'many'"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"steps": 0}, "steps must be ≥ 1, got 0"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
        ({"optimizer": {"rate": 1.0}}, "'rate' that nothing reads: known are kind, muon_lr"),
        ({"optimizer": {"kind": "sgd"}}, r"\[optimizer\]: kind must be one of muon, adamw, got 'sgd'"),
        ({"optimizer": {"betas": [0.9]}}, r"\[optimizer\]: betas must be a list of 2"),
        ({"optimizer": {"muon_lr": 0.0}}, "muon_lr must be above 0"),
        ({"fot": {"memory_layers": [1]}}, r"\[fot\] has a key 'memory_layers' that nothing reads: did you mean"),
        ({"model": {"path": "x", "hidden_size": 3}}, r"\['hidden_size'\] come from its config.json"),
        ({"model": {}}, r"\[model\] needs path"),
        ({"data": {}}, r"\[data\] needs source"),
        ({"level": []}, r"at least one \[\[level\]\]"),
        ({"level": {"shapes": [SMALL]}}, "with two brackets"),
        ({"level": [{"shapes": []}]}, r"needs shapes"),
        ({"level": [{"shapes": [{"docs": 1}]}]}, r"\[\[level\]\] 0 shapes has a key 'docs' that nothing reads"),
        ({"level": [{"shapes": [SMALL], "until_accurate": 0.5}]}, "did you mean until_accuracy"),
        ({"level": [{"shapes": [SMALL]}, {"shapes": [SMALL]}]}, "0 never ends: give it until_accuracy or max_steps"),
        ({"level": [{"shapes": [SMALL], "temperatures": [0.0]}]}, "temperatures must be numbers above 0"),
        ({"lora": {"rank": 0}}, r"\[lora\] rank must be ≥ 1"),
        ({"positions": {"recipe": "yarn", "factor": 2}}, "recipe must be one of cream, pose, randpos"),
        ({"positions": {"recipe": "cream"}}, "factor must be a whole number, got None"),
    ],
)
def test_a_mistake_is_told_with_its_key_and_what_would_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        broken(**changes)


def test_a_missing_section_or_key_is_named() -> None:
    without = tables()
    del without["data"]
    with pytest.raises(InvalidArgument, match=r"lacks its section \[data\]"):
        configuration.of_tables(without, Path())
    without = tables()
    del without["steps"]
    with pytest.raises(InvalidArgument, match="lacks steps"):
        configuration.of_tables(without, Path())


def test_a_file_that_is_not_there_or_no_toml_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="No such file"):
        configuration.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(InvalidArgument, match="is no TOML"):
        configuration.read(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**MODEL, "hiden_size": 3}}, "hiden_size"),
        ({"model": {"hidden_size": 16}}, "needs a tokenizer, or vocab_size"),
        ({"model": {**MODEL, "tokenizer": "nowhere"}}, "there is no tokenizer at"),
        ({"model": {"path": "nowhere"}}, "is no checkpoint: it has no config.json"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"fot": {"mem_layers": [3], "window": 36}}, r"mem_layers \[3\] are not layers of the model"),
        ({"fot": {"mem_layers": [1], "window": "wide"}}, r"\[fot\] has a value of the wrong type"),
        ({"fot": {"mem_layers": [1], "overflow": "spill"}}, "'spill' is not a valid Overflow"),
    ],
)
def test_what_only_the_model_knows_is_told_when_it_is_made(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        start(small(tmp_path / "out", **changes))


def test_a_model_that_cannot_have_a_memory_is_refused_before_training(tmp_path: Path) -> None:
    from tests.model_worker.tiny import save_tiny

    path = save_tiny(tmp_path / "gemma2", "gemma2")
    with pytest.raises(UnsupportedModel, match="capped"):
        start(small(tmp_path / "out", model={"path": str(path)}))


def test_models_from_scratch_follow_the_seed_and_the_spread_of_the_recipe(tmp_path: Path) -> None:
    model = {**MODEL, "hidden_size": 64, "intermediate_size": 128}
    first, again, other = (start(small(tmp_path / "out", model=model, seed=seed)) for seed in (1, 1, 2))
    assert first.digest == again.digest != other.digest
    weights = {name: tensor.detach() for name, tensor in first.base.named_parameters()}
    layer = "model.layers.1"
    assert weights[f"{layer}.self_attn.q_proj.weight"].std().item() == pytest.approx(0.7 / 64**0.5, rel=0.05)
    assert weights[f"{layer}.mlp.down_proj.weight"].std().item() == pytest.approx(0.7 / 128**0.5 / 6**0.5, rel=0.05)
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
