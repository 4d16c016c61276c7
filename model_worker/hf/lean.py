"""Layers of the Llama kind, run for their keys and values alone: transformers' own sums, with less around them.

A prompt on its way into memory needs neither gradients nor logits, and of the last memory layer only keys and values.
So this pass works in place, rotates nothing by one, adds a layer's output while it is multiplied, and ends in the middle
of the last layer. For a long load of a small model it also makes matrices of its own, in which norm weights, scales and
the order of channels are done once; they go when the load is over. The model's modules are read and never changed.
Whatever is not exactly such a layer goes transformers' own way, and a trial holds both equal before the first use.

B batch rows, n tokens of a row, N = B·n, H query heads, K key/value heads, D head_dim, V vocabulary, W hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model_worker.attention import strips
from model_worker.attention.room import Room
from model_worker.attention.strips import Shape, Strips
from model_worker.hf.decoder import Call, Decoder, Filled
from model_worker.positions.rope import Angles, rotate

# Stacks whose layers are norm, attention, norm and a gated feed-forward, each half added to the stream.
_STACKS = frozenset(
    f"transformers.models.{package}.modeling_{package}.{kind}Model"
    for package, kind in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"))
)
_MODULES = ("torch.nn.modules.linear", "torch.nn.modules.activation", "transformers.activations")
_COPY_TOKENS = 4096  # To be read before matrices of its own pay …
_COPY_BYTES = 64 << 20  # … and what they may take.
_TABLE_USES = 4  # So many times the vocabulary must be read before the first layer's projections of all of it pay.
_FEED_TOKENS = 512  # Run together through a feed-forward, whose middle is wide: half a cache's worth.
_TRIAL = (2, 6)  # Rows and tokens.
_TOLERANCE = 1e-4  # Of float32 sums in another order, relative to the largest.


class Filling(Protocol):
    """A pass for the keys and values of its last layer, and of memory layers below."""

    @property
    def last(self) -> int:
        """The layer whose keys and values are the last ones wanted."""

    @property
    def known(self) -> int:
        """Tokens at the start of every row whose last keys and values nobody wants: they are left context."""

    def attend(self, call: Call) -> Tensor:
        """Attention of a layer that is not plain: [B, H, m, D] of its m queries, the newest of the n tokens."""

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Take the last layer's keys and values [B, K, n - known, D], which are overwritten afterwards."""


@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """One matrix and where its columns go."""

    columns: slice
    matrix: Tensor  # [in, out]
    bias: Tensor | None

    def into(self, out: Tensor, x: Tensor) -> None:
        """The product with x [N, in]."""
        out = out[:, self.columns]
        if self.bias is None:
            torch.mm(x, self.matrix, out=out)
        else:
            torch.addmm(self.bias, x, self.matrix, out=out)


@dataclass(frozen=True, slots=True, eq=False)
class _Half:
    """Half a layer: a norm and the products of what it gives; more than one where the matrices are the model's."""

    norm: Any
    weight: Tensor | None  # Of the norm; None if the matrices have it.
    products: tuple[_Product, ...]
    width: int  # Columns of all products together.

    def run(self, stream: Tensor, name: str, room: Room) -> Tensor:
        """[N, W] to [N, width]."""
        normed = room.take("normed", *stream.shape, like=stream)
        # One pass over x for its length where squares and their mean take two.
        length = torch.linalg.vector_norm(stream, dim=-1, keepdim=True)
        scale = length.square_().mul_(1 / stream.shape[-1]).add_(self.norm.variance_epsilon).rsqrt_()
        torch.mul(stream, scale, out=normed)
        if self.weight is not None:
            normed.mul_(self.weight)
        out = room.take(name, len(stream), self.width, like=stream)
        for product in self.products:
            product.into(out, normed)
        return out


