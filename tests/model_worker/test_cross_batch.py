"""A training step is the plain model where nothing is read, and windowed inference where a document reads itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memory_service import DType, Memory
from memory_service.errors import InvalidArgument
from model_worker.decoder.fitting import policies_of, spec_of
from model_worker.decoder.model import FotModel
from model_worker.errors import UnsupportedModel
from model_worker.hf.decoder import Decoder
from model_worker.settings import FotConfig, MemoryPosition, SelfExtend
from model_worker.training.cross_batch import CrossBatchStep
from model_worker.training.reads import Reads, released
from tests.model_worker.tiny import ARCHITECTURES, FURTHER, VOCABULARY, tiny_model

EVERY = [*ARCHITECTURES, *FURTHER]
ROWS, WINDOW = 3, 20
NOTHING: Reads = ((),) * ROWS
FOT = FotConfig(mem_layers=(1, 3), window=WINDOW, last_context_length=WINDOW, mem_dtype=DType.F32)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}


@dataclass(frozen=True, eq=False)
class Training:
    """A model in training, our attention in its layers."""

    base: PreTrainedModel
    decoder: Decoder
    fot: FotConfig

    def step(self, reads: Reads, **options: Any) -> CrossBatchStep:
        return CrossBatchStep(reads, policies_of(self.decoder, self.fot), self.fot.mem_layers, **options)

    def logits(self, ids: Tensor, reads: Reads, **options: Any) -> Tensor:
        return self.decoder.logits(ids, self.step(reads, **options), 0)

    def gradients(self, logits: Tensor) -> dict[str, Tensor]:
        self.base.zero_grad()
        logits.float().log_softmax(-1)[..., 7].mean().backward()
        return {name: one.grad.clone() for name, one in self.base.named_parameters() if one.grad is not None}


@contextmanager
def training(architecture: str = "llama", fot: FotConfig = FOT, **overrides: object) -> Iterator[Training]:
    base = tiny_model(architecture, **overrides).train()
    decoder = Decoder(base, WINDOW)
    decoder.attach()
    yield Training(base, decoder, fot)
    decoder.detach()


def tokens(rows: int = ROWS, count: int = WINDOW, seed: int = 1) -> Tensor:
    return torch.randint(4, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", EVERY)
def test_where_nothing_is_read_it_is_the_plain_model(architecture: str) -> None:
    ids = tokens()
    with training(architecture) as mine:
        with mine.decoder.off() as plain:
            want = plain(ids).logits
            wanted = mine.gradients(want)

        have = mine.logits(ids, NOTHING)

        torch.testing.assert_close(have, want, atol=2e-5, rtol=0)
        found = mine.gradients(have)
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("architecture", [one for one in EVERY if one != "gemma2"])  # No memory can cap its scores.
def test_a_document_that_reads_itself_says_what_it_says_in_windows(architecture: str) -> None:
    check_windows(architecture, FOT)


@pytest.mark.parametrize(
    "fot",
    [
        replace(FOT, mem_positionals=False),
        replace(FOT, memory_position=MemoryPosition.NONE),
        replace(FOT, memory_position=MemoryPosition.FIXED, fixed_position=5),
    ],
    ids=["no positions", "none towards memory", "fixed towards memory"],
)
def test_every_position_towards_memory_is_trained_as_it_is_used(fot: FotConfig) -> None:
    check_windows("llama", fot)


def test_a_scaled_rotation_is_trained_as_it_is_used() -> None:
    check_windows("llama", FOT, rope_parameters=YARN)


def check_windows(architecture: str, fot: FotConfig, **overrides: object) -> None:
    windows = 3
    ids = tokens(windows, fot.window)
    with training(architecture, fot, **overrides) as mine, torch.no_grad():
        have = mine.logits(ids, released(windows, windows - 1))
        alone = mine.logits(ids, ((),) * windows)
    base = tiny_model(architecture, **overrides)
    with Memory.open(":memory:", spec=spec_of(base, fot)) as memory, FotModel(base, fot, memory) as model:
        want = model(ids.view(1, -1)).logits.view_as(have)
    torch.testing.assert_close(have, want, atol=1e-4, rtol=0)
    assert (have - alone).abs().max() > 0.05  # Else what is read would not matter.


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi"])
def test_hidden_states_and_the_head_are_the_logits(architecture: str) -> None:
    ids, reads = tokens(), released(ROWS, 2)
    capped = {"final_logit_softcapping": 3.0} if architecture == "gemma2" else {}
    with training(architecture, **capped) as mine:
        hidden = mine.decoder.hidden(ids, mine.step(reads))
        want = mine.logits(ids, reads)
        torch.testing.assert_close(mine.decoder.head(hidden), want)
        torch.testing.assert_close(mine.decoder.head(hidden[1, 3]), want[1, 3])


def test_a_head_that_scales_its_logits_is_refused() -> None:
    with training(logits_scaling=8.0) as mine, pytest.raises(UnsupportedModel, match="logits_scaling"):
        mine.decoder.head(torch.zeros(1, 32))


def test_what_is_read_gets_gradients_of_who_read_it() -> None:
    ids = tokens()
    with training() as mine:
        inputs = mine.base.get_input_embeddings()(ids).detach().requires_grad_()
        hook = mine.base.get_input_embeddings().register_forward_hook(lambda *_: inputs)
        logits = mine.logits(ids, ((), (), (0,)))
        hook.remove()
        (gradient,) = torch.autograd.grad(logits[2].square().sum(), inputs)
    assert gradient[0].abs().max() > 0
    assert not gradient[1].any()


def test_positions_may_jump() -> None:
    ids = tokens()
    positions = torch.arange(WINDOW) + torch.tensor([0, 3, 40])[:, None] * (torch.arange(WINDOW) > 6)  # [B, n]
    causal = torch.full((WINDOW, WINDOW), -torch.inf).triu(1).expand(ROWS, 1, -1, -1)
    with training() as mine:
        have = mine.logits(ids, NOTHING, positions=positions)
        with mine.decoder.off() as plain:
            want = plain(ids, position_ids=positions, attention_mask=causal).logits
    torch.testing.assert_close(have, want, atol=2e-5, rtol=0)
    assert (have[0] - have[2]).abs().max() > 0.05


def test_a_temperature_scales_the_queries_of_memory_layers() -> None:
    ids, reads = tokens(), released(ROWS, 2)
    with training() as mine, torch.no_grad():
        have = mine.logits(ids, reads, temperature=0.5)
        for layer in FOT.mem_layers:
            mine.base.get_submodule(f"model.layers.{layer}.self_attn.q_proj").weight.mul_(0.5)
        want = mine.logits(ids, reads)
    torch.testing.assert_close(have, want, atol=1e-5, rtol=0)


def test_retrieving_as_many_keys_as_there_are_is_reading_all() -> None:
    ids, reads = tokens(), released(ROWS, 2)
    with training() as mine, torch.no_grad():
        every = mine.logits(ids, reads)
        torch.testing.assert_close(mine.logits(ids, reads, retrieved=2 * WINDOW), every, atol=1e-5, rtol=0)
        assert (mine.logits(ids, reads, retrieved=1) - every).abs().max() > 0.05


def test_recomputing_layers_in_the_backward_pass_changes_no_gradient() -> None:
    ids, reads = tokens(), released(ROWS, 2)
    with training() as mine:
        want = mine.gradients(mine.logits(ids, reads))
        mine.base.activation_checkpointing_enable()
        have = mine.gradients(mine.logits(ids, reads))
    for name, gradient in have.items():
        torch.testing.assert_close(gradient, want[name], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_bfloat16_by_autocast_is_close_to_float32(architecture: str) -> None:
    ids, reads = tokens(), released(ROWS, 2)
    with training(architecture) as mine:
        want = mine.logits(ids, reads)
        wanted = mine.gradients(want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            have = mine.logits(ids, reads)
        found = mine.gradients(have)
    torch.testing.assert_close(have.float(), want, atol=0.15, rtol=0)
    for name, gradient in found.items():
        assert gradient.dtype is torch.float32
        assert torch.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0) > 0.98


def test_settings_that_cannot_be_trained_are_refused() -> None:
    with training() as mine:
        policies = policies_of(mine.decoder, FOT)
        extended = policies_of(mine.decoder, replace(FOT, self_extend=SelfExtend(4, 8)))
        with pytest.raises(InvalidArgument, match="layers 0 to 3"):
            CrossBatchStep(NOTHING, policies, (1, 4))
        with pytest.raises(InvalidArgument, match="Self-Extend"):
            CrossBatchStep(NOTHING, extended, FOT.mem_layers)
        with pytest.raises(InvalidArgument, match="temperature"):
            CrossBatchStep(NOTHING, policies, FOT.mem_layers, temperature=0.0)
        with pytest.raises(InvalidArgument, match="reads for each of 3 rows"):
            mine.logits(tokens(), ((),) * 2)
