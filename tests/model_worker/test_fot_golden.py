"""FotModel gives what LongLLaMA's authors' code gave: logits, loss, caches, greedy tokens, wherever the memory is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from memory_service import Memory
from memory_service.bench.harness import served
from model_worker.decoder.model import FotModel, spec_of
from model_worker.decoder.state import State
from model_worker.hf.longllama import fot_fields, llama_config
from model_worker.settings import FotConfig

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
PLACES = ("in process", "grpc")


def found(kind: str) -> list[Any]:
    """The sidecars of this kind; which cases there are, only the directory knows."""
    sidecars = sorted(GOLDEN.glob("fot_*.json"))
    return [pytest.param(one, id=one.stem) for one in sidecars if json.loads(one.read_text())["kind"] == kind]


@dataclass(frozen=True, eq=False)
class Case:
    """One golden case and our model of it."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    model: FotModel

    @property
    def calls(self) -> list[Tensor]:
        """The inputs of successive calls."""
        names = [name for name in self.tensors if name.startswith("input_ids.")]
        return [self.tensors[name] for name in sorted(names, key=lambda name: int(name.split(".")[1]))]

    def close(self, have: Tensor, want: Tensor, tolerance: str = "logits_atol") -> None:
        bounds = self.facts["tolerance"]
        torch.testing.assert_close(have.float(), want.float(), atol=bounds[tolerance], rtol=bounds["rtol"])

    def check_state(self, state: State, prefix: str, pads: Tensor) -> None:
        """Compare window and memory of every row with each tensor the case has under `prefix`; pads [B]."""
        names = [name.split(".") for name in self.tensors if name.startswith(f"{prefix}.")]
        checked = 0
        for _, kind, layer, *part in names:
            if part not in (["keys"], ["values"]):
                continue
            want = self.tensors[".".join([prefix, kind, layer, *part])]  # [B, H, M or s, D]
            for row in range(len(want)):
                have = state.memory(int(layer), row) if kind == "mem" else state.local(int(layer), row)
                seen = self._valid(prefix, kind, layer, row, want.shape[2], int(pads[row]))
                self.close(have[part == ["values"]], want[row, :, seen], "state_atol")
                checked += 1
        assert checked

    def _valid(self, prefix: str, kind: str, layer: str, row: int, slots: int, pads: int) -> Tensor:
        """Which slots [slots] of the authors' cache are tokens: we keep no padding."""
        if kind == "mem":
            return self.tensors[f"{prefix}.mem.{layer}.valid"][row]
        gone = sum(stop - start for start, stop in self.facts["windows"][:-1]) if self.facts["windows"] else 0
        return torch.arange(gone, gone + slots) >= pads

    def check_generated(self, inputs: Tensor, mask: Tensor | None, state: State | None = None) -> None:
        """Continue greedily and compare the tokens and the logits each was taken from."""
        want = self.tensors["generated"]
        out = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs) if mask is None else mask,
            past_key_values=state,
            max_new_tokens=want.shape[1],
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(out.sequences[:, inputs.shape[1] :], want)
        self.close(torch.stack(out.logits, dim=1), self.tensors["step_scores"])

    def check_sizes(self, inputs: Tensor, mask: Tensor | None, state: State) -> None:
        """Feed the authors' tokens one by one: scores, and what window and memory hold after every call."""
        fed, pads = self.tensors["generated"][:, :-1], padding(inputs, mask)
        sizes, scores = [], []
        for tokens in (inputs, *fed.split(1, dim=1)):
            out = self.model(tokens, attention_mask=mask if tokens is inputs else None, past_key_values=state)
            sizes.append([state.local_length, [state.memory_tokens(row) for row in range(len(inputs))]])
            scores.append(out.logits[:, -1])
        told = self.facts["cache_sizes_per_step"]
        assert sizes == [[local, (memory - pads).clamp(min=0).tolist()] for local, memory in told]
        self.close(torch.stack(scores, dim=1), self.tensors["step_scores"])


