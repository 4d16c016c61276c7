"""Self-Extend gives what its authors' code gave, for every architecture: prefill, decode, greedy tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from model_worker.decoder.model import FotModel
from model_worker.settings import FotConfig, LogitScaling, SelfExtend

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))


def found(tensor: str = "input_ids") -> list[Any]:
    """Every case of every sidecar that has this tensor; `selfextend_unit` has no model and is tested elsewhere."""
    told = [(sidecar, json.loads(sidecar.read_text())) for sidecar in sorted(GOLDEN.glob("selfextend_*.json"))]
    return [
        pytest.param(sidecar, name, id=f"{sidecar.stem.removeprefix('selfextend_')}-{name}")
        for sidecar, facts in told
        if "hf_config" in facts
        for name in facts["cases"]
        if f"case.{name}.{tensor}" in _tensors(sidecar)
    ]


@lru_cache(maxsize=16)
def _tensors(sidecar: Path) -> dict[str, Tensor]:
    return load_file(sidecar.with_suffix(".safetensors"))


@dataclass(frozen=True, eq=False)
class Case:
    """One golden case: the model's configuration, the case's own facts and tensors."""

    told: dict[str, Any]
    facts: dict[str, Any]
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, sidecar: Path, name: str) -> Case:
        told, stored = json.loads(sidecar.read_text()), _tensors(sidecar)
        prefix = f"case.{name}."
        return cls(
            told,
            told["cases"][name],
            {one: tensor.float() for one, tensor in stored.items() if not one.startswith("case.")},
            {one.removeprefix(prefix): tensor for one, tensor in stored.items() if one.startswith(prefix)},
        )

    @property
    def inputs(self) -> Tensor:
        return self.tensors["input_ids"].long()

    @property
    def length(self) -> int:
        """Tokens of the prefill; the others are decoded."""
        return int(self.facts["prefill_length"])

    @property
    def self_extend(self) -> SelfExtend:
        base = self.facts["scale_base"]
        return SelfExtend(
            self.facts["group_size"],
            self.facts["window_size"],
            LogitScaling(self.facts["logit_scaling"]),
            None if base < 0 else base,
        )

    @contextmanager
    def model(self, self_extend: SelfExtend | None) -> Iterator[FotModel]:
        """The case's model with nothing but Self-Extend, its window long enough for everything."""
        tokens = self.inputs.shape[1] + 64
        model = FotModel(
            self._base(), FotConfig(window=tokens, last_context_length=tokens, self_extend=self_extend), memory=None
        )
        yield model
        model.close()

    def _base(self) -> PreTrainedModel:
        config = dict(self.told["hf_config"])
        # Some cases go further than their configuration was trained to, which our guard would refuse.
        config["max_position_embeddings"] = max(
            config["max_position_embeddings"], self.facts["max_relative_position"] + 1
        )
        base: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        missing, unexpected = base.load_state_dict(self.weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        base.tie_weights()
        return base.eval().requires_grad_(False)

    def close(self, have: Tensor, want: str) -> None:
        torch.testing.assert_close(
            have, self.tensors[want], atol=self.told["tolerance"]["atol"], rtol=self.told["tolerance"]["rtol"]
        )


@pytest.mark.parametrize(("sidecar", "name"), found())
def test_prefill_and_decode_are_the_authors(sidecar: Path, name: str) -> None:
    case = Case.load(sidecar, name)
    with case.model(case.self_extend) as model, model.start() as state:
        out = model(case.inputs[:, : case.length], past_key_values=state)
        case.close(out.logits[:, case.tensors["prefill_positions"].long()], "prefill_logits")
        steps = [
            model(one, past_key_values=state).logits[:, 0] for one in case.inputs[:, case.length :].split(1, dim=1)
        ]
        case.close(torch.stack(steps, dim=1), "decode_logits")


@pytest.mark.parametrize(("sidecar", "name"), found())
def test_one_prefill_or_several_are_the_same(sidecar: Path, name: str) -> None:
    case = Case.load(sidecar, name)
    with case.model(case.self_extend) as model, model.start() as state:
        cuts = [case.length // 3, case.length // 2, case.length - case.length // 3 - case.length // 2]
        parts = [model(part, past_key_values=state).logits for part in case.inputs[:, : case.length].split(cuts, dim=1)]
        case.close(torch.cat(parts, dim=1)[:, case.tensors["prefill_positions"].long()], "prefill_logits")


@pytest.mark.parametrize(("sidecar", "name"), found("greedy_tokens"))
def test_greedy_tokens_are_the_authors(sidecar: Path, name: str) -> None:
    case = Case.load(sidecar, name)
    want = case.tensors["greedy_tokens"].long().reshape(len(case.inputs), -1)
    prompt = case.inputs[:, : case.length]
    with case.model(case.self_extend) as model:
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=want.shape[1],
            do_sample=False,
            eos_token_id=None,
        )
    assert torch.equal(out[:, case.length :], want)


@pytest.mark.parametrize(("sidecar", "name"), found("plain_attention_last_logits"))
def test_switched_off_it_is_plain_attention(sidecar: Path, name: str) -> None:
    case = Case.load(sidecar, name)
    with case.model(None) as model:
        case.close(model(case.inputs).logits[:, -4:], "plain_attention_last_logits")
    with case.model(case.self_extend) as model, model.off() as base:
        case.close(base(case.inputs).logits[:, -4:], "plain_attention_last_logits")
