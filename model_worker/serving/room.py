"""How much of the window's RAM requests may need."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from model_worker.decoder.model import FotModel
from model_worker.serving.job import Job


class Room:
    """Bytes of window, by a model's size and its longest window."""

    def __init__(self, model: FotModel):
        decoder, fot = model.decoder, model.fot
        # Keys, values and rotated copies, with the room that growing windows have.
        tensors = 2 + any(policy.rotates for policy in model.policies) + (fot.self_extend is not None)
        width = decoder.kv_heads * decoder.head_dim * torch.finfo(decoder.dtype).bits // 8
        self._token_bytes = 2 * tensors * decoder.layers * width
        self._reach = fot.window if fot.mem_layers or fot.self_extend is None else 1 << 62  # Tokens.

    def of(self, job: Job) -> int:
        """What a request may need at most."""
        return self._token_bytes * min(self._reach, len(job.request.ids) + job.request.max_new_tokens)

    def of_all(self, jobs: Iterable[Job]) -> int:
        """What requests may need together."""
        return sum(self.of(job) for job in jobs)
