"""The processes of one training: what they add up, and who of them writes. One process alone needs none of it.

`torchrun` starts the processes; whoever starts them otherwise (Ray Train) opens the process group and calls `train`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks:
    """This process among all that train together, by torch.distributed where it is up."""

    def __init__(self) -> None:
        up = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if up else 0
        self.count = dist.get_world_size() if up else 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def add_(self, numbers: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(numbers)
        return numbers

    def add_gradients_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Every gradient becomes its sum over all processes; one message, whatever the number of parameters."""
        if self.count == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        whole = torch.cat([gradient.flatten().float() for gradient in gradients])
        dist.all_reduce(whole)
        start = 0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            stop = start + gradient.numel()
            parameter.grad = whole[start:stop].view_as(gradient).to(gradient.dtype)
            start = stop

    @torch.no_grad()
    def copy_from_first_(self, tensors: Iterable[Tensor]) -> None:
        """Every process gets the first one's values."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def of_torchrun() -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()
