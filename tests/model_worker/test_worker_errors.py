"""What can go wrong is said clearly and at once; no text is ever made from half a memory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CohereConfig,
    GPT2Config,
    GptOssConfig,
    LlamaModel,
    PreTrainedModel,
    Qwen3NextConfig,
    SmolLM3Config,
    StableLmConfig,
)
from transformers.generation.streamers import BaseStreamer

from memory_service import (
    AlreadyExists,
    DeadlineExceeded,
    DType,
    FailedPrecondition,
    FotError,
    InvalidArgument,
    Memory,
    NotFound,
    SessionExpired,
    Unavailable,
    WrongModel,
)
from memory_service.places import flows
from model_worker.decoder.model import FotModel, spec_of
from model_worker.errors import InputTooLong, UnsupportedModel
from model_worker.settings import FotConfig, MemoryPosition, Recall, SelfExtend
from tests.model_worker.texts import text
from tests.model_worker.tiny import save_tiny, tiny_config, tiny_model
from tests.ports import own_port

FOT = FotConfig(mem_layers=(1, 3), window=24, last_context_length=12, mem_dtype=DType.F32)
SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_model("llama").requires_grad_(False)


@contextmanager
def attached(base: PreTrainedModel, target: str | Path = ":memory:", fot: FotConfig = FOT) -> Iterator[FotModel]:
    with Memory.open(target, spec=spec_of(base, fot)) as memory, FotModel(base, fot, memory) as model:
        yield model


def mask(ids: Tensor) -> Tensor:
    return torch.ones_like(ids)


# --- Models ---------------------------------------------------------------------------------------------------------


def gpt2() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32,
                                                       bos_token_id=1, eos_token_id=2))  # fmt: skip


def bert() -> PreTrainedModel:
    return BertModel(BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))


def not_for_generation() -> PreTrainedModel:
    return LlamaModel(tiny_config("llama"))


def interleaved_rotation() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(CohereConfig(**SMALL))


def layers_without_rotation() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(SmolLM3Config(**SMALL, no_rope_layers=[1, 1, 1, 0]))


def attention_sinks() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(GptOssConfig(**SMALL, **EXPERTS))


def recurrent_layers() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        Qwen3NextConfig(
            **SMALL, **EXPERTS, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8, shared_expert_intermediate_size=8,
        )
    )  # fmt: skip


def deaf_attention() -> PreTrainedModel:
    """Its layers do not hand on what they are not made for."""
    return AutoModelForCausalLM.from_config(StableLmConfig(**SMALL))


@pytest.mark.parametrize(
    "make",
    [
        gpt2, bert, not_for_generation, interleaved_rotation, layers_without_rotation, attention_sinks,
        recurrent_layers, deaf_attention,
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # Some architectures warn on their way; that is not what is tested.
def test_an_architecture_that_would_answer_wrongly_is_refused(make: Callable[[], PreTrainedModel]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():  # As initialised, sinks and projections are too small to tell.
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    before = model.config.to_dict()
    with pytest.raises(UnsupportedModel, match=type(model).__name__):
        FotModel(model, FotConfig(window=16, last_context_length=8))
    assert model.config.to_dict() == before


def test_layers_that_cannot_remember_are_refused() -> None:
    for fot, message in (
        (replace(FOT, mem_layers=(1, 4)), r"mem_layers \[4\] are not layers of the model, which has 0 to 3"),
        (replace(FOT, mem_layers=(-1, 2)), r"mem_layers \[-1\]"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            spec_of(tiny_model("llama"), fot)
    with pytest.raises(InvalidArgument, match="layer 1 sees only 16 tokens back, less than the window of 24"):
        attached(tiny_model("mistral", sliding_window=16)).__enter__()
    with pytest.raises(UnsupportedModel, match="capped"):
        attached(tiny_model("gemma2")).__enter__()


def test_layers_need_a_memory(base: PreTrainedModel) -> None:
    with pytest.raises(InvalidArgument, match=r"memory layers need a memory: give memory=':memory:'"):
        FotModel(base, FOT)


def test_lengths_that_make_no_sense_are_refused() -> None:
    for wrong, message in (
        ({"window": 0}, "window and last_context_length must be ≥ 1"),
        ({"last_context_length": 0}, "window and last_context_length must be ≥ 1"),
        ({"mem_layers": (3, 1)}, "distinct and ascending"),
        ({"mem_layers": (1, 1)}, "distinct and ascending"),
        ({"overlap": 24}, "overlap must be 0 to window - 1 = 23"),
        ({"block_tokens": 0}, "block_tokens must be ≥ 1"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            replace(FOT, **wrong)
    with pytest.raises(InvalidArgument, match="min_coverage"):
        Recall(min_coverage=2)
    with pytest.raises(InvalidArgument, match="top_k"):
        Recall(tokens=True)


def test_one_model_belongs_to_one_worker(base: PreTrainedModel) -> None:
    with attached(base) as model:
        with pytest.raises(FailedPrecondition, match="already belongs to another FotModel"):
            FotModel(base, FotConfig())
        model(text(1, 9))  # And the first still works.
        with pytest.raises(FailedPrecondition, match=r"detach\(\) it first"):
            base(text(1, 9))
    base(text(1, 9))
    with pytest.raises(FailedPrecondition, match="detached"):
        model(text(1, 9))


# --- Checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=f"no config.json at '{tmp_path}'"):
        FotModel.from_pretrained(tmp_path, mem_layers=(1,))
    with pytest.raises(UnsupportedModel, match="nowhere"):
        FotModel.from_pretrained(tmp_path / "nowhere", mem_layers=(1,))
    bert().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel):
        FotModel.from_pretrained(tmp_path, mem_layers=(1,))


def test_a_misspelt_field_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with pytest.raises((TypeError, InvalidArgument), match="last_context"):
        FotModel.from_pretrained(tmp_path, mem_layers=(1,), last_context=12)


# --- Memories of others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        tiny_model("llama", seed=1),
        tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        tiny_model("mistral"),
    ],
    ids=["weights", "rotation", "architecture"],
)
def test_a_memory_of_another_model_is_refused(base: PreTrainedModel, other: PreTrainedModel, tmp_path: Path) -> None:
    if other.config.model_type == "mistral":
        other.load_state_dict(tiny_model("mistral", seed=2).state_dict())
    Memory.open(tmp_path, spec=spec_of(base, FOT)).close()
    with Memory.open(tmp_path) as memory:
        with pytest.raises(WrongModel, match="another memory"):
            FotModel(other, FOT, memory)
        other(text(1, 9))  # It was left alone.
        FotModel(base, FOT, memory).close()
    with pytest.raises(WrongModel):
        Memory.open(tmp_path, spec=spec_of(other, FOT))


def test_a_memory_of_other_layers_is_refused(base: PreTrainedModel) -> None:
    with Memory.open(":memory:", spec=spec_of(base, FOT)) as memory:
        for layers in ((1,), (1, 2), (2, 3)):
            with pytest.raises(FotError, match=r"\[1, 3\]"):
                FotModel(base, replace(FOT, mem_layers=layers), memory)
    base(text(1, 9))


def test_a_memory_of_another_dtype_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    fields = {"mem_layers": (1,), "window": 24, "last_context_length": 12}
    FotModel.from_pretrained(tmp_path / "model", memory=tmp_path / "memory", mem_dtype="f32", **fields).close()
    with pytest.raises((AlreadyExists, WrongModel)):
        FotModel.from_pretrained(tmp_path / "model", memory=tmp_path / "memory", mem_dtype="bf16", **fields)


# --- Inputs ---------------------------------------------------------------------------------------------------------


def test_inputs_of_the_wrong_shape_are_refused(base: PreTrainedModel) -> None:
    right_padded = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with_a_hole = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = text(1, 10).view(2, 5)
    with attached(base) as model, model.start() as state:
        for wrong, message in (
            ({"input_ids": ids[0]}, r"input_ids must be whole numbers \[batch, tokens ≥ 1\]"),
            ({"input_ids": ids[:, :0]}, "tokens ≥ 1"),
            ({"input_ids": ids.float()}, "whole numbers"),
            ({"input_ids": ids, "attention_mask": right_padded}, "padding must stand on the left"),
            ({"input_ids": ids, "attention_mask": with_a_hole}, "padding must stand on the left"),
            ({"input_ids": ids, "attention_mask": right_padded[:, :3]}, r"attention_mask must be \[2, ≥ 5\]"),
            ({"input_ids": ids, "attention_mask": right_padded[:1]}, r"attention_mask must be \[2, ≥ 5\]"),
        ):
            with pytest.raises(InvalidArgument, match=message):
                model(**wrong)
        with pytest.raises(InvalidArgument, match="leave logits_to_keep at 0"):
            model(ids, labels=ids, logits_to_keep=1)
        model(ids, past_key_values=state)
        with pytest.raises(InvalidArgument, match="this state has 2 rows, the input 1"):
            model(ids[:1], past_key_values=state)
        with pytest.raises(InvalidArgument, match="use_cache=True"):
            model.generate(ids, attention_mask=mask(ids), use_cache=False, max_new_tokens=2)
        assert model.memory is not None and model.memory.stats().sessions == 0


def test_an_input_error_does_not_break_a_state(base: PreTrainedModel) -> None:
    """What was refused before anything ran leaves the state as it was."""
    with attached(base) as model:
        with model.start() as state:
            model(text(1, 9), past_key_values=state)
            with pytest.raises(InvalidArgument):
                model(text(1, 9).float(), past_key_values=state)
            have = model(text(1, 5, seed=2), past_key_values=state).logits
        with model.start() as state:
            model(text(1, 9), past_key_values=state)
            want = model(text(1, 5, seed=2), past_key_values=state).logits
    assert torch.equal(have, want)


def test_a_closed_state_is_not_used_again(base: PreTrainedModel) -> None:
    with attached(base) as model:
        state = model.start()
        model(text(1, 30), past_key_values=state)
        state.close()
        state.close()
        with pytest.raises(FailedPrecondition, match=r"closed: start another with model.start\(\)"):
            model(text(1, 3), past_key_values=state)


# --- Self-Extend ----------------------------------------------------------------------------------------------------


def test_more_than_self_extend_reaches_is_refused_before_anything_runs() -> None:
    base = tiny_model("llama", max_position_embeddings=64).requires_grad_(False)
    extend = SelfExtend(group=2, window=16)  # Reaches 2 · (64 - 16 + 8) = 112 tokens.
    fot = FotConfig(window=4096, last_context_length=4096, self_extend=extend)
    with FotModel(base, fot) as model:
        model(text(1, 112))
        with pytest.raises(InputTooLong, match=r"reaches 112 tokens; the input has 113"):
            model(text(1, 113))
        with model.start() as state, pytest.raises(InputTooLong, match="larger group"):
            model(text(1, 110), past_key_values=state)
            for token in range(5):
                model(torch.tensor([[token]]), past_key_values=state)
        with pytest.raises(InputTooLong):
            model.generate(text(1, 105), attention_mask=mask(text(1, 105)), max_new_tokens=20, do_sample=False,
                           eos_token_id=None)  # fmt: skip


def test_a_window_that_self_extend_does_not_reach_is_refused_with_a_way_out() -> None:
    base = tiny_model("llama", max_position_embeddings=64)
    fot = replace(FOT, window=200, last_context_length=100, self_extend=SelfExtend(2, 16))
    with Memory.open(":memory:", spec=spec_of(base, FOT)) as memory, pytest.raises(InputTooLong, match="group"):
        FotModel(base, fot, memory)
    for group, window in ((0, 16), (2, 0)):
        with pytest.raises(InvalidArgument, match="group ≥ 1 and window ≥ 1"):
            SelfExtend(group, window)


# --- The service ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_a_service_that_is_not_there_is_said_to_be_unavailable(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1\b"):
        FotModel.from_pretrained(tmp_path, memory="grpc://127.0.0.1:1", mem_layers=(1,))


def test_a_session_that_expired_ends_the_text(base: PreTrainedModel) -> None:
    with attached(base) as model:
        state = model.start()
        model(text(1, 60), past_key_values=state)
        state.rows.rows[0].stretches[0].session.close()  # As its lease running out does.
        with pytest.raises(SessionExpired):
            model(torch.tensor([[5]]), past_key_values=state)
        with pytest.raises(FailedPrecondition, match="failed half way"):
            model(torch.tensor([[5]]), past_key_values=state)
        with pytest.raises(FailedPrecondition, match="failed half way"):
            model.generate(text(1, 3), attention_mask=mask(text(1, 3)), past_key_values=state, max_new_tokens=2)
        state.close()


def test_a_lease_that_ran_out_ends_the_text(base: PreTrainedModel) -> None:
    with (
        Memory.open(":memory:", spec=spec_of(base, FOT)) as memory,
        FotModel(base, FOT, memory, lease_s=2.0) as model,
        model.start() as state,
    ):
        model(text(1, 60), past_key_values=state)
        time.sleep(2.5)
        with pytest.raises(SessionExpired):
            model(torch.tensor([[5]]), past_key_values=state)


def test_an_answer_that_takes_too_long_ends_the_text(base: PreTrainedModel) -> None:
    with attached(base) as model, model.start(Recall(timeout_s=1e-9)) as state:
        with pytest.raises(DeadlineExceeded):
            model(text(1, 60), past_key_values=state)
        with pytest.raises(FailedPrecondition):
            model(text(1, 3), past_key_values=state)


class Service:
    """A `fot serve` of its own that can be killed."""

    def __init__(self, directory: Path, port: int):
        self._log = directory / f"serve-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "memory_service.cli", "serve", str(directory / "data")]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--listen", f"127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def target(self) -> str:
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            if found := re.search(r"127\.0\.0\.1:([1-9]\d*)", self._log.read_text()):
                return f"grpc://127.0.0.1:{found[1]}"
            time.sleep(0.05)
        raise AssertionError(self._log.read_text())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class KillAfter(BaseStreamer):
    """Kills a service once so many tokens were heard."""

    def __init__(self, service: Service, tokens: int):
        self.heard: list[int] = []
        self._service = service
        self._left = tokens

    def put(self, value: Tensor) -> None:
        self.heard += value.flatten().tolist()
        self._left -= 1
        if not self._left:
            self._service.kill()

    def end(self) -> None:
        self.heard.append(-1)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients wait 10 s for a service to come back; here nobody brings it back meanwhile."""
    monkeypatch.setattr(flows, "PATIENCE_S", 1.0)


