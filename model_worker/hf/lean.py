"""Layers of the Llama kind, run for the keys and values of one of them: transformers' own sums, with less around them.

A long prompt on its way into the memory of a small model needs neither gradients nor logits, and of the memory layer
only keys and values. So this pass makes matrices of its own, in which norm weights, the scale and the order of channels
are done once; it works in place, and adds a layer's output while it is multiplied. The matrices go when the load is
over; the model's modules are read and never changed. Whatever is not exactly such a stack goes transformers' own way
(`lean_of` says what is), and a trial holds both equal before the first use.

B batch rows, n tokens of a row, N = B·n, H query heads, K key/value heads, D head_dim, W hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model_worker.attention import strips
from model_worker.attention.room import Room
from model_worker.hf.decoder import Call, Decoder, Filled
from model_worker.positions.rope import Angles, rotate
from model_worker.settings import FotConfig

# Stacks whose layers are norm, attention, norm and a gated feed-forward, each half added to the stream.
_STACKS = frozenset(
    f"transformers.models.{package}.modeling_{package}.{kind}Model"
    for package, kind in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"))
)
_MODULES = (nn.Linear, nn.Embedding, nn.SiLU)  # Of torch's own that stand in them.
_LEAST_TOKENS = 4096  # To be read before matrices of its own pay …
_MOST_BYTES = 64 << 20  # … and what they may take: a larger model is bound by its products, whoever calls them.
_FEED_TOKENS = 256  # Run together through a feed-forward, whose middle is wide: half a cache's worth.
_TRIAL = (2, 6)  # Rows and tokens.
_TOLERANCE = 1e-4  # Of float32 sums in another order, relative to the largest.


class _Half(NamedTuple):
    """Half a layer: a norm and the projections of what it gives, as one product."""

    epsilon: float
    matrix: Tensor  # [W, columns], with the norm's weight.
    bias: Tensor | None

    def run(self, stream: Tensor, name: str, room: Room) -> Tensor:
        """[N, W] to [N, columns]."""
        # One pass over x for its length where squares and their mean take two.
        length = torch.linalg.vector_norm(stream, dim=-1, keepdim=True)
        scale = length.square_().mul_(1 / stream.shape[-1]).add_(self.epsilon).rsqrt_()
        normed = torch.mul(stream, scale, out=room.take("normed", *stream.shape))
        out = room.take(name, len(stream), self.matrix.shape[1])
        if self.bias is None:
            return torch.mm(normed, self.matrix, out=out)
        return torch.addmm(self.bias, normed, self.matrix, out=out)


class Lean:
    """A decoder's layers up to the keys of `last`, while its weights do not change. For any number of threads."""

    def __init__(self, decoder: Decoder, last: int, angles: Angles):
        """Use `lean_of`. `angles` [n, D] are those of the longest window's positions."""
        self._heads, self._kv_heads, self._dim = decoder.heads, decoder.kv_heads, decoder.head_dim
        self._layers: list[Any] = list(decoder.body.layers)[:last]
        self._embedding: Tensor = decoder.body.embed_tokens.weight  # [vocabulary, W]
        self._turns = strips.turns(angles)
        self._inputs = [self._input(layer) for layer in self._layers]
        self._feeds = [
            _half(layer.post_attention_layernorm, [_rows(layer.mlp.gate_proj), _rows(layer.mlp.up_proj)])
            for layer in self._layers
        ]
        # Of the last layer nobody asks anything, and its keys leave in the model's own order.
        end = decoder.body.layers[last]
        self._inputs.append(_half(end.input_layernorm, [_rows(end.self_attn.k_proj), _rows(end.self_attn.v_proj)]))

    def _input(self, layer: Any) -> _Half:
        attention, within = layer.self_attn, strips.paired(self._dim)
        of_queries, of_keys = (
            (torch.arange(heads)[:, None] * self._dim + within).flatten() for heads in (self._heads, self._kv_heads)
        )
        weight, bias = _rows(attention.q_proj, of_queries)
        query = (weight * attention.scaling, None if bias is None else bias * attention.scaling)
        return _half(layer.input_layernorm, [query, _rows(attention.k_proj, of_keys), _rows(attention.v_proj)])

    def fill(self, ids: Tensor, known: int, room: Room) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, n - known, D] of [B, n] tokens, in the room's memory.

        The first `known` tokens of every row are left context: layers below see them, and nobody wants their keys.
        """
        batch, count = ids.shape
        if not self._layers:
            ids = ids[:, known:]
        stream = room.take("stream", ids.numel(), self._embedding.shape[1])
        torch.index_select(self._embedding, 0, ids.flatten(), out=stream)
        for number, layer in enumerate(self._layers):
            query, key, value = self._projected(number, stream, ids, room)
            if number == len(self._layers) - 1 and known:
                query, ids = query[:, known:], ids[:, known:]
                kept = stream.view(batch, count, -1)[:, known:]
                stream = room.take("late", *kept.shape).copy_(kept).flatten(0, 1)
            query = torch.unflatten(query, 2, (self._kv_heads, -1))
            _add_(stream, layer.self_attn.o_proj, strips.causal(query, key, value, self._turns, room))
            for some in torch.split(stream, _FEED_TOKENS):
                gate, up = self._feeds[number].run(some, "gate and up", room).chunk(2, dim=1)
                _add_(some, layer.mlp.down_proj, nn.functional.silu(gate, inplace=True).mul_(up))
        key, value = self._projected(len(self._layers), stream, ids, room)
        return key.transpose(1, 2), value.transpose(1, 2)

    def _projected(self, number: int, stream: Tensor, ids: Tensor, room: Room) -> Sequence[Tensor]:
        """Queries, keys and values [B, n, heads, D] of a layer; of the last one keys and values."""
        out = self._inputs[number].run(stream, "projected", room)
        heads = [self._kv_heads, self._kv_heads]
        if number < len(self._layers):
            heads.insert(0, self._heads)
        return out.view(*ids.shape, -1, self._dim).split_with_sizes(heads, 2)


def lean_of(decoder: Decoder, fot: FotConfig, tokens: int, longest: int) -> Lean | None:
    """The lean pass of an attached decoder, or None where transformers' own way is due.

    `tokens` will be read by it, in windows of up to `longest`.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    if len(fot.mem_layers) != 1 or fot.self_extend is not None:
        return None  # Of several memory layers all but the last ask the memory.
    last, rope = fot.mem_layers[0], decoder.rope(0)
    widths = [decoder.sliding(layer) for layer in range(last)]
    if longest > strips.LONGEST or any(width is not None and width < longest for width in widths):
        return None
    if rope.rotary_dims != decoder.head_dim or tokens < _LEAST_TOKENS or not _serves(decoder, last):
        return None
    if "lean" not in decoder.verdicts:
        decoder.verdicts["lean"] = _is_equal(decoder)
    if not decoder.verdicts["lean"]:
        return None
    return Lean(decoder, last, rope.angles(torch.arange(longest), torch.float32))


