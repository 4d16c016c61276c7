"""LoRA by peft: small factors beside a checkpoint's frozen projections; the only file that knows peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from memory_service.errors import InvalidArgument
from model_worker.training.config import LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "default"


def give_lora(base: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Put factors into `base`, drawn from the seed, and freeze everything else. Raises InvalidArgument."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    told = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(told, base, adapter_name=_ADAPTER)
        except ValueError as error:
            names = sorted({name.rpartition(".")[2] for name, part in base.named_modules() if _is_linear(part)})
            raise InvalidArgument(
                f"[lora] targets {list(config.targets)} are not in this model, which has {', '.join(names)}"
            ) from error


@torch.no_grad()
def merged(base: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that say the same without LoRA, by their names in the plain model; those of `base` stay as they are.

    Adding the factors to the weights and taking them away again would not give the same bits back.
    """
    from peft.tuners.lora import LoraLayer

    weights = {
        name.replace(".base_layer.", "."): tensor.detach()
        for name, tensor in base.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            added: Tensor = cast(Any, module).get_delta_weight(_ADAPTER)
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + added
    return weights


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)
