"""Which optimizer takes which parameter, and how the learning rate runs over the steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from model_worker.training.config import Kind, OptimizerConfig
from model_worker.training.muon import Muon

_IN_A_LAYER = re.compile(r"(^|\.)layers\.\d+\.")


class Optimizers:
    """Muon for the matrices inside layers, AdamW for embeddings, norms, biases and LoRA's factors; or AdamW for all."""

    def __init__(self, model: nn.Module, config: OptimizerConfig):
        self._names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        matrices = [p for p, name in self._names.items() if config.kind is Kind.MUON and _is_inner_matrix(name, p)]
        chosen = set(matrices)
        others = [p for p in self._names if p not in chosen]
        self._all: list[tuple[torch.optim.Optimizer, float]] = []
        if matrices:
            muon = Muon(matrices, config.muon_lr, config.muon_weight_decay, config.muon_momentum)
            self._all.append((muon, config.muon_lr))
        if others:
            adamw = torch.optim.AdamW(
                others, lr=config.adamw_lr, betas=config.betas, weight_decay=config.adamw_weight_decay, fused=True
            )
            self._all.append((adamw, config.adamw_lr))
        self._clip = config.clip

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self._names)

    def step(self, factor: float) -> Tensor:
        """Clip the gradients, take a step at `factor` of the learning rates, drop the gradients; their norm before."""
        norm = nn.utils.clip_grad_norm_(self._names, self._clip)
        for optimizer, lr in self._all:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    # --- between processes ---

    def tensors(self) -> dict[str, Tensor]:
        """All that the optimizers remember, as "<parameter>.<what>"."""
        return {f"{name}.{what}": value for name, what, value in self._entries()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors()` gave."""
        known = {name: parameter for parameter, name in self._names.items()}
        owners = {p: one for one, _ in self._all for group in one.param_groups for p in group["params"]}
        for key, value in tensors.items():
            name, _, what = key.rpartition(".")
            parameter = known[name]
            owners[parameter].state[parameter][what] = value.to(parameter.device)

    def _entries(self) -> Iterator[tuple[str, str, Any]]:
        for optimizer, _ in self._all:
            for parameter, state in optimizer.state.items():
                for what, value in state.items():
                    yield self._names[cast(nn.Parameter, parameter)], what, value


def _is_inner_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and "lora_" not in name and _IN_A_LAYER.search(name) is not None


def schedule(step: int, steps: int, config: OptimizerConfig) -> float:
    """The factor of step 0 … steps - 1: linear warm-up, 1, then linear to `decay_to` over the last `decay_fraction`."""
    rising = min(1.0, (step + 1) / max(1, config.warmup))
    decaying = config.decay_fraction * steps
    if not decaying:
        return rising
    left = min(1.0, (steps - 1 - step) / decaying)
    return rising * (config.decay_to + (1 - config.decay_to) * left)
