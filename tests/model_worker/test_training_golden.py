"""Training gives what LongLLaMA's authors' code and the paper's listing gave: attention, batches, loss, gradients."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from memory_service import DType, Fingerprint, Memory, MemorySpec, Partial, merge
from model_worker.attention import local
from model_worker.attention.joint import joint, shares
from model_worker.decoder.fitting import policies_of, spec_of
from model_worker.decoder.model import FotModel
from model_worker.hf.decoder import Decoder
from model_worker.hf.longllama import MODEL_TYPE, fot_fields, llama_config
from model_worker.positions.rope import Rope, rotate
from model_worker.settings import FotConfig
from model_worker.training import reads
from model_worker.training.cross_batch import CrossBatchStep
from model_worker.training.packing import Document, packed, packing_of

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))


def found(kind: str) -> list[Any]:
    """The sidecars of this kind; which cases there are, only the directory knows."""
    sidecars = sorted(GOLDEN.glob("fot_*.json"))
    return [
        pytest.param(Case.read(one), id=one.stem) for one in sidecars if json.loads(one.read_text())["kind"] == kind
    ]


@dataclass(frozen=True, eq=False)
class Case:
    """One golden case."""

    path: Path
    facts: dict[str, Any]

    @classmethod
    def read(cls, sidecar: Path) -> Case:
        return cls(sidecar, json.loads(sidecar.read_text()))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))

    def close(self, have: Tensor, want: Tensor, tolerance: str) -> None:
        torch.testing.assert_close(have.float(), want.float(), atol=self.facts["tolerance"][tolerance], rtol=0)

    def model(self) -> tuple[LlamaForCausalLM, FotConfig]:
        """The model with the weights the case names, and its memory layers; its type may be llama with mem_layers."""
        config = {**self.facts["config"], "model_type": MODEL_TYPE}
        base = LlamaForCausalLM(llama_config(config))
        base.load_state_dict(load_file(self.path.with_name(self.facts["weights"])), strict=True)
        return base, FotConfig(**fot_fields(config))

    def scale(self, head_dim: int) -> float:
        """What the scores are multiplied by: said in numbers, or by a formula that is always the same."""
        said = self.facts.get("softmax_scale_value", self.facts["softmax_scale"])
        return head_dim**-0.5 if str(said).startswith("1/sqrt") else float(said)

    def documents(self) -> list[Document]:
        return [Document(one["tokens"], one["loss_mask"], one["source"]) for one in self.facts["documents"]]


def wanted(*tensors: Tensor) -> list[Tensor]:
    """These, to be differentiated by."""
    return [one.clone().requires_grad_() for one in tensors]


# --- LongLLaMA's cross-batch attention ---


def halves(x: Tensor) -> Tensor:
    """Channels 2i and 2i + 1, which one rotation turns, where Llama has them: at i and D/2 + i."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("case", found("cross_batch_attention"))
def test_rows_read_the_rows_the_authors_let_them_read(case: Case) -> None:
    facts = case.facts
    have = reads.released(
        facts["batch"], facts["cross_batch_range"], facts["dataset_packing"], facts["cross_batch_stepping"]
    )

    assert [[row, *others] for row, others in enumerate(have)] == facts["attended_entries_per_batch_entry"]
    assert [len(others) for others in have] == facts["additional_contexts_per_entry"]


@pytest.mark.parametrize("case", found("cross_batch_attention"))
def test_attention_across_rows_and_its_gradients_are_the_authors(case: Case) -> None:
    facts, tensors = case.facts, case.tensors
    q, k, v = wanted(tensors["q"], tensors["k"], tensors["v"])  # [B, S, H, D]
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    if "interleaved" in facts["pos_encoding"]:
        query, key = halves(query), halves(key)
        assert torch.equal(query.transpose(1, 2), tensors.get("q_half_layout", query.transpose(1, 2)))
        assert torch.equal(key.transpose(1, 2), tensors.get("k_half_layout", key.transpose(1, 2)))
    turned_query, turned_key = query, key
    if not facts["pos_encoding"].startswith("none"):
        theta = float(re.search(r"theta=([\d.e+]+\d)", facts["pos_encoding"])[1])  # type: ignore[index]
        rope = Rope(theta ** -(torch.arange(0, facts["head_dim"], 2) / facts["head_dim"]))
        angles = rope.angles(torch.arange(facts["seq"]), torch.float32)
        turned_query, turned_key = rotate(query, angles), rotate(key, angles)

    output = joint(
        turned_query,
        turned_key,
        value,
        key,
        reads.released(
            facts["batch"], facts["cross_batch_range"], facts["dataset_packing"], facts["cross_batch_stepping"]
        ),
        case.scale(facts["head_dim"]),
    ).transpose(1, 2)
    output.backward(tensors["cotangent"])

    case.close(output, tensors["output"], "output_atol")
    for name, leaf in (("dq", q), ("dk", k), ("dv", v)):
        case.close(leaf.grad, tensors[name], "grad_atol")


