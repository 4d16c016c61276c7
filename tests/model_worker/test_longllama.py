"""LongLLaMA checkpoints load as transformers' own Llama, and any checkpoint can remember its memory's fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from memory_service import DType
from model_worker.errors import UnsupportedModel
from model_worker.hf.longllama import (
    fot_fields,
    fot_fields_of_config,
    fot_json,
    is_longllama,
    llama_config,
    read_config,
)
from model_worker.settings import Cut, FotConfig, LogitScaling, MemoryPosition, Overflow, SelfExtend
from tests.model_worker.tiny import tiny_config, tiny_model

SMALL: dict[str, Any] = {
    "model_type": "longllama",
    "architectures": ["LongLlamaForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_longllama.LongLlamaForCausalLM"},
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 1_000_000,
    "eos_token_id": None,
    "mem_layers": [2, 1],
    "mem_dtype": "float32",
    "mem_attention_grouping": [1, 5],
    "torch_attention": False,
}


def test_a_longllama_configuration_is_told_by_its_model_type() -> None:
    assert is_longllama(SMALL)
    assert not is_longllama({"model_type": "llama"})
    assert not is_longllama({})


def test_a_longllama_configuration_becomes_a_llama_one() -> None:
    config = llama_config(SMALL)
    assert (config.model_type, config.architectures) == ("llama", ["LlamaForCausalLM"])
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (16, 3, 2)
    assert config.rope_parameters == {"rope_theta": 1e6, "rope_type": "default"}
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, None)


def test_what_the_file_leaves_out_is_the_authors_default() -> None:
    config, fields = llama_config({"model_type": "longllama"}), fot_fields({"model_type": "longllama"})
    assert (config.hidden_size, config.num_hidden_layers, config.rms_norm_eps) == (4096, 32, 1e-6)
    assert config.rope_parameters == {"rope_theta": 1e4, "rope_type": "default"}
    assert FotConfig(**fields) == FotConfig(
        mem_layers=(),
        window=2048,
        last_context_length=1024,
        mem_positionals=True,
        mem_dtype=DType.BF16,
        overflow=Overflow.FLUSH,
        cut=Cut.BATCH,
    )


def test_the_memory_fields_of_a_longllama_configuration_are_read() -> None:
    fields = fot_fields(SMALL | {"last_context_length": 20, "mem_positionals": False})
    assert FotConfig(**fields) == FotConfig(
        mem_layers=(1, 2),
        window=64,
        last_context_length=20,
        mem_positionals=False,
        mem_dtype=DType.F32,
        overflow=Overflow.FLUSH,
        cut=Cut.BATCH,
    )


def test_scaled_rope_is_kept() -> None:
    config = llama_config(SMALL | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert config.rope_parameters == {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("bfloat16", DType.BF16), ("torch.bfloat16", DType.BF16), ("float16", DType.F16), ("f32", DType.F32)],
)
def test_the_memory_dtype_is_read_by_its_torch_name(word: str, dtype: DType) -> None:
    assert fot_fields(SMALL | {"mem_dtype": word})["mem_dtype"] is dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mem_dtype": "int8"}, "mem_dtype 'int8' is unknown; a memory keeps bfloat16"),
        ({"mem_layers": [1, 3]}, r"mem_layers \[1, 3\] must be layers of the model: 0 to 2"),
        ({"model_type": "llama"}, "model_type 'llama' is not LongLLaMA's"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        fot_fields(SMALL | change)


def test_a_longllama_checkpoint_loads_without_its_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    weights = tiny_model("llama", **_geometry(SMALL)).state_dict()
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    save_file(weights | old, tmp_path / "model.safetensors", metadata={"format": "pt"})

    config = llama_config(read_config(tmp_path))
    model, told = LlamaForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)

    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    # The old buffer was skipped, not loaded: rotation is by rope_theta of the configuration.
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, 1e6 ** -(torch.arange(0, 8, 2) / 8))
    assert not caplog.records


def test_a_saved_longllama_remembers_its_memory(tmp_path: Path) -> None:
    LlamaForCausalLM(llama_config(SMALL)).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LlamaConfig)
    assert fot_fields_of_config(config) == fot_fields(SMALL) | {
        "memory_position": MemoryPosition.FIRST,
        "fixed_position": 0,
        "overlap": 0,
        "self_extend": None,
    }


def test_any_checkpoint_remembers_all_fields(tmp_path: Path) -> None:
    fot = FotConfig(
        mem_layers=(1, 3),
        window=96,
        last_context_length=48,
        mem_positionals=False,
        memory_position=MemoryPosition.FIXED,
        fixed_position=7,
        mem_dtype=DType.F16,
        overflow=Overflow.FLUSH,
        cut=Cut.BATCH,
        overlap=8,
        self_extend=SelfExtend(4, 16, LogitScaling.LOG, 32),
    )
    config = tiny_config("qwen3")
    config.fot = fot_json(fot)
    config.save_pretrained(tmp_path)
    assert FotConfig(**fot_fields_of_config(AutoConfig.from_pretrained(tmp_path))) == fot


def test_a_configuration_without_fields_says_nothing() -> None:
    assert fot_fields_of_config(tiny_config("llama")) == {}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"mem_layers": [1], "colour": "blue"}, r"does not know: \['colour'\]"),
        ({"overflow": "spill"}, "cannot be read: 'spill' is not a valid Overflow"),
        ({"self_extend": {"group": 4}}, "cannot be read: .*missing.*'window'"),
        ([1, 2], "must be an object"),
    ],
)
def test_fields_of_another_version_are_refused(kept: object, message: str) -> None:
    config = tiny_config("llama")
    config.fot = kept
    with pytest.raises(UnsupportedModel, match=message):
        fot_fields_of_config(config)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=f"no config.json at '{tmp_path}'"):
        read_config(tmp_path)


def test_a_checkpoint_that_is_nowhere_is_named() -> None:
    with pytest.raises(UnsupportedModel, match=r"no checkpoint can be read at .\./nowhere."):
        read_config("./nowhere")


def _geometry(config: dict[str, Any]) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: config[name] for name in names} | {"num_key_value_heads": None}
