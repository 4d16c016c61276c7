"""FoT's training step: in memory layers, rows of a batch also read keys of other rows (arXiv 2307.03170, section 3.2).

What is read is read as a memory would be: un-rotated keys, all of them, in one softmax with the row's own. Gradients
flow into them, so a model learns keys that can be told apart among many texts'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memory_service.errors import InvalidArgument
from model_worker.attention.joint import joint
from model_worker.hf.decoder import Call
from model_worker.positions.policy import Policy


class CrossBatchStep:
    """One differentiable pass over a batch of windows, a row each; for `Decoder.logits` or `Decoder.hidden`."""

    def __init__(
        self,
        reads: Sequence[Sequence[int]],
        policies: Sequence[Policy],
        mem_layers: Sequence[int],
        *,
        positions: Tensor | None = None,
        temperature: float = 1.0,
        retrieved: int | None = None,
    ):
        """`reads[b]`: which rows row b reads in memory layers; () for all rows is plain causal training.

        `positions` [n] or [B, n]: where the windows' tokens stand (None: 0 to n - 1). `temperature` multiplies the
        queries of memory layers: below 1 attention is flatter, so the right key must win by more. With `retrieved`
        a query reads only so many keys of other rows, its best. Raises InvalidArgument.
        """
        outside = [layer for layer in mem_layers if not 0 <= layer < len(policies)]
        if outside:
            raise InvalidArgument(f"the model has layers 0 to {len(policies) - 1}, so none of {outside}")
        if any(policy.self_extend is not None for policy in policies):
            raise InvalidArgument("Self-Extend is for inference alone: train without it, and set it when you generate")
        if temperature <= 0:
            raise InvalidArgument(f"temperature must be > 0, got {temperature}")
        self._reads, self._policies, self._mem_layers = reads, policies, frozenset(mem_layers)
        self._positions, self._temperature, self._retrieved = positions, temperature, retrieved

    def attend(self, call: Call) -> Tensor:
        """Attention of one layer, with gradients."""
        policy, query = self._policies[call.layer], call.query
        positions = self._positions
        if positions is None:
            positions = torch.arange(query.shape[2], device=query.device)
        remembers = call.layer in self._mem_layers
        if remembers and self._temperature != 1.0:
            query = query * self._temperature
        angles = policy.angles_if_rotating(positions, query)
        reads = self._reads if remembers else [()] * len(query)
        return joint(
            policy.turned(query, angles),
            policy.turned(call.key, angles),
            call.value,
            call.key,
            reads,
            call.scale,
            far_query=policy.towards_memory(query, positions) if remembers and any(reads) else None,
            softcap=call.softcap,
            sliding=call.sliding,
            retrieved=self._retrieved,
        )
