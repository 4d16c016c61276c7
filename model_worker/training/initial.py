"""The model a training starts from: a checkpoint, or a Llama with weights drawn from the seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memory_service.errors import InvalidArgument
from model_worker.decoder.fitting import config_of, spec_of, try_out
from model_worker.errors import UnsupportedModel
from model_worker.hf import checkpoint
from model_worker.hf.decoder import Decoder
from model_worker.hf.fingerprint import weights_digest
from model_worker.hf.longllama import FIELD, fot_fields_of_config, fot_json
from model_worker.settings import FotConfig
from model_worker.tasks.tokens import Tokenizer, tokens_of
from model_worker.training.config import ModelConfig, TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EMBEDDING_STD = 0.02
_GAIN = 0.7  # A projection's outputs are this much smaller than its inputs.


@dataclass(frozen=True, slots=True)
class Start:
    """A model, what its memory will be, and its words."""

    base: PreTrainedModel
    fot: FotConfig
    tokenizer: Tokenizer | None
    tokenizer_files: Path | None  # Where the tokenizer was read.
    digest: str  # Of the weights before training.
    parameters: int  # Of the model, without what LoRA adds.

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What training changes, by name; tied weights once."""
        return {name: one for name, one in self.base.named_parameters() if one.requires_grad}

    def merged(self) -> dict[str, Tensor]:
        """The weights as they are without LoRA."""
        from model_worker.training.lora import merged

        return merged(self.base)

    def described(self) -> dict[str, Any]:
        """What has to be the same for a training to go on."""
        words = None if self.tokenizer is None else blake2b(self.tokenizer.name.encode(), digest_size=16).hexdigest()
        return {"weights": self.digest, "tokenizer": words, "memory": fot_json(self.fot)}


def start(config: TrainConfig) -> Start:
    """The model that `config` names, float32, on its device. Raises InvalidArgument and UnsupportedModel."""
    files = _tokenizer_files(config.model)
    tokenizer = None if files is None else tokens_of(files)
    device = _device(config.device)
    if config.model.path is not None:
        if not (config.model.path / "config.json").is_file():
            raise InvalidArgument(f"[model] path {config.model.path} is no checkpoint: it has no config.json")
        base, _ = checkpoint.load(config.model.path, dtype=torch.float32)
    else:
        base = from_scratch(config.model, tokenizer, config.seed)
    vocabulary = int(base.config.get_text_config(decoder=True).vocab_size)
    if tokenizer is not None and tokenizer.size > vocabulary:
        raise InvalidArgument(f"the tokenizer has {tokenizer.size} tokens, the model only {vocabulary}: choose another")
    fot = _fot(base, config.fot)
    decoder = Decoder(base, fot.window)
    try_out(decoder)
    if fot.mem_layers:
        spec_of(base, fot)  # Raises for layers the model has not.
        if decoder.softcap is not None:
            raise UnsupportedModel("attention scores are capped in this architecture, which a memory cannot do")
    digest = weights_digest(base, decoder.layers - 1)
    parameters = sum(one.numel() for one in base.parameters())
    if config.lora is not None:
        from model_worker.training.lora import give_lora

        give_lora(base, config.lora, config.seed)
    return Start(base.to(device), fot, tokenizer, files, digest, parameters)


def _fot(base: PreTrainedModel, told: Mapping[str, Any]) -> FotConfig:
    """[fot] of the configuration over what the checkpoint says of its memory."""
    kept = base.config.to_dict().get(FIELD) or {}
    setattr(base.config, FIELD, {**kept, **told})
    try:
        return config_of(base, fot_fields_of_config(base.config))
    except TypeError as error:
        raise InvalidArgument(f"[fot] has a value of the wrong type: {error}") from error


def from_scratch(model: ModelConfig, tokenizer: Tokenizer | None, seed: int) -> PreTrainedModel:
    """A Llama of these dimensions with random weights, the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    told = dict(model.llama)
    if tokenizer is not None:
        told.setdefault("vocab_size", tokenizer.size)
        told.setdefault("eos_token_id", tokenizer.end)
    if "vocab_size" not in told:
        raise InvalidArgument("[model] needs a tokenizer, or vocab_size where tokens have no words")
    known = [*LlamaConfig().to_dict(), "rope_theta"]
    unknown = sorted(set(told) - set(known))
    if unknown:
        raise InvalidArgument(f"[model] has keys {unknown} that LlamaConfig does not know")
    told = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **told}
    config = LlamaConfig(**told)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = LlamaForCausalLM._from_config(config, dtype=torch.float32)
        _draw(base, config.num_hidden_layers)
    return base


@torch.no_grad()
def _draw(base: PreTrainedModel, layers: int) -> None:
    """Projections N(0, 0.7/√inputs), those that end a block over √(2·layers) as in GPT-2, embeddings N(0, 0.02)."""
    for name, module in base.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=_EMBEDDING_STD)
        elif isinstance(module, nn.Linear) and name != "lm_head":
            ends = name.endswith(("o_proj", "down_proj"))
            std = _GAIN * module.in_features**-0.5
            nn.init.normal_(module.weight, std=std * (2 * layers) ** -0.5 if ends else std)
    if not base.config.tie_word_embeddings:
        nn.init.normal_(base.lm_head.weight, std=_EMBEDDING_STD)


def _tokenizer_files(model: ModelConfig) -> Path | None:
    if model.tokenizer is not None:
        return model.tokenizer
    if model.path is not None and (model.path / "tokenizer.json").is_file():
        return model.path
    return None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidArgument(f"device {name!r} cannot be used here: {reason}") from None
    return device
