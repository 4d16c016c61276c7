"""The plain reference gives what LongLLaMA's authors' code gave: logits, caches and greedy tokens of every case."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from memory_service.errors import InvalidArgument
from memory_service.types.specs import DType
from model_worker.bench.reference import Cache, Reference
from model_worker.settings import Cut, FotConfig, Overflow, SelfExtend

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
DTYPES = {"float32": DType.F32, "bfloat16": DType.BF16, "float16": DType.F16}


@dataclass(frozen=True, eq=False)
class Case:
    """One golden case: its sidecar, its tensors and the model it was made with."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    reference: Reference

    @property
    def calls(self) -> list[Tensor]:
        """The inputs of successive calls."""
        names = [name for name in self.tensors if name.startswith("input_ids.")]
        return [self.tensors[name] for name in sorted(names, key=lambda name: int(name.split(".")[1]))]

    def check_logits(self, have: Tensor, name: str, mask: Tensor | None = None) -> None:
        want = self.tensors[name]
        if mask is not None:
            have, want = have[mask.bool()], want[mask.bool()]
        self._close(have, want, "logits_atol")

    def check_state(self, cache: Cache, prefix: str) -> None:
        """Compare every cache tensor the golden file has under `prefix`."""
        told = [name.split(".") for name in self.tensors if name.startswith(f"{prefix}.")]
        for _, kind, layer, *part in told:
            want = self.tensors[".".join([prefix, kind, layer, *part])]
            if layer == "positions":
                assert torch.equal(cache.positions, want)
            elif part == ["valid"]:
                assert torch.equal(cache.memory_valid, want)
            else:
                one = cache.layers[int(layer)]
                near, far = {"keys": (one.keys, one.memory_keys), "values": (one.values, one.memory_values)}[part[0]]
                self._close(near if kind == "local" else far, want, "state_atol")
        assert told

    def check_generation(self, cache: Cache | None, input_ids: Tensor, mask: Tensor | None = None) -> None:
        """Continue greedily and compare tokens, the logits they came from, and the cache's sizes at every step."""
        want: Tensor = self.tensors["generated"]
        tokens, scores = self.reference.generate(input_ids, want.shape[1], mask, cache)
        assert torch.equal(tokens, want)
        self.check_logits(scores, "step_scores")
        sizes = []
        for step in [input_ids, *want[:, :-1].split(1, dim=1)]:
            _, cache = self.reference.forward(step, mask if step is input_ids else None, cache)
            sizes.append([cache.local_length, cache.memory_tokens])
        assert sizes == self.facts["cache_sizes_per_step"]

    def _close(self, have: Tensor, want: Tensor, tolerance: str) -> None:
        bounds = self.facts["tolerance"]
        torch.testing.assert_close(have, want.to(have.dtype), atol=bounds[tolerance], rtol=bounds["rtol"])


def found(kind: str) -> list[Any]:
    """The names of the cases of this kind in the golden directory."""
    sidecars = sorted(GOLDEN.glob("fot_*.json"))
    return [pytest.param(one, id=one.stem) for one in sidecars if json.loads(one.read_text())["kind"] == kind]


def load(sidecar: Path) -> Case:
    transformers = pytest.importorskip("transformers")
    facts = json.loads(sidecar.read_text())
    told = facts["config"]
    config = transformers.LlamaConfig(
        vocab_size=told["vocab_size"],
        hidden_size=told["hidden_size"],
        intermediate_size=told["intermediate_size"],
        num_hidden_layers=told["num_hidden_layers"],
        num_attention_heads=told["num_attention_heads"],
        num_key_value_heads=told["num_attention_heads"],
        rms_norm_eps=told["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": told["rope_theta"]},
        tie_word_embeddings=told["tie_word_embeddings"],
        max_position_embeddings=told["max_position_embeddings"],
    )
    base = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    base.load_state_dict(load_file(sidecar.with_name(facts["weights"])), strict=True)
    fot = FotConfig(
        mem_layers=tuple(told["mem_layers"]),
        window=told["max_position_embeddings"],
        last_context_length=told["last_context_length"],
        mem_positionals=told["mem_positionals"],
        mem_dtype=DTYPES[told["mem_dtype"]],
        overflow=Overflow.FLUSH,
        cut=Cut.BATCH,
    )
    return Case(facts, load_file(sidecar.with_suffix(".safetensors")), Reference(base, fot))