def padding(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens of left padding in every row, [B]."""
    return torch.zeros(len(inputs), dtype=torch.long) if mask is None else (mask == 0).sum(1)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One `fot serve` for all cases, in a process of its own."""
    with served(tmp_path_factory.mktemp("golden") / "data") as target:
        yield target


@pytest.fixture(params=PLACES)
def load(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Opens a case with its memory in process or over gRPC."""
    with ExitStack() as closing:
        yield partial(_load, closing, ":memory:" if request.param == "in process" else None, request)


def _load(closing: ExitStack, target: str | None, request: pytest.FixtureRequest, sidecar: Path) -> Case:
    facts = json.loads(sidecar.read_text())
    base = LlamaForCausalLM(llama_config(facts["config"])).eval().requires_grad_(False)
    base.load_state_dict(load_file(sidecar.with_name(facts["weights"])), strict=True)
    fot = FotConfig(**fot_fields(facts["config"]))
    memory = None
    if fot.mem_layers:
        place = target or request.getfixturevalue("service")
        memory = closing.enter_context(Memory.open(place, name=sidecar.stem[:60], spec=spec_of(base, fot)))
    model = FotModel(base, fot, memory)
    closing.callback(model.close)
    return Case(facts, load_file(sidecar.with_suffix(".safetensors")), model)


@pytest.mark.parametrize("sidecar", found("forward"))
def test_one_call_is_the_authors(sidecar: Path, load: Any) -> None:
    case = load(sidecar)
    inputs, mask = case.tensors["input_ids"], case.tensors.get("attention_mask")
    real = torch.ones_like(inputs, dtype=torch.bool) if mask is None else mask.bool()
    pads = padding(inputs, mask)
    # Nothing predicts a row's first real token.
    scored = real & (torch.arange(inputs.shape[1]) > pads[:, None])
    labels = inputs.where(scored | (pads == 0)[:, None], -100)

    with case.model.start() as state:
        out = case.model(inputs, attention_mask=mask, past_key_values=state, labels=labels)

        case.close(out.logits[real], case.tensors["logits"][real])
        case.close(out.loss.reshape(1), case.tensors["loss"])
        case.check_state(state, "prefill", pads)


@pytest.mark.parametrize("sidecar", found("forward"))
def test_its_continuation_is_the_authors(sidecar: Path, load: Any) -> None:
    case = load(sidecar)
    if not case.facts["n_gen"]:
        return
    inputs, mask = case.tensors["input_ids"], case.tensors.get("attention_mask")
    case.check_generated(inputs, mask)
    with case.model.start() as state:
        case.check_sizes(inputs, mask, state)


@pytest.mark.parametrize("sidecar", found("session"))
def test_documents_loaded_before_a_question_are_remembered_as_the_authors_do(sidecar: Path, load: Any) -> None:
    case = load(sidecar)
    *documents, question = case.calls
    none = torch.zeros(len(question), dtype=torch.long)

    def loaded(check: bool) -> State:
        state: State = case.model.start()
        for number, document in enumerate(documents):
            out = case.model(document, past_key_values=state, use_cache=False)
            if check:
                case.close(out.logits, case.tensors[f"logits.{number}"])
        return state

    with loaded(check=True) as state:
        case.check_state(state, "docs", none)
        out = case.model(question, past_key_values=state)
        case.close(out.logits, case.tensors[f"logits.{len(documents)}"])
    with loaded(check=False) as state:
        case.check_generated(question, None, state)
    with loaded(check=False) as state:
        case.check_sizes(question, None, state)


@pytest.mark.parametrize("sidecar", found("chunks"))
def test_successive_calls_grow_and_overflow_the_window_as_the_authors_do(sidecar: Path, load: Any) -> None:
    case = load(sidecar)
    sizes = []
    with case.model.start() as state:
        for number, chunk in enumerate(case.calls):
            out = case.model(chunk, past_key_values=state)
            case.close(out.logits, case.tensors[f"logits.{number}"])
            sizes.append([state.local_length, state.memory_tokens(0)])
        assert sizes == case.facts["cache_sizes_per_call"]
        case.check_state(state, "final", torch.zeros(len(case.calls[0]), dtype=torch.long))


@pytest.mark.parametrize("sidecar", found("forward"))
def test_a_folder_with_a_longllama_checkpoint_is_all_it_needs(sidecar: Path, tmp_path: Path) -> None:
    facts = json.loads(sidecar.read_text())
    tensors = load_file(sidecar.with_suffix(".safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(facts["config"]))
    shutil.copy(sidecar.with_name(facts["weights"]), tmp_path / "model.safetensors")
    mask = tensors.get("attention_mask", torch.ones_like(tensors["input_ids"]))

    with FotModel.from_pretrained(tmp_path) as model:
        have = model(tensors["input_ids"], attention_mask=mask).logits
        assert model.fot == FotConfig(**fot_fields(facts["config"]))
        model.detach().save_pretrained(tmp_path / "again")
    with FotModel.from_pretrained(tmp_path / "again") as model:
        assert model.fot == FotConfig(**fot_fields(facts["config"]))
        again = model(tensors["input_ids"], attention_mask=mask).logits

    real, atol = mask.bool(), facts["tolerance"]["logits_atol"]
    torch.testing.assert_close(have[real], tensors["logits"][real], atol=atol, rtol=0)
    assert torch.equal(again, have)
