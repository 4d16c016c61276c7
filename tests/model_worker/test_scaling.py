"""A scaled config: whose copy it is, what it says, and what a model made of it computes."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from memory_service.errors import InvalidArgument
from model_worker.errors import UnsupportedModel
from model_worker.positions.scaling import (
    Scaling,
    angle_tables,
    frequencies,
    ntk_base,
    register_cream_yarn,
    scaled_config,
)
from tests.model_worker.tiny import ARCHITECTURES, tiny_config, tiny_model


@pytest.mark.parametrize("kind", Scaling)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "gemma3"])
def test_every_architecture_scales_and_runs_beyond_its_length(architecture: str, kind: Scaling) -> None:
    config = tiny_config(architecture, max_position_embeddings=64)
    before = config.to_dict()
    scaled = scaled_config(config, kind, 4)
    assert config.to_dict() == before
    assert scaled.max_position_embeddings == 256
    model = AutoModelForCausalLM.from_config(scaled, dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        same = torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert same == (kind is Scaling.NONE)


@pytest.mark.parametrize("kind", Scaling)
def test_a_model_has_the_frequencies_that_frequencies_tells(kind: Scaling) -> None:
    for architecture, dims in {"llama": 8, "qwen3": 16, "phi": 4}.items():
        config = tiny_config(architecture, max_position_embeddings=512)
        theta = config.rope_parameters["rope_theta"]
        model = AutoModelForCausalLM.from_config(scaled_config(config, kind, 8, 256))
        want = frequencies(kind, dims, theta, 8, 256)
        rotary = model.model.rotary_emb
        assert torch.equal(rotary.inv_freq, want.inv_freq)
        assert rotary.attention_scaling == want.magnitude
        assert model.config.max_position_embeddings == 2048


def test_what_the_kinds_do_to_fast_and_slow_channels() -> None:
    plain = frequencies(Scaling.NONE, 128, 1e4, 8, 4096).inv_freq
    ratio = {kind: frequencies(kind, 128, 1e4, 8, 4096).inv_freq / plain for kind in Scaling}
    assert ratio[Scaling.LINEAR].allclose(torch.tensor(1 / 8))
    for kind in (Scaling.NTK, Scaling.YARN, Scaling.CREAM_YARN):
        assert ratio[kind][0] == pytest.approx(1)
        assert ratio[kind][-1] == pytest.approx(1 / 8)
    # The two YaRNs differ in the middle, where the authors' divides by less.
    between = ratio[Scaling.YARN] / ratio[Scaling.CREAM_YARN]
    assert between.max() == pytest.approx(2.5, abs=0.1)
    assert ntk_base(128, 1e4, 8) == pytest.approx(1e4 * 8 ** (128 / 126))
    assert frequencies(Scaling.YARN, 128, 1e4, 8, 4096).magnitude == pytest.approx(0.1 * math.log(8) + 1)


def test_tables_of_float64_angles_tell_what_float32_angles_lose() -> None:
    rule = frequencies(Scaling.CREAM_YARN, 128, 1e4, 64, 4096)
    positions = torch.tensor([4_000, 32_767, 262_143])
    cos, _ = angle_tables(positions, rule)
    single = (positions[:, None].float() * rule.inv_freq).cos() * rule.magnitude
    worst = (cos[:, :64] - single).abs().amax(1).tolist()
    assert worst[0] < 5e-4 and worst[1] < 4e-3 and 1e-4 < worst[2] < 2e-2


def test_only_full_attention_is_scaled_where_layer_types_have_rules_of_their_own() -> None:
    config = tiny_config("gemma3")
    scaled = scaled_config(config, "linear", 4)
    assert scaled.rope_parameters["full_attention"]["factor"] == 4
    assert scaled.rope_parameters["sliding_attention"] == config.rope_parameters["sliding_attention"]


@pytest.mark.parametrize("kind", [Scaling.YARN, Scaling.CREAM_YARN])
def test_the_pretrained_length_given_is_believed_over_one_the_config_had(kind: Scaling) -> None:
    config = tiny_config("llama", original_max_position_embeddings=1024)
    model = AutoModelForCausalLM.from_config(scaled_config(config, kind, 4, 64))
    theta = config.rope_parameters["rope_theta"]
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies(kind, 8, theta, 4, 64).inv_freq)


def test_a_checkpoint_keeps_its_scaling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    plain = tiny_config("llama", max_position_embeddings=64)
    tiny_model("llama", max_position_embeddings=64).save_pretrained(tmp_path / "plain")
    ids = torch.arange(4, 204)[None]
    for kind in Scaling:
        config = scaled_config(plain, kind, 4)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", config=config)
        model.save_pretrained(tmp_path / kind)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert again.config.rope_parameters == model.config.rope_parameters
        with torch.no_grad():
            assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert "validation function" not in caplog.text


def test_cream_yarn_is_registered_when_asked_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ROPE_INIT_FUNCTIONS, "cream_yarn", raising=False)
    scaled_config(tiny_config("llama"), "yarn", 4)
    assert "cream_yarn" not in ROPE_INIT_FUNCTIONS
    register_cream_yarn()
    register_cream_yarn()
    assert "cream_yarn" in ROPE_INIT_FUNCTIONS


def test_what_cannot_be_scaled_is_refused() -> None:
    config = tiny_config("llama")
    with pytest.raises(InvalidArgument, match="no scaling 'cubic'; choose from none, linear, ntk, yarn, cream_yarn"):
        scaled_config(config, "cubic", 4)
    for factor in (0.5, math.nan, math.inf):
        with pytest.raises(InvalidArgument, match="factor"):
            scaled_config(config, "linear", factor)
    with pytest.raises(InvalidArgument, match="original_max_positions"):
        scaled_config(config, "linear", 4, 0)
    with pytest.raises(UnsupportedModel, match="scaled already"):
        scaled_config(scaled_config(config, "linear", 4), "yarn", 4)
    with pytest.raises(UnsupportedModel, match="does not scale phi3 models by linear"):
        scaled_config(tiny_config("phi3"), "linear", 4)
    with pytest.raises(UnsupportedModel, match="no rotary positions"):
        scaled_config(GPT2Config(), "linear", 4)