def _serves(decoder: Decoder, last: int) -> bool:
    """Whether the layers are, module by module, those this file knows: nothing exchanged, wrapped, hooked or moved."""
    body = decoder.body
    package = type(body).__module__
    if f"{package}.{type(body).__qualname__}" not in _STACKS or decoder.config.hidden_act != "silu":
        return False
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    layers = [one for layer in body.layers[: last + 1] for one in layer.modules()]
    copied = sum(one.weight.nbytes for one in layers if isinstance(one, nn.Linear))
    return copied <= _MOST_BYTES and all(_is_plain(one, package) for one in (body, body.embed_tokens, *layers))


def _is_plain(module: nn.Module, package: str) -> bool:
    """Whether it is the package's or torch's own, runs its own forward alone, and has float32 weights on the CPU."""
    known = type(module) in _MODULES or type(module).__module__ in (package, "transformers.activations")
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(known and not hooked) and all(
        # Quantised and distributed weights are of a class of their own, whatever dtype they claim.
        type(one) is nn.Parameter and one.dtype == torch.float32 and one.device.type == "cpu"
        for one in module.parameters(recurse=False)
    )


# --- a trial --------------------------------------------------------------------------------------------------------


class _Trial:
    """A step that keeps the last layer's keys and values; below, a window sees its own tokens."""

    def __init__(self, last: int, angles: Angles):
        self._last = last
        self._angles = angles
        self.found: tuple[Tensor, Tensor] | None = None

    def attend(self, call: Call) -> Tensor:
        if call.layer == self._last:
            self.found = (call.key, call.value)
            raise Filled
        query, key = rotate(call.query, self._angles), rotate(call.key, self._angles)
        return nn.functional.scaled_dot_product_attention(
            query, key, call.value, is_causal=True, scale=call.scale, enable_gqa=True
        )


def _is_equal(decoder: Decoder) -> bool:
    """Whether a few tokens get the same keys and values both ways, through one whole layer where there are two."""
    rows, count = _TRIAL
    known, last = 1, min(1, decoder.layers - 1)
    ids = (7 * torch.arange(rows * count) % len(decoder.body.embed_tokens.weight)).view(rows, count)
    angles = decoder.rope(0).angles(torch.arange(count), torch.float32)
    theirs = _Trial(last, angles)
    decoder.fill(ids, theirs)
    if theirs.found is None:
        return False
    ours = Lean(decoder, last, angles).fill(ids, known, Room())
    return all(
        bool((a[:, :, known:] - b).abs().max() <= _TOLERANCE * a.abs().max())
        for a, b in zip(theirs.found, ours, strict=True)
    )


# --- matrices -------------------------------------------------------------------------------------------------------


def _rows(linear: Any, chosen: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a projection, its rows in this order."""
    pick = slice(None) if chosen is None else chosen
    return linear.weight[pick], None if linear.bias is None else linear.bias[pick]


def _half(norm: Any, projections: Sequence[tuple[Tensor, Tensor | None]]) -> _Half:
    weights = torch.cat([weight for weight, _ in projections]) * norm.weight
    biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in projections]
    has_bias = any(bias is not None for _, bias in projections)
    return _Half(norm.variance_epsilon, weights.t(), torch.cat(biases) if has_bias else None)


def _add_(stream: Tensor, linear: Any, x: Tensor) -> None:
    """Add the layer's output to the stream."""
    if linear.bias is not None:
        stream.add_(linear.bias)
    stream.addmm_(x, linear.weight.t())