# --- Batches, and a whole step ---


@pytest.mark.parametrize("case", found("data_pipeline"))
def test_documents_are_packed_as_the_authors_pack_them(case: Case) -> None:
    facts, tensors = case.facts, case.tensors
    rows, length, count = facts["batch_size"], facts["seq_len"], facts["n_batches"]
    for name, run in facts["runs"].items():
        batches = packed(
            cycle(case.documents()),
            rows,
            length,
            packing=packing_of(run["pipeline"], rows),
            min_example_length=run["min_example_length"],
            pad=run["pad"],
        )
        for number, batch in enumerate(islice(batches, count)):
            assert torch.equal(batch.ids.int(), tensors[f"{name}.input_tokens"][number])
            assert torch.equal(batch.targets.int(), tensors[f"{name}.target_tokens"][number])
            assert torch.equal(batch.weights, tensors[f"{name}.loss_masks"][number])
            told = {
                "dataset_example_index": batch.documents,
                "dataset_total_tokens": batch.tokens,
                **{f"batch_tokens_per_source/{source}": tokens for source, tokens in batch.sources.items()},
            }
            metrics = run["metrics_per_batch"][number]
            assert {metric: told[metric] for metric in metrics} == metrics


@pytest.mark.parametrize("case", found("cross_batch_training_step"))
def test_documents_become_the_authors_loss_and_gradients(case: Case) -> None:
    facts, tensors = case.facts, case.tensors
    base, fot = case.model()
    decoder = Decoder(base, facts["seq_len"])
    decoder.attach()
    rows, packing = facts["batch_size"], facts["dataset_packing"]
    assert packing == packing_of(facts["data_pipeline"], rows)
    batches = packed(cycle(case.documents()), rows, facts["seq_len"], packing=packing)
    batch = next(islice(batches, facts["batch_index_of_pipeline"], None))
    others = reads.released(rows, facts["cross_batch_range"], packing, facts["cross_batch_stepping"])

    logits = decoder.logits(batch.ids, CrossBatchStep(others, policies_of(decoder, fot), fot.mem_layers), 0)
    nll = torch.nn.functional.cross_entropy(logits.mT, batch.targets, reduction="none")  # [B, S]
    # Rows count the same, however many of their targets are scored.
    loss = ((nll * batch.weights).sum(1) / batch.weights.sum(1).clamp(min=1e-10)).mean()
    loss.backward()

    assert [len(one) for one in others] == facts["additional_contexts_per_entry"]
    for name, have in (("input_tokens", batch.ids), ("target_tokens", batch.targets), ("loss_masks", batch.weights)):
        assert torch.equal(have.to(tensors[name]), tensors[name])
    case.close(logits, tensors["logits"], "logits_atol")
    case.close(loss.reshape(1), tensors["loss"], "loss_atol")
    gradients = {name: weight.grad for name, weight in base.named_parameters()}
    assert {f"grad.{name}" for name in gradients} == {name for name in tensors if name.startswith("grad.")}
    for name, gradient in gradients.items():
        case.close(gradient, tensors[f"grad.{name}"], "grad_atol")


@pytest.mark.parametrize("case", found("train_inference_equivalence"))
def test_a_document_says_the_same_in_training_and_in_windows(case: Case) -> None:
    base, fot = case.model()
    base.requires_grad_(False)
    ids = case.tensors["input_ids"]
    windows = ids.shape[1] // fot.window
    decoder = Decoder(base, fot.window)
    decoder.attach()
    step = CrossBatchStep(reads.released(windows, windows - 1, windows), policies_of(decoder, fot), fot.mem_layers)

    training = torch.stack([decoder.logits(one.view(windows, -1), step, 0).flatten(0, 1) for one in ids])
    decoder.detach()
    with Memory.open(":memory:", spec=spec_of(base, fot)) as memory, FotModel(base, fot, memory) as model:
        inference = model(ids).logits

    case.close(training, case.tensors["logits_training"], "logits_atol")
    case.close(inference, case.tensors["logits_inference"], "logits_atol")
    case.close(training, inference, "logits_atol")


