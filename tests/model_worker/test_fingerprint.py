"""A fingerprint tells models apart that make different keys and values, and only those."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from memory_service.errors import InvalidArgument
from model_worker.errors import UnsupportedModel
from model_worker.hf import fingerprint as module
from model_worker.hf.fingerprint import fingerprint, rope_json, weights_digest
from model_worker.hf.longllama import llama_config
from tests.model_worker.tiny import ARCHITECTURES, FURTHER, tiny_config, tiny_model

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_a_fingerprint_carries_name_revision_weights_and_rope() -> None:
    base = tiny_model("llama")
    found = fingerprint(base, (1, 2), "tiny", "v1")
    assert (found.model, found.revision) == ("tiny", "v1")
    assert found.weights == weights_digest(base, 2)
    assert found.rope == rope_json(base.config)


@pytest.mark.parametrize("architecture", ARCHITECTURES + FURTHER)
def test_equal_models_have_equal_fingerprints_and_others_do_not(architecture: str) -> None:
    one = fingerprint(tiny_model(architecture), (2,), "tiny")
    assert fingerprint(tiny_model(architecture), (2,), "tiny") == one
    assert fingerprint(tiny_model(architecture, seed=1), (2,), "tiny") != one


@pytest.mark.parametrize("architecture", ARCHITECTURES + FURTHER)
def test_every_weight_that_makes_keys_counts_and_no_other(architecture: str) -> None:
    base = tiny_model(architecture)
    before = weights_digest(base, 2)
    counted = set()
    for name, parameter in base.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 0.5
        if weights_digest(base, 2) != before:
            counted.add(name)
        with torch.no_grad():
            parameter.copy_(kept)
    assert weights_digest(base, 2) == before
    assert counted == {name for name, _ in base.named_parameters() if reaches_keys(base, name, layer=2)}


def reaches_keys(base: torch.nn.Module, name: str, layer: int) -> bool:
    """By gradients: whether keys or values of the layer depend on the parameter."""
    heard: list[Tensor] = []
    attention = base.get_submodule(f"model.layers.{layer}.self_attn")
    made = [part for part in ("k_norm", "k_proj", "v_proj", "qkv_proj") if part in dict(attention.named_children())]
    made = [part for part in made if not (part == "k_proj" and "k_norm" in made)]
    hooks = [
        attention.get_submodule(part).register_forward_hook(lambda *given: heard.append(given[2])) for part in made
    ]
    base.zero_grad()
    base(torch.arange(12)[None])
    for hook in hooks:
        hook.remove()
    # Squares, so that no symmetry makes a gradient vanish.
    sum((one**2 * torch.rand(one.shape, generator=torch.Generator().manual_seed(0))).sum() for one in heard).backward()
    gradient = base.get_parameter(name).grad
    return gradient is not None and bool(gradient.abs().sum() > 0)


@pytest.mark.parametrize("stored", CPU_DTYPES)
def test_the_digest_does_not_depend_on_the_dtype_a_checkpoint_is_loaded_in(stored: torch.dtype, tmp_path: Path) -> None:
    base = tiny_model("llama")
    with torch.no_grad():  # Values float16 rounds or loses, which every real checkpoint has.
        base.get_parameter("model.layers.0.mlp.up_proj.weight").view(-1)[:512] *= torch.logspace(0, -8, 512)
    base.to(stored).save_pretrained(tmp_path)

    digests = {
        dtype: weights_digest(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), 2) for dtype in CPU_DTYPES
    }

    assert digests[torch.float32] == digests[torch.bfloat16]
    # Float16 and bfloat16 round a float32 at different places, and no digest of single values can hide that.
    assert (digests[torch.float16] == digests[torch.float32]) == (stored != torch.float32)


def test_of_a_large_tensor_a_sample_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 64)
    base = tiny_model("llama")
    before = weights_digest(base, 1)
    weight = base.get_parameter("model.layers.0.mlp.up_proj.weight")
    with torch.no_grad():
        weight[:, 3] += 0.25  # One column of 32; the sample meets every column.
    assert weights_digest(base, 1) != before


def test_the_sample_of_a_large_tensor_meets_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = module._sample("columns", torch.arange(128.0).repeat(4096))  # [4096 rows × 128 columns]
    assert len(looked) == module.SAMPLE
    assert set(looked.tolist()) == set(range(128))


def test_shape_and_place_of_weights_count() -> None:
    base = tiny_model("llama")
    before = weights_digest(base, 2)
    layers = base.get_submodule("model.layers")
    layers[0], layers[1] = layers[1], layers[0]
    assert weights_digest(base, 2) != before


def test_a_longllama_checkpoint_and_its_llama_have_one_fingerprint(tmp_path: Path) -> None:
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = llama_config({"model_type": "longllama", "num_attention_heads": 2, "rope_theta": 500_000} | shape)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert fingerprint(again, (1,), "x") == fingerprint(model, (1,), "x")


# --- RoPE -----------------------------------------------------------------------------------------------------------


def test_rope_parameters_are_canonical() -> None:
    old = LlamaConfig(rope_theta=1_000_000, rope_scaling={"type": "linear", "factor": 4})
    new = LlamaConfig(rope_parameters={"factor": 4.0, "rope_type": "linear", "rope_theta": 1e6, "beta_fast": None})
    assert rope_json(old) == rope_json(new) == '{"factor":4.0,"rope_theta":1000000.0,"rope_type":"linear"}'


@pytest.mark.parametrize("architecture", ARCHITECTURES + FURTHER)
def test_rope_parameters_survive_saving(architecture: str, tmp_path: Path) -> None:
    config = tiny_config(architecture)
    config.save_pretrained(tmp_path)
    assert rope_json(type(config).from_pretrained(tmp_path)) == rope_json(config)


@pytest.mark.parametrize(
    "change",
    [
        lambda parameters: parameters | {"rope_theta": 2e4},
        lambda parameters: parameters | {"rope_type": "linear", "factor": 2.0},
        lambda parameters: parameters | {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
    ],
)
def test_other_rope_parameters_give_another_fingerprint(
    change: Callable[[dict[str, object]], dict[str, object]],
) -> None:
    parameters: dict[str, object] = {"rope_type": "default", "rope_theta": 1e4}
    one, other = (tiny_model("llama", rope_parameters=given) for given in (parameters, change(parameters)))
    assert fingerprint(one, (1,), "x") != fingerprint(other, (1,), "x")


def test_the_trained_length_counts_where_frequencies_depend_on_it() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    for parameters, equal in ((dynamic, False), (plain, True)):
        short, long = (
            LlamaConfig(max_position_embeddings=length, rope_parameters=dict(parameters)) for length in (512, 1024)
        )
        assert (rope_json(short) == rope_json(long)) == equal


def test_layers_with_frequencies_of_their_own_are_told() -> None:
    assert set(json.loads(rope_json(tiny_config("gemma3")))) == {"full_attention", "sliding_attention"}


# --- Refusals -------------------------------------------------------------------------------------------------------


def test_a_layer_the_model_has_not_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="memory layer 4 must be a layer of the model: 0 to 3"):
        fingerprint(tiny_model("llama"), (1, 4), "x")


def test_no_layer_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least one memory layer"):
        fingerprint(tiny_model("llama"), (), "x")


def test_an_architecture_whose_keys_are_not_known_is_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32))
    with pytest.raises(UnsupportedModel, match=r"GPT2LMHeadModel has no model\.embed_tokens"):
        fingerprint(gpt2, (1,), "x")


def test_weights_that_are_not_loaded_are_refused() -> None:
    with torch.device("meta"):
        base = LlamaForCausalLM(tiny_config("llama"))
    with pytest.raises(UnsupportedModel, match=r"embed_tokens\.weight is not loaded"):
        fingerprint(base, (1,), "x")
