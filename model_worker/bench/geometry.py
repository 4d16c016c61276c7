"""The model that is measured: a Llama with seeded random weights, of the size the authors' code was measured at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memory_service.types.specs import DType
from model_worker.settings import Cut, FotConfig, Overflow, SelfExtend

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SPREAD = 0.08  # Standard deviation of the weights: attention then prefers some keys, and wrong answers show.


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of the model and of its window, in tokens."""

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    feed_forward: int = 688
    vocabulary: int = 512
    window: int = 512
    last_context_length: int = 256
    trained: int = 4096  # Tokens of context the model counts as trained on; only Self-Extend asks.

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def build(self) -> LlamaForCausalLM:
        """The model in float32, the same weights every time."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.trained,
            initializer_range=SPREAD,
            tie_word_embeddings=False,
        )
        return LlamaForCausalLM(config).eval().requires_grad_(False)

    def fot(self, layers: tuple[int, ...], dtype: DType) -> FotConfig:
        """These memory layers before this window, overflowing as the authors' code does."""
        return FotConfig(
            layers,
            window=self.window,
            last_context_length=self.last_context_length,
            mem_dtype=dtype,
            overflow=Overflow.FLUSH,
            cut=Cut.BATCH,
        )

    def extended(self, tokens: int, policy: SelfExtend | None) -> FotConfig:
        """No memory: one window of `tokens`, seen whole or by Self-Extend."""
        return FotConfig(window=tokens, last_context_length=tokens, self_extend=policy)

    def tokens(self, count: int) -> Tensor:
        """Token ids [1, count], the same for every contender."""
        return torch.randint(self.vocabulary, (1, count), generator=torch.Generator().manual_seed(count))


QUICK = Geometry(32, 6, 2, 48, 64, window=64, last_context_length=32, trained=64)