# --- The paper's small models ---


@pytest.mark.parametrize("case", found("crossbatch_prev_contexts_one_head"))
def test_current_contexts_read_previous_ones_as_in_the_paper(case: Case) -> None:
    facts, tensors = case.facts, case.tensors
    documents, scale = facts["B"], case.scale(facts["head_dim"])
    others = reads.previous(documents, facts["d"])
    leaves = dict(zip(("q", "k", "v", "k_prev", "v_prev"), wanted(*(tensors[x] for x in NAMES)), strict=True))
    query = torch.cat([torch.zeros_like(leaves["q"]), leaves["q"]])[:, None]  # Nothing is asked of previous contexts.
    key = torch.cat([leaves["k_prev"], leaves["k"]])[:, None]
    value = torch.cat([leaves["v_prev"], leaves["v"]])[:, None]

    output = joint(query, key, value, key, others, scale)[documents:, 0]
    output.backward(tensors["cotangent"])
    mass = torch.cat(shares(query, key, key, others, scale)[documents:])  # [B, n, d]

    assert [list(one) for one in others[documents:]] == tensors["selector"].tolist()
    case.close(output, tensors["output"], "output_atol")
    for name, leaf in leaves.items():
        case.close(leaf.grad, tensors[f"d{name}"], "grad_atol")
    case.close(mass, tensors["attention_mass_per_previous_context"], "output_atol")
    case.close(mass[..., 0] / mass.sum(-1), tensors["positive_mass_ratio"], "output_atol")


NAMES = ("q", "k", "v", "k_prev", "v_prev")


@pytest.mark.parametrize("case", found("knn_memory_attention_one_head"))
def test_a_query_reads_its_best_keys_in_training_as_in_the_paper(case: Case) -> None:
    tensors, k = case.tensors, case.facts["k"]
    query, key, value, memory_key, memory_value = (
        tensors[name][:, None] for name in ("q", "local_k", "local_v", "mem_k", "mem_v")
    )
    own = [(row,) for row in range(len(query))]

    def output(others: Any, retrieved: int | None) -> Tensor:
        scale = case.scale(query.shape[3])
        told = joint(query, key, value, memory_key, others, scale, memory_value=memory_value, retrieved=retrieved)
        return told[:, 0]

    case.close(output(own, k), tensors["output"], "output_atol")
    case.close(output(own, None), tensors["output_full_attention"], "output_atol")
    case.close(output([()] * len(query), k), tensors["output_local_only"], "output_atol")


@pytest.mark.parametrize("case", found("knn_memory_attention_one_head"))
def test_a_query_reads_its_best_keys_in_the_memory_as_in_the_paper(case: Case) -> None:
    tensors, k, dim = case.tensors, case.facts["k"], case.facts["d"]
    spec = MemorySpec(Fingerprint(case.path.stem), layers=(0,), kv_heads=1, head_dim=dim, dtype=DType.F32)
    with Memory.open(":memory:", spec=spec) as memory:
        for row in range(case.facts["B"]):
            query, key, value, memory_key, memory_value = (
                tensors[name][row] for name in ("q", "local_k", "local_v", "mem_k", "mem_v")
            )
            memory.put(f"row-{row}", memory_key[None, None], memory_value[None, None])

            far = memory.attend(0, query[None], scope=f"row-{row}", top_k=k, scale=case.scale(dim), tokens=True)
            near = local.causal(*(x[None, None] for x in (query, key, value)), case.scale(dim))
            whole = merge([Partial(near.output[0], near.lse[0]), far.partial])

            case.close(whole.output[0], tensors["output"][row], "output_atol")
            assert far.tokens is not None
            assert torch.equal(far.tokens.offset[0], tensors["topk_indices"][row])
            case.close(far.tokens.score[0] / case.scale(dim), tensors["topk_scores"][row], "scores_atol")
