"""Every architecture gets a memory, keeps its own attention without one, and is given back untouched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from memory_service import DType, Memory
from model_worker.decoder.model import FotModel, spec_of
from model_worker.settings import FotConfig, SelfExtend
from tests.model_worker.oracle import expected
from tests.model_worker.texts import padded, text
from tests.model_worker.tiny import ARCHITECTURES, FURTHER, tiny_model

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ARCHITECTURES + FURTHER},
    "llama without groups": ("llama", {"num_key_value_heads": 4}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3}),
    "phi yarn": ("phi", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}),
    "mistral sliding": ("mistral", {"sliding_window": 16}),
    "qwen2 sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "phi3 sliding": ("phi3", {"sliding_window": 16}),
}
# Where a memory layer can be: not where scores are capped, not where a layer sees less than its window.
REMEMBERING = [name for name in VARIANTS if name != "gemma2" and "sliding" not in name] + ["qwen2 sliding"]
FOT = FotConfig(mem_layers=(1, 3), window=24, last_context_length=12, mem_dtype=DType.F32)


def made(variant: str) -> PreTrainedModel:
    architecture, overrides = VARIANTS[variant]
    return tiny_model(architecture, **overrides).requires_grad_(False)


# For tests that take what they give: a model given back is a model untouched, as the first tests here show.
shared = lru_cache(maxsize=None)(made)


def layers_for(variant: str) -> FotConfig:
    """Memory layers that see their whole window."""
    return replace(FOT, mem_layers={"gemma3": (1, 3), "qwen2 sliding": (0, 1)}.get(variant, FOT.mem_layers))


@contextmanager
def attached(base: PreTrainedModel, fot: FotConfig) -> Iterator[FotModel]:
    """The model with an empty memory in process."""
    if not fot.mem_layers:
        with FotModel(base, fot) as model:
            yield model
        return
    with Memory.open(":memory:", spec=spec_of(base, fot)) as memory, FotModel(base, fot, memory) as model:
        yield model


# --- Without a memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_switched_off_or_given_back_a_model_is_what_it_was(variant: str) -> None:
    base, pristine = made(variant), made(variant)
    before = trace(base)
    batch = padded([text(40), text(25, seed=2)])
    logits = pristine(**batch).logits
    greedy = pristine.generate(**batch, max_new_tokens=5, do_sample=False)

    def check_untouched() -> None:
        assert torch.equal(base(**batch).logits, logits)
        assert torch.equal(base.generate(**batch, max_new_tokens=5, do_sample=False), greedy)

    fot = layers_for(variant) if variant in REMEMBERING else replace(FOT, mem_layers=())
    with attached(base, fot) as model:
        attached_logits = model(text(1, 30)).logits
        with model.off() as off:
            assert off is base
            check_untouched()
        assert torch.equal(model(text(1, 30)).logits, attached_logits)
        assert model.detach() is base
        assert model.detach() is base
    assert trace(base) == before == trace(pristine)
    state = pristine.state_dict()
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    check_untouched()


def trace(base: PreTrainedModel) -> dict[str, Any]:
    """All that a memory could have changed: modules, their attributes and hooks, the configuration."""
    modules = dict(base.named_modules())
    return {
        "modules": {name: type(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {
            name: [len(found) for key, found in vars(module).items() if "hooks" in key and found is not None]
            for name, module in modules.items()
        },
        "config": base.config.to_dict(),
        "attention": base.config._attn_implementation,
        "generation": base.generation_config.to_dict() if base.generation_config else None,
        "training": {name: module.training for name, module in modules.items()},
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_text_that_fits_the_window_is_the_models_own(variant: str) -> None:
    base, ids = shared(variant), text(2, 45)
    want = base(ids).logits
    with attached(base, FotConfig(window=64, last_context_length=64)) as model, model.start() as state:
        torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=0)
        parts = [model(part, past_key_values=state).logits for part in ids.split([20, 1, 1, 23], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_batch_that_fits_is_the_models_own(variant: str) -> None:
    base, rows = shared(variant), [text(45), text(20, seed=2), text(1, seed=3)]
    greedily: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    alone = [(base(row[None]).logits[0], base.generate(row[None], **greedily)[0, len(row) :]) for row in rows]
    with attached(base, FotConfig(window=64, last_context_length=64)) as model:
        out = model(**padded(rows)).logits
        continued = model.generate(**padded(rows), **greedily)[:, 45:]
    for number, (row, (logits, greedy)) in enumerate(zip(rows, alone, strict=True)):
        torch.testing.assert_close(out[number, -len(row) :], logits, atol=1e-5, rtol=0)
        assert torch.equal(continued[number], greedy)


# --- With a memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", REMEMBERING)
def test_a_long_text_attends_to_its_own_earlier_windows(variant: str) -> None:
    base, fot, ids = shared(variant), layers_for(variant), text(90)
    want, remembered = expected(base, ids, fot)
    with attached(base, fot) as model, model.start() as state:
        have = model(ids[None], past_key_values=state).logits[0]
        torch.testing.assert_close(have, want, atol=1e-4, rtol=0)
        for layer in fot.mem_layers:
            keys, values = state.memory(layer)
            torch.testing.assert_close(keys, remembered[layer][0], atol=1e-5, rtol=0)
            torch.testing.assert_close(values, remembered[layer][1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", REMEMBERING)
def test_one_memory_layer_is_enough(variant: str) -> None:
    base, ids = shared(variant), text(70)
    fot = replace(layers_for(variant), mem_layers=layers_for(variant).mem_layers[:1])
    with attached(base, fot) as model:
        have = model(ids[None]).logits[0]
        last = model(ids[None], logits_to_keep=1).logits[0]
    want, _ = expected(base, ids, fot)
    torch.testing.assert_close(have, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(last, want[-1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", REMEMBERING)
def test_a_row_of_a_batch_is_the_row_alone(variant: str) -> None:
    base, fot = shared(variant), layers_for(variant)
    rows = [text(61), text(90, seed=2), text(9, seed=3)]
    with attached(base, fot) as model:
        out = model(**padded(rows)).logits
    for number, row in enumerate(rows):
        want, _ = expected(base, row, fot)
        torch.testing.assert_close(out[number, -len(row) :], want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", REMEMBERING)
def test_memory_layers_that_do_not_rotate_agree_in_any_cut(variant: str) -> None:
    base, ids = shared(variant), text(2, 50)
    rotated = base(ids).logits
    fot = replace(layers_for(variant), mem_positionals=False, window=64, last_context_length=64)
    with attached(base, fot) as model, model.start() as state:
        whole = model(ids).logits
        parts = [model(part, past_key_values=state).logits for part in ids.split([20, 1, 29], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)
    assert (whole - rotated).abs().max() > 0.01


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "gemma3", "phi3"])
def test_self_extend_and_a_memory_work_together(variant: str) -> None:
    """Far keys share positions, memory keys stand at the window's first token, in one call or token by token."""
    base = shared(variant)
    fot = replace(layers_for(variant), window=40, last_context_length=40, self_extend=SelfExtend(4, 8))
    document, question = text(1, 30), text(1, 36, seed=2)
    with attached(base, fot) as model:
        answers = []
        for cuts in ([36], [20, 1, 15]):
            with model.start() as state:
                model(document, past_key_values=state, use_cache=False)
                parts = [model(part, past_key_values=state).logits for part in question.split(cuts, dim=1)]
                answers.append(torch.cat(parts, dim=1))
        alone = model(question).logits
    torch.testing.assert_close(*answers, atol=1e-4, rtol=0)
    assert (answers[0] - alone).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_stays_in_it(dtype: torch.dtype) -> None:
    base = made("qwen3")
    want, _ = expected(base, text(60), FOT)
    fot = replace(FOT, mem_dtype=DType.BF16 if dtype == torch.bfloat16 else DType.F16)
    with attached(base.to(dtype), fot) as model, model.start() as state:
        have = model(text(60)[None], past_key_values=state).logits[0]
        assert have.dtype == state.local(1)[0].dtype == state.memory(1)[0].dtype == dtype
        assert (have.float() - want).norm() / want.norm() < 0.03