def test_a_service_that_dies_ends_the_text_with_an_error(
    base: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a generation: what was streamed so far is right, and nothing follows it.

    The service that comes back on the same port knows nothing of the texts that were under way; new ones are well.
    """
    prompt = text(1, 60)
    how: dict[str, Any] = {
        "attention_mask": mask(prompt),
        "max_new_tokens": 30,
        "do_sample": False,
        "eos_token_id": None,
    }
    with attached(base) as model:
        want = model.generate(prompt, **how)[0].tolist()
    with ExitStack() as closing:
        port = own_port()
        service = Service(tmp_path, port)
        closing.callback(service.kill)
        target = service.target()
        memory = closing.enter_context(Memory.open(target, spec=spec_of(base, FOT)))
        model = closing.enter_context(FotModel(base, FOT, memory))
        streamer, state, other = KillAfter(service, 6), model.start(), model.start()
        model(prompt, past_key_values=other)
        crowd = model.start()
        model(prompt.expand(12, -1), past_key_values=crowd)

        with monkeypatch.context() as while_dead:
            while_dead.setattr(flows, "PATIENCE_S", 1.0)
            with pytest.raises(Unavailable, match="cannot be reached"):
                model.generate(prompt, **how, streamer=streamer, past_key_values=state)
            assert streamer.heard == want[: len(streamer.heard)]
            assert 65 <= len(streamer.heard) < 90
            with pytest.raises(FailedPrecondition, match="failed half way"):
                model(torch.tensor([[5]]), past_key_values=state)

            started = time.monotonic()
            crowd.close()
            assert time.monotonic() - started < 8  # Not twelve times as long as one session is waited for.

        again = Service(tmp_path, port)
        closing.callback(again.kill)
        again.target()
        with pytest.raises(SessionExpired):
            model(torch.tensor([[5]]), past_key_values=other)
        assert model.generate(prompt, **how)[0].tolist() == want
        state.close()
        other.close()


def test_a_memory_that_is_gone_is_said_to_be_gone(base: PreTrainedModel) -> None:
    with Memory.open(":memory:", spec=spec_of(base, FOT)) as memory, FotModel(base, FOT, memory) as model:
        model(text(1, 30))
        with pytest.raises(NotFound, match="nothing-like-it"):
            model(text(1, 30), recall=Recall(documents=("nothing-like-it",)))


def test_positions_of_the_memory_are_options_not_errors(base: PreTrainedModel) -> None:
    """Every position rule answers, and each answers something else."""
    answers = []
    for position, place in ((MemoryPosition.FIRST, 0), (MemoryPosition.NONE, 0), (MemoryPosition.FIXED, 9)):
        with attached(base, fot=replace(FOT, memory_position=position, fixed_position=place)) as model:
            answers.append(model(text(1, 60)).logits)
    assert (answers[0] - answers[1]).abs().max() > 0.01
    assert (answers[1] - answers[2]).abs().max() > 0.01
