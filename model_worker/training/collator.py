"""Batches of examples at the positions a recipe chose, for any training loop: a collate function, no more.

B examples, N tokens of the longest of them (the window, but for short texts), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from memory_service.errors import InvalidArgument
from model_worker.errors import UnsupportedModel
from model_worker.positions.cream import Generator, Placement, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100  # The label that no loss counts.


class Mask(StrEnum):
    """How a batch says that every token sees all before it, whatever their positions.

    It must say so: without a mask and without a cache, as one trains, transformers takes every jump of the positions
    for the start of another text packed into the row, and lets no token see across; the loss looks normal. `check_mask`
    tells whether a model reads a batch as it should.
    """

    # [B, 1, N, N] in `dtype`, 0 or -inf: right with eager and sdpa attention. All rows share N² numbers until the batch
    # is moved or pinned, then B·N² (float32, N = 4096: 64 MiB an example).
    ADDITIVE = "additive"
    # [B, 1, N, N] bool: right with sdpa, in any dtype, a quarter of the bytes. Eager attention would add it as numbers.
    BOOLEAN = "boolean"
    # [B, N], 1 but for padding: no N², the fastest kernels, flash attention, and the only choice for models with layers
    # of sliding attention, which a mask of four dimensions turns into full attention. It holds for as long as
    # transformers looks for packed texts only where no mask is given.
    ONES = "ones"


class Collator:
    """Turns texts into a batch: {input_ids, position_ids, labels: [B, N] int64, attention_mask: see `Mask`}.

    An example has `input_ids`, of any length, and may have `labels` of that length (default: the ids) and an
    `attention_mask` of ones; other fields are not used. Rows are padded at the end: pads have label -100, repeat the
    row's last position, and no token of the text sees them.

    Labels at the border of two segments are those tokens, as in the authors' code, though one does not follow the other
    in the text; with `mask_borders` they are -100. The same seed gives the same batches in the same order. Every
    process of a DataLoader has a stream of its own, from `seed` and from the seed that torch gives it, new in every
    epoch; the ranks of a distributed run need seeds of their own.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        seed: int,
        pad_token_id: int = 0,
        mask: Mask = Mask.ADDITIVE,
        dtype: torch.dtype = torch.float32,
        mask_borders: bool = False,
    ):
        """`dtype` is for ADDITIVE and should be the model's: CUDA kernels insist on it."""
        if seed < 0:
            raise InvalidArgument(f"seed must be 0 or more, got {seed}")
        self.sampler = sampler
        self.seed = seed
        self.pad_token_id = pad_token_id
        self.mask = Mask(mask)
        self.dtype = dtype
        self.mask_borders = mask_borders
        self._stream: tuple[int, ...] = ()
        self._generator = np.random.default_rng(seed)

    def __call__(self, examples: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
        """Collate examples. Raises InvalidArgument for one that is padded, malformed or too short for the sampler."""
        if not examples:
            raise InvalidArgument("a batch needs at least one example")
        texts = [_text(example) for example in examples]
        placements = self.sampler.sample([len(ids) for ids, _ in texts], self._random())
        rows = [self._row(*text, placement) for text, placement in zip(texts, placements, strict=True)]
        longest = max(len(ids) for ids, _, _ in rows)
        input_ids = torch.full((len(rows), longest), self.pad_token_id)
        labels = torch.full_like(input_ids, IGNORED)
        position_ids = torch.empty_like(input_ids)
        for row, (ids, positions, targets) in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            labels[row, : len(ids)] = targets
            position_ids[row, : len(ids)] = positions
            position_ids[row, len(ids) :] = positions[-1]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "labels": labels,
            "attention_mask": self._mask([len(ids) for ids, _, _ in rows], longest),
        }

    def _row(self, ids: Tensor, labels: Tensor, placement: Placement) -> tuple[Tensor, Tensor, Tensor]:
        tokens, positions = placement
        labels = labels[tokens]
        if self.mask_borders:
            labels[1:][tokens.diff() != 1] = IGNORED
        return ids[tokens], positions, labels

    def _mask(self, lengths: list[int], longest: int) -> Tensor:
        if self.mask is Mask.ONES:
            return (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        # Pads come last, so what is causal hides them too, and one mask serves all rows.
        if self.mask is Mask.BOOLEAN:
            causal = torch.ones(longest, longest, dtype=torch.bool).tril_()
        else:
            causal = torch.full((longest, longest), -torch.inf, dtype=self.dtype).triu_(1)
        return causal.expand(len(lengths), 1, longest, longest)

    def _random(self) -> Generator:
        """The generator of this process and epoch; a copy that a worker got of its parent's would repeat it."""
        worker = get_worker_info()
        stream = (worker.seed,) if worker else ()
        if stream != self._stream:
            self._stream = stream
            self._generator = np.random.default_rng((self.seed, *stream))
        return self._generator


def _text(example: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """Token ids and labels [T] of one example."""
    if "input_ids" not in example:
        raise InvalidArgument(f"an example needs input_ids, got {sorted(example)}")
    ids = torch.as_tensor(example["input_ids"], dtype=torch.int64)
    labels = torch.as_tensor(example.get("labels", ids), dtype=torch.int64)
    if ids.dim() != 1 or labels.shape != ids.shape:
        raise InvalidArgument(
            f"an example is one text: input_ids [T] and labels [T], got {list(ids.shape)} and {list(labels.shape)}"
        )
    if not torch.as_tensor(example.get("attention_mask", True)).bool().all():
        raise InvalidArgument("an example is padded (its attention_mask has zeros): give texts as they are")
    return ids, labels


@torch.no_grad()
def check_mask(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedModel unless `model`, with this batch's kind of mask, reads a row as one causal text.

    Looks at the first row whose positions jump, in four passes of that row: once per run, before training.
    """
    jumps = batch["position_ids"].diff(dim=-1) > 1  # Pads repeat the last position, so they are no jumps.
    if not jumps.any():
        raise InvalidArgument("no positions of this batch jump, so it cannot show whether the mask works: take another")
    row = int(jumps.any(-1).nonzero()[0])
    border = int(jumps[row].nonzero()[0]) + 1
    ids, positions = batch["input_ids"][row : row + 1], batch["position_ids"][row : row + 1]
    mask = batch.get("attention_mask")
    mask = None if mask is None else mask[row : row + 1]

    def logits(ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        out = model(
            input_ids=ids.to(model.device),
            position_ids=positions.to(model.device),
            attention_mask=None if mask is None else mask.to(model.device),
            use_cache=False,
        )
        row_logits: Tensor = out.logits[0]
        return row_logits.float()

    was_training = model.training
    model.eval()
    try:
        plain = torch.arange(ids.shape[1])[None]
        # Where nothing jumps, transformers' own mask is right: causal, and sliding where it should be.
        want, have = logits(ids, plain, None), logits(ids, plain, mask)
        other = ids.clone()
        other[:, :border] = (other[:, :border] + 1) % model.config.get_text_config(decoder=True).vocab_size
        before, after = logits(ids, positions, mask), logits(other, positions, mask)
    finally:
        model.train(was_training)
    used = int((positions[0].diff() != 0).sum()) + 1  # Pads may see each other in any way.
    largest, eps = want.abs().max(), torch.finfo(model.dtype).eps
    if (have - want)[:used].abs().max() > largest * eps**0.5:
        raise UnsupportedModel(
            f"with this mask {type(model).__name__} does not see what it sees without: for attention other than sdpa "
            "use Mask.ADDITIVE, for layers of sliding attention or flash attention Mask.ONES"
        )
    if (before - after)[border:used].abs().max() <= largest * eps:
        raise UnsupportedModel(
            f"{type(model).__name__} takes a jump of the positions for the start of another text: give the model the "
            "batch's attention_mask, and if it has it, use Mask.ADDITIVE"
        )