@pytest.mark.parametrize("sidecar", found("forward"))
def test_one_call_and_its_continuation_are_the_authors(sidecar: Path) -> None:
    case = load(sidecar)
    input_ids, mask = case.tensors["input_ids"], case.tensors.get("attention_mask")
    logits, cache = case.reference.forward(input_ids, mask)
    case.check_logits(logits, "logits", mask)
    case.check_state(cache, "prefill")
    if case.facts["n_gen"]:
        case.check_generation(None, input_ids, mask)


@pytest.mark.parametrize("sidecar", found("session"))
def test_documents_loaded_first_are_remembered_as_the_authors_do(sidecar: Path) -> None:
    case = load(sidecar)
    *documents, question = case.calls
    cache = None
    for number, document in enumerate(documents):
        logits, cache = case.reference.forward(document, cache=cache, use_cache=False)
        case.check_logits(logits, f"logits.{number}")
    assert cache is not None
    case.check_state(cache, "docs")
    logits, _ = case.reference.forward(question, cache=cache)
    case.check_logits(logits, f"logits.{len(documents)}")
    case.check_generation(cache, question)


@pytest.mark.parametrize("sidecar", found("chunks"))
def test_successive_calls_grow_and_overflow_the_window_as_the_authors_do(sidecar: Path) -> None:
    case = load(sidecar)
    cache = None
    sizes = []
    for number, chunk in enumerate(case.calls):
        logits, cache = case.reference.forward(chunk, cache=cache)
        case.check_logits(logits, f"logits.{number}")
        sizes.append([cache.local_length, cache.memory_tokens])
    assert cache is not None
    assert sizes == case.facts["cache_sizes_per_call"]
    case.check_state(cache, "final")


def tiny(**changes: Any) -> Any:
    """A random Llama of 2 layers with grouped query heads."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes))).eval().requires_grad_(False)


def test_a_text_within_one_window_is_the_models_own() -> None:
    base = tiny()
    input_ids = torch.randint(32, (2, 11), generator=torch.Generator().manual_seed(1))
    logits, _ = Reference(base, FotConfig((1,), window=16, last_context_length=16)).forward(input_ids)
    torch.testing.assert_close(logits, base(input_ids).logits, atol=1e-5, rtol=0)


def test_a_sliding_window_keeps_its_newest_tokens() -> None:
    config = FotConfig((1,), window=8, last_context_length=6)
    reference = Reference(tiny(), config)
    _, cache = reference.forward(torch.arange(8)[None])
    assert (cache.local_length, cache.memory_tokens) == (6, 2)
    _, cache = reference.forward(torch.arange(4)[None], cache=cache)
    assert (cache.local_length, cache.memory_tokens) == (6, 6)
    assert cache.positions.tolist() == [[6, 7, 8, 9, 10, 11]]


def test_what_the_authors_do_not_have_is_refused() -> None:
    base = tiny()
    with pytest.raises(InvalidArgument, match="Self-Extend"):
        Reference(base, FotConfig((1,), self_extend=SelfExtend(4, 8)))
    with pytest.raises(InvalidArgument, match="2 layers"):
        Reference(base, FotConfig((2,)))
    reference = Reference(base, FotConfig((1,), window=8, last_context_length=6))
    with pytest.raises(InvalidArgument, match="padded"):
        reference.forward(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [1, 1, 1]]))
    _, cache = reference.forward(torch.arange(4)[None])
    with pytest.raises(InvalidArgument, match="use_cache"):
        reference.forward(torch.arange(4)[None], cache=cache, use_cache=False)
