"""What a model with memory layers should say, by transformers' own attention: the memory lies in the KV cache.

A cached key that was not rotated is a key at position 0, which is where FoT puts the memory. So a memory layer gets its
memory as a cache, the others an empty one, and every layer a mask of its own. For one text at a time, any architecture.

K key/value heads, M memory tokens, n tokens of a window, D head_dim, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from model_worker.settings import FotConfig

Memory = dict[int, tuple[Tensor, Tensor]]  # Layer: keys and values [K, M, D], not rotated.


def windows(tokens: int, fot: FotConfig) -> list[tuple[int, int, int]]:
    """Start, first token that is new, and end of each window: those for the memory, then the last tokens."""
    last = max(tokens - fot.last_context_length, 0)
    cut, new = [], 0
    while new < last:
        start = max(0, new - fot.overlap)
        cut.append((start, new, min(start + fot.window, last)))
        new = cut[-1][2]
    return [*cut, (last, last, tokens)]


@torch.no_grad()
def expected(
    base: PreTrainedModel, ids: Tensor, fot: FotConfig, memory: Mapping[int, tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, Memory]:
    """Logits [T, V] of a text [T] on top of this memory, and the memory once the last window is reached."""
    remembered, before = dict(memory or {}), _size(memory or {})
    logits = []
    for start, new, stop in windows(len(ids), fot):
        # What a window sees itself, it does not see in memory as well.
        seen = {layer: (k[:, : before + start], v[:, : before + start]) for layer, (k, v) in remembered.items()}
        window, fresh = _run(base, ids[start:stop], seen if before + start else {}, fot)
        logits.append(window[new - start :])
        if stop < len(ids):
            for layer, (keys, values) in fresh.items():
                added = (keys[:, new - start :], values[:, new - start :])
                remembered[layer] = _joined(remembered.get(layer), added)
    return torch.cat(logits), remembered


def _size(memory: Mapping[int, tuple[Tensor, Tensor]]) -> int:
    return max((keys.shape[1] for keys, _ in memory.values()), default=0)


def scale_of_rotation(base: PreTrainedModel) -> Tensor:
    """What rotation by 0 multiplies the channels of a key by, [D]: not 1 with YaRN."""
    rotary: Any = base.model.rotary_emb
    size = base.config.head_dim if "head_dim" in base.config.to_dict() else None
    size = size or base.config.hidden_size // base.config.num_attention_heads
    if "attention_scaling" not in vars(rotary):  # Gemma 3: one per kind of layer, none of which scales.
        return torch.ones(size)
    turned = torch.arange(size) < 2 * len(rotary.inv_freq)
    return torch.where(turned, float(rotary.attention_scaling), 1.0)


def _run(base: PreTrainedModel, ids: Tensor, memory: Memory, fot: FotConfig) -> tuple[Tensor, Memory]:
    """One window: logits [n, V], and its own keys and values in the memory layers."""
    count, cache, depth = len(ids), DynamicCache(), base.config.num_hidden_layers
    for layer, (keys, values) in memory.items():
        cache.update(keys[None] * scale_of_rotation(base), values[None], layer)
    sizes = [memory[layer][0].shape[1] if layer in memory else 0 for layer in range(depth)]
    with _masks(base, count, sizes), _raw_keys(base, fot.mem_layers) as heard:
        out = base(
            input_ids=ids[None],
            position_ids=torch.arange(count)[None],
            attention_mask=torch.zeros(1, 1, count, count),
            past_key_values=cache,
            use_cache=True,
        )
    values = {layer: cache.layers[layer].values[0, :, sizes[layer] :] for layer in fot.mem_layers}
    return out.logits[0], {layer: (heard[layer], values[layer]) for layer in fot.mem_layers}


@contextmanager
def _masks(base: PreTrainedModel, count: int, sizes: list[int]) -> Iterator[None]:
    """Every layer sees its whole memory, and its window causally and as far back as the layer slides."""
    places = torch.arange(count)
    back = places[:, None] - places
    types = base.config.to_dict().get("layer_types") or ["full_attention"] * len(sizes)
    slides = base.config.to_dict().get("sliding_window") or count
    if len(set(types)) == 1 and base.config.to_dict().get("use_sliding_window", True):
        types = ["sliding_attention"] * len(sizes)
    hooks = []
    for layer, module in enumerate(base.get_submodule("model.layers").children()):
        width = slides if types[layer] == "sliding_attention" else count
        visible = torch.cat([torch.ones(count, sizes[layer], dtype=torch.bool), (back >= 0) & (back < width)], dim=1)
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]

        def put(_: object, args: Any, named: dict[str, Any], mask: Tensor = mask) -> tuple[Any, dict[str, Any]]:
            return args, {**named, "attention_mask": mask}

        hooks.append(module.get_submodule("self_attn").register_forward_pre_hook(put, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _raw_keys(base: PreTrainedModel, layers: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Keys [K, n, D] as they leave the projection and its norm, before any rotation."""
    heard: dict[int, Tensor] = {}
    hooks = []
    for layer in layers:
        attention: Any = base.get_submodule(f"model.layers.{layer}.self_attn")

        def hear(_: object, __: object, out: Tensor, layer: int = layer, attention: Any = attention) -> None:
            size, parts = attention.head_dim, dict(attention.named_children())
            if "qkv_proj" in parts:
                queries = base.config.num_attention_heads * size
                out = out[..., queries : queries + base.config.num_key_value_heads * size]
            keys = out[0].view(len(out[0]), -1, size)  # [n, K, D]
            heard[layer] = (parts["k_norm"](keys) if "k_norm" in parts else keys).transpose(0, 1)

        projection = attention.qkv_proj if "qkv_proj" in dict(attention.named_children()) else attention.k_proj
        hooks.append(projection.register_forward_hook(hear))
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _joined(old: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return new if old is None else (torch.cat([old[0], new[0]], dim=1), torch.cat([old[1], new[1]], dim=1))
