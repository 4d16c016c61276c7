"""LongLLaMA's own algorithm, written obviously: the oracle of the tests and what the benchmarks measure against.

Full attention over a memory that grows by concatenation, every window through every layer, one joint softmax. It reads
the modules of a transformers Llama-like decoder and replaces nothing in it. Source: Focused Transformer, arXiv
2307.03170, section 3 and appendix A, and the behaviour of the released inference code.

B batch rows, H query heads, K key/value heads, n queries of a window, s cached local tokens, m memory tokens,
D head_dim, T tokens of a call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memory_service.errors import InvalidArgument
from model_worker.settings import Cut, FotConfig, MemoryPosition, Overflow

MASKED = -1e6  # Score of a key that is not visible. A row of padding sees only such keys and averages them all.


@dataclass(frozen=True, eq=False)
class LayerCache:
    """What one layer keeps; keys are not rotated, and a layer without memory has m = 0."""

    keys: Tensor  # [B, K, s, D]
    values: Tensor  # [B, K, s, D]
    memory_keys: Tensor  # [B, K, m, D] in the memory's dtype
    memory_values: Tensor  # [B, K, m, D]


@dataclass(frozen=True, eq=False)
class Cache:
    """What the model keeps between calls. Calls return new caches and leave the old ones as they were."""

    layers: tuple[LayerCache, ...]
    positions: Tensor  # [B, s] int64, from the first token of the row, padding counted
    valid: Tensor  # [B, s] bool, false at padding
    memory_valid: Tensor  # [B, m] bool, the same in every memory layer

    @property
    def local_length(self) -> int:
        """Tokens in the local cache, s."""
        return self.positions.shape[1]

    @property
    def memory_tokens(self) -> int:
        """Tokens in memory, m."""
        return self.memory_valid.shape[1]


@dataclass(frozen=True, eq=False)
class _Window:
    """What all layers share while one window runs."""

    positions: Tensor  # [B, s + n]
    valid: Tensor  # [B, s + n]
    memory_valid: Tensor  # [B, m]
    flushed: int  # Of the oldest local tokens, how many go to memory before the attention.
    keep: bool  # The window becomes the local cache; else it goes to memory after the attention.


class Reference:
    """A Llama-like causal language model with memory layers, computed as LongLLaMA's authors do.

    `base` is a transformers LlamaForCausalLM or one with the same modules; make the reference before a FotModel
    attaches to it. Time grows with T², memory with the scores of a window: [B, H, C, C + m]. Raises InvalidArgument for
    what the authors' code does not have.
    """

    def __init__(self, base: Any, config: FotConfig):
        if config.overlap or config.self_extend is not None:
            raise InvalidArgument("the reference has neither overlap nor Self-Extend; leave them out")
        if config.mem_layers and config.mem_layers[-1] >= len(base.model.layers):
            raise InvalidArgument(f"the model has {len(base.model.layers)} layers, got mem_layers {config.mem_layers}")
        self._base = base
        self.config = config
        rotary: Any = base.model.rotary_emb
        self._inv_freq: Tensor = rotary.inv_freq.float()  # [D / 2]
        self._rotary_scaling = float(rotary.attention_scaling)

    def empty(self, batch: int) -> Cache:
        """The cache before the first call."""
        weight: Tensor = self._base.lm_head.weight
        layers = []
        for layer in self._base.model.layers:
            size = layer.self_attn.head_dim
            none = weight.new_empty(batch, layer.self_attn.k_proj.out_features // size, 0, size)
            nothing = none.to(self.config.mem_dtype.torch)
            layers.append(LayerCache(none, none, nothing, nothing))
        places = torch.empty(batch, 0, dtype=torch.long, device=weight.device)
        return Cache(tuple(layers), places, places.bool(), places.bool())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = True,
    ) -> tuple[Tensor, Cache]:
        """Logits [B, T, V] of all tokens of input_ids [B, T], and the cache after them.

        `attention_mask` [B, T] is of these tokens alone, 0 at (left) padding. With `use_cache` the last window becomes
        the local cache, without it goes to memory as well: the way to load documents.
        """
        batch, tokens = input_ids.shape
        cache = self.empty(batch) if cache is None else cache
        if not use_cache and cache.local_length:
            raise InvalidArgument("a local cache needs use_cache=True")
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if self.config.cut is Cut.ROW and not valid.all():
            raise InvalidArgument("the reference cuts padded rows by the padded length: use Cut.BATCH, or no padding")
        start = cache.positions[:, -1:] + 1 if cache.local_length else cache.positions.new_zeros(batch, 1)
        positions = start + torch.arange(tokens, device=input_ids.device)
        hidden = []
        for window in self._windows(tokens):
            # Windows before the last one go to memory, unless a local cache is carried through them.
            keep = bool(cache.local_length) if window.stop < tokens else use_cache
            one, cache = self._run(input_ids[:, window], positions[:, window], valid[:, window], cache, keep)
            hidden.append(one)
        logits: Tensor = self._base.lm_head(torch.cat(hidden, dim=1))
        return logits, cache

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        n: int,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Greedy continuation: tokens [B, n], and the logits [B, n, V] each was taken from."""
        logits, cache = self.forward(input_ids, attention_mask, cache)
        tokens, scores = [logits[:, -1].argmax(-1)], [logits[:, -1]]
        for _ in range(n - 1):
            logits, cache = self.forward(tokens[-1][:, None], cache=cache)
            scores.append(logits[:, -1])
            tokens.append(logits[:, -1].argmax(-1))
        return torch.stack(tokens, dim=1), torch.stack(scores, dim=1)

    # --- windows ---

    def _windows(self, tokens: int) -> Iterator[slice]:
        """Windows of C tokens up to the last L, and those as the final one."""
        final = max(tokens - self.config.last_context_length, 0)
        for first in range(0, final, self.config.window):
            yield slice(first, min(first + self.config.window, final))
        yield slice(final, tokens)

    def _run(
        self, input_ids: Tensor, positions: Tensor, valid: Tensor, cache: Cache, keep: bool
    ) -> tuple[Tensor, Cache]:
        """One window through all layers: hidden states [B, n, hidden] and the cache after it."""
        flushed = self._flushed(cache.local_length, input_ids.shape[1])
        window = _Window(
            positions=torch.cat([cache.positions[:, flushed:], positions], dim=1),
            valid=torch.cat([cache.valid[:, flushed:], valid], dim=1),
            memory_valid=torch.cat([cache.memory_valid, cache.valid[:, :flushed]], dim=1),
            flushed=flushed,
            keep=keep,
        )
        hidden: Tensor = self._base.model.embed_tokens(input_ids)
        layers = []
        for number, (layer, before) in enumerate(zip(self._base.model.layers, cache.layers, strict=True)):
            hidden, after = self._layer(number, layer, hidden, window, before)
            layers.append(after)
        hidden = self._base.model.norm(hidden)
        if keep:
            return hidden, Cache(tuple(layers), window.positions, window.valid, window.memory_valid)
        none = positions[:, :0]
        remembered = torch.cat([window.memory_valid, window.valid], dim=1)
        return hidden, Cache(tuple(layers), none, none.bool(), remembered)

    def _flushed(self, local: int, new: int) -> int:
        """How many of the local tokens leave when these many come."""
        if local + new <= self.config.window:
            return 0
        if self.config.overflow is Overflow.FLUSH:
            return local
        return min(local, max(local + new - self.config.last_context_length, 0))

    # --- layers ---

    def _layer(
        self, number: int, layer: Any, hidden: Tensor, window: _Window, cache: LayerCache
    ) -> tuple[Tensor, LayerCache]:
        mixed, cache = self._attention(number, layer.self_attn, layer.input_layernorm(hidden), window, cache)
        hidden = hidden + mixed
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden, cache

    def _attention(
        self, number: int, attention: Any, hidden: Tensor, window: _Window, cache: LayerCache
    ) -> tuple[Tensor, LayerCache]:
        """One attention layer over the local tokens and, in a memory layer, over the memory."""
        remembers = number in self.config.mem_layers
        query, key, value = (
            _split_heads(project(hidden), attention.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )  # [B, H or K, n, D]
        if window.flushed:
            cache = _flush(cache, window.flushed, remembers)
        keys = torch.cat([cache.keys, key], dim=2)  # [B, K, s + n, D]
        values = torch.cat([cache.values, value], dim=2)
        mixed = self._attend(query, keys, values, window, cache, remembers)
        output: Tensor = attention.o_proj(mixed.transpose(1, 2).flatten(2))
        if window.keep:
            return output, replace(cache, keys=keys, values=values)
        if remembers:
            cache = _remember(cache, keys, values)
        return output, replace(cache, keys=keys[:, :, :0], values=values[:, :, :0])

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, window: _Window, cache: LayerCache, remembers: bool
    ) -> Tensor:
        """Joint softmax over local and memory keys: [B, H, n, D]."""
        queries, length = query.shape[2], keys.shape[2]
        groups, scale = query.shape[1] // keys.shape[1], query.shape[3] ** -0.5
        raw_query = query
        if not remembers or self.config.mem_positionals:
            positions = window.positions - window.positions[:, :1]  # [B, s + n], from 0
            query = self._rotate(query, positions[:, -queries:])
            keys = self._rotate(keys, positions)
        causal = torch.ones(queries, length, dtype=torch.bool, device=query.device).tril(length - queries)
        visible = causal & window.valid[:, None, None, :]  # [B, 1, n, s + n]
        scores = query @ _repeat(keys, groups).mT * scale  # [B, H, n, s + n]
        scores = scores.masked_fill(~visible, MASKED)
        if remembers and cache.memory_keys.shape[2]:
            memory_keys = self._placed(cache.memory_keys.to(query.dtype))
            far = self._far_query(raw_query, query) @ _repeat(memory_keys, groups).mT * scale  # [B, H, n, m]
            far = far.masked_fill(~window.memory_valid[:, None, None, :], MASKED)
            scores = torch.cat([scores, far], dim=-1)
            values = torch.cat([values, cache.memory_values.to(values.dtype)], dim=2)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        mixed: Tensor = weights @ _repeat(values, groups)
        return mixed

    # --- positions ---

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """RoPE of x [B, heads, T, D] at positions [B, T]: the two halves of a head turn against each other."""
        angles = positions[:, None, :, None].float() * self._inv_freq  # [B, 1, T, D / 2]
        angles = torch.cat([angles, angles], dim=-1)
        cos = (angles.cos() * self._rotary_scaling).to(x.dtype)
        sin = (angles.sin() * self._rotary_scaling).to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def _placed(self, memory_keys: Tensor) -> Tensor:
        """Memory keys at position 0: as they are, but for rotations that also scale (YaRN)."""
        if self.config.mem_positionals and self._rotary_scaling != 1:
            return memory_keys * self._rotary_scaling
        return memory_keys

    def _far_query(self, raw: Tensor, rotated: Tensor) -> Tensor:
        """The query as memory sees it. The authors have `FIRST` alone."""
        if not self.config.mem_positionals or self.config.memory_position is MemoryPosition.NONE:
            return raw
        if self.config.memory_position is MemoryPosition.FIXED:
            place = torch.tensor([[self.config.fixed_position]], device=raw.device)
            return self._rotate(raw, place.expand(len(raw), raw.shape[2]))
        return rotated


def _remember(cache: LayerCache, keys: Tensor, values: Tensor) -> LayerCache:
    """Append to memory, oldest first, in the memory's dtype."""
    return replace(
        cache,
        memory_keys=torch.cat([cache.memory_keys, keys.to(cache.memory_keys.dtype)], dim=2),
        memory_values=torch.cat([cache.memory_values, values.to(cache.memory_values.dtype)], dim=2),
    )


def _flush(cache: LayerCache, tokens: int, remembers: bool) -> LayerCache:
    """Move the oldest local tokens to memory; a layer without memory loses them."""
    if remembers:
        cache = _remember(cache, cache.keys[:, :, :tokens], cache.values[:, :, :tokens])
    return replace(cache, keys=cache.keys[:, :, tokens:], values=cache.values[:, :, tokens:])


def _split_heads(x: Tensor, size: int) -> Tensor:
    return x.view(*x.shape[:-1], -1, size).transpose(1, 2)


def _repeat(x: Tensor, groups: int) -> Tensor:
    """Key/value heads for every query head that reads them."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