class Lean:
    """A decoder's lower layers during one load, while its weights do not change. For any number of threads."""

    def __init__(self, decoder: Decoder, last: int, tokens: int, plain: Mapping[int, Angles | None]):
        """Use `lean_of`."""
        self.last = last
        self._heads, self._kv_heads, self._dim = decoder.heads, decoder.kv_heads, decoder.head_dim
        self._layers: list[Any] = list(decoder.body.layers)[: last + 1]
        self._sliding = [decoder.sliding(number) for number in range(last + 1)]
        self._embedding: Tensor = decoder.body.embed_tokens.weight  # [V, W]
        own = tokens >= _COPY_TOKENS and sum(_bytes(layer) for layer in self._layers) <= _COPY_BYTES
        self._turns = {
            number: None if angles is None else torch.complex(*(x[:, : self._dim // 2].contiguous() for x in angles))
            for number, angles in (plain.items() if own else ())
        }
        self._inputs = [self._input(number, own) for number in range(last + 1)]
        self._feeds = [_feed(layer, own) for layer in self._layers[:-1]]
        # What the first layer projects depends on the token alone: [V, columns].
        self._table: Tensor | None = None
        rows = len(self._embedding)
        if own and tokens >= _TABLE_USES * rows and 4 * rows * self._inputs[0].width <= _COPY_BYTES:
            self._table = self._inputs[0].run(self._embedding, "projected", Room())

    @property
    def bytes_per_token(self) -> int:
        """About the working memory of a pass, for each of its tokens."""
        wide = [half.width for half in (*self._inputs, *self._feeds)]
        return self._embedding.itemsize * (3 * max(wide) + 2 * self._embedding.shape[1])

    def _input(self, number: int, own: bool) -> _Half:
        """The norm and the projections of a layer; of the last one those of keys and values only."""
        layer, heads, dim = self._layers[number], self._heads, self._dim
        attention = layer.self_attn
        linears = [attention.k_proj, attention.v_proj]
        if number < self.last:
            linears.insert(0, attention.q_proj)
        rows: list[Tensor | None] = [None] * len(linears)
        scales = [1.0] * len(linears)
        if number in self._turns:
            within = strips.paired(dim)
            rows[:2] = [(torch.arange(count)[:, None] * dim + within).flatten() for count in (heads, self._kv_heads)]
            scales[0] = attention.scaling
        return _half(layer.input_layernorm, linears, rows, scales, own)

    def fill(self, ids: Tensor, step: Filling, room: Room) -> None:
        """Run [B, n] tokens up to the keys and values of the last layer."""
        if self.last == 0:
            ids = ids[:, step.known :]
        stream = room.take("stream", ids.numel(), self._embedding.shape[1], like=self._embedding)
        if self.last > 0 or self._table is None:
            torch.index_select(self._embedding, 0, ids.reshape(-1), out=stream)
        for number in range(self.last):
            stream, ids = self._through(number, stream, ids, step, room)
        step.keep(*(x.transpose(1, 2) for x in self._projected(self.last, stream, ids, room)))

    def _through(self, number: int, stream: Tensor, ids: Tensor, step: Filling, room: Room) -> tuple[Tensor, Tensor]:
        """A whole layer on the stream [N, W] of ids [B, n]; both come back without what nobody needs any more."""
        layer = self._layers[number]
        query, key, value = self._projected(number, stream, ids, room)
        if number == self.last - 1 and step.known:
            stream = _cut(stream, ids, step.known, room)
            query, ids = query[:, step.known :], ids[:, step.known :]
        if number in self._turns:
            mixed = self._plain(query, key, value, self._turns[number], room)
        else:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            call = Call(number, query, key, value, layer.self_attn.scaling, None, self._sliding[number])
            mixed = step.attend(call).transpose(1, 2).reshape(len(stream), -1)
        _add_(stream, layer.self_attn.o_proj, mixed)
        for some in stream.split(_FEED_TOKENS):
            gate, up = self._feeds[number].run(some, "gate and up", room).chunk(2, dim=1)
            _add_(some, layer.mlp.down_proj, nn.functional.silu(gate, inplace=True).mul_(up))
        return stream, ids

    def _projected(self, number: int, stream: Tensor, ids: Tensor, room: Room) -> tuple[Tensor, ...]:
        """Queries, keys and values [B, n, heads, D] of the layer; of the last one keys and values."""
        half = self._inputs[number]
        if number == 0 and self._table is not None:
            out = room.take("projected", ids.numel(), half.width, like=stream)
            torch.index_select(self._table, 0, ids.reshape(-1), out=out)
        else:
            out = half.run(stream, "projected", room)
        heads = [self._heads, self._kv_heads, self._kv_heads][-(3 if number < self.last else 2) :]
        return out.view(*ids.shape, -1, self._dim).split(heads, dim=2)

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, turns: Tensor | None, room: Room) -> Tensor:
        """Causal attention among a window's own tokens: [N, H·D]."""
        group = self._heads // self._kv_heads
        shape = (len(key), self._kv_heads, group, key.shape[1], query.shape[1], self._dim)
        made = room.made(shape, lambda: Strips(Shape(*shape), like=key))
        query = query.unflatten(2, (self._kv_heads, group))
        return made.causal(query, key, value, None if turns is None else turns[: key.shape[1]])


@torch.no_grad()
def lean_of(decoder: Decoder, last: int, tokens: int, plain: Mapping[int, Angles | None]) -> Lean | None:
    """The lean pass over an attached decoder up to a layer's keys; None where transformers' own way is due.

    `tokens` will be read by it. In `plain` layers nothing is seen but a window's own tokens, causally, turned by these
    angles of all its positions (None: not turned).
    """
    if not _serves(decoder):
        return None
    if "lean" not in decoder.verdicts:
        decoder.verdicts["lean"] = all(_is_equal(decoder, count) for count in (0, _COPY_TOKENS))
    return Lean(decoder, last, tokens, plain) if decoder.verdicts["lean"] else None


def _serves(decoder: Decoder) -> bool:
    """Whether the layers are, module by module, those this file knows: nothing exchanged, wrapped or hooked."""
    body, package = decoder.body, type(decoder.body).__module__
    if f"{package}.{type(body).__qualname__}" not in _STACKS or decoder.config.hidden_act != "silu":
        return False
    if decoder.dtype != torch.float32 or decoder.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return type(body.embed_tokens) is nn.Embedding and all(
        type(module).__module__ in (package, *_MODULES)
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        and all(one.dtype == torch.float32 for one in module.parameters(recurse=False))
        for module in _modules(body)
    )


def _modules(body: Any) -> Iterator[nn.Module]:
    for layer in body.layers:
        yield from layer.modules()


# --- a trial --------------------------------------------------------------------------------------------------------


class _Trial:
    """A step for both ways: a window's own tokens below the last layer, whose keys and values are kept."""

    known = 1

    def __init__(self, last: int, angles: Angles):
        self.last = last
        self.angles = angles
        self.found: list[Tensor] = []

    def attend(self, call: Call) -> Tensor:
        if call.layer == self.last:
            self.keep(call.key[:, :, self.known :], call.value[:, :, self.known :])
            raise Filled
        queries, seen = call.query.shape[2], call.key.shape[2]
        visible = torch.ones(queries, seen, dtype=torch.bool).tril(seen - queries)
        query, key = rotate(call.query, self.angles.last(queries)), rotate(call.key, self.angles)
        return nn.functional.scaled_dot_product_attention(
            query, key, call.value, visible, scale=call.scale, enable_gqa=True
        )

    def keep(self, key: Tensor, value: Tensor) -> None:
        self.found = [key.clone(), value.clone()]


def _is_equal(decoder: Decoder, tokens: int) -> bool:
    """Whether a few tokens get the same keys and values both ways, through one whole layer, as in a load of `tokens`."""
    rows, count = _TRIAL
    last = min(1, decoder.layers - 1)
    ids = (7 * torch.arange(rows * count) % len(decoder.body.embed_tokens.weight)).view(rows, count)
    angles = decoder.rope(0).angles(torch.arange(count), torch.float32)
    theirs, ours = _Trial(last, angles), _Trial(last, angles)
    decoder.fill(ids, theirs)
    Lean(decoder, last, tokens, {0: angles} if last else {}).fill(ids, ours, Room())
    return all(
        bool((a - b).abs().max() <= _TOLERANCE * a.abs().max()) for a, b in zip(theirs.found, ours.found, strict=True)
    )


# --- layers ---------------------------------------------------------------------------------------------------------


def _bytes(layer: Any) -> int:
    """What matrices of its own would take for a layer."""
    attention, mlp = layer.self_attn, layer.mlp
    copied = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
    return sum(one.weight.nbytes for one in copied)


def _feed(layer: Any, own: bool) -> _Half:
    linears = [layer.mlp.gate_proj, layer.mlp.up_proj]
    return _half(layer.post_attention_layernorm, linears, [None, None], [1.0, 1.0], own)


def _half(norm: Any, linears: Sequence[Any], rows: Sequence[Tensor | None], scales: Sequence[float], own: bool) -> _Half:
    """A norm and projections of what it gives; with `own` one matrix, its rows chosen and scaled."""
    ends = torch.tensor([one.out_features for one in linears]).cumsum(0).tolist()
    if not own:
        starts = [0, *ends[:-1]]
        products = [
            _Product(slice(start, end), one.weight.t(), one.bias)
            for start, end, one in zip(starts, ends, linears, strict=True)
        ]
        return _Half(norm, norm.weight, tuple(products), ends[-1])
    weights, biases = [], []
    for linear, chosen, scale in zip(linears, rows, scales, strict=True):
        weight, bias = linear.weight * norm.weight, linear.bias
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        if chosen is not None:
            weight, bias = weight[chosen], bias[chosen]
        weights.append(weight * scale)
        biases.append(bias * scale)
    bias = torch.cat(biases) if any(one.bias is not None for one in linears) else None
    return _Half(norm, None, (_Product(slice(0, ends[-1]), torch.cat(weights).t(), bias),), ends[-1])


def _add_(stream: Tensor, linear: Any, x: Tensor) -> None:
    """Add the layer's output to the stream."""
    if linear.bias is not None:
        stream.add_(linear.bias)
    stream.addmm_(x, linear.weight.t())


def _cut(stream: Tensor, ids: Tensor, known: int, room: Room) -> Tensor:
    """The stream [N, W] of ids [B, n] without the first `known` tokens of every row."""
    batch, count = ids.shape
    late = room.take("late", batch * (count - known), stream.shape[1], like=stream)
    late.view(batch, count - known, -1).copy_(stream.view(batch, count, -1)[:, known:])
    return late
