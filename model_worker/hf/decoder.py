"""The one file that knows Hugging Face's decoders from inside: gives a model our attention, and takes it back.

While attached, the model's rotary module does not rotate, so its attention layers hand over keys and queries as they
leave the projections (and q/k norms), and every layer's attention is whatever the `Step` of the call makes of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from memory_service.errors import FailedPrecondition
from model_worker.errors import UnsupportedModel
from model_worker.positions.rope import Angles, Rope, rotate

NAME = "fot"
_LOGIT_SCALINGS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier")


class Step(Protocol):
    """One pass through the layers: what attention means in it."""

    def attend(self, call: Call) -> Tensor:
        """Attention of one layer: [B, H, n, D] in the queries' dtype."""


class Call:
    """What a layer hands to its attention; keys and queries are not rotated."""

    __slots__ = ("key", "layer", "query", "scale", "sliding", "softcap", "value")

    def __init__(
        self,
        layer: int,
        query: Tensor,  # [B, H, n, D]
        key: Tensor,  # [B, K, n, D]
        value: Tensor,  # [B, K, n, D]
        scale: float,
        softcap: float | None,
        sliding: int | None,  # Keys this far back are invisible.
    ):
        self.layer, self.query, self.key, self.value = layer, query, key, value
        self.scale, self.softcap, self.sliding = scale, softcap, sliding


class Filled(Exception):
    """Raised by a step when nothing above the layer's keys and values is wanted."""


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    step: Step | None = None,
    **_: Any,  # What else the architectures pass along (position_ids, use_cache, …) is the step's own business.
) -> tuple[Tensor, None]:
    if step is None:
        raise FailedPrecondition("this model's attention is in use by a FotModel: call that one, or detach() it first")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = cast(int, module.layer_idx)
    output = step.attend(Call(layer, query, key, value, scale, softcap, sliding_window))
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Steps know what is padding; a [T, T] mask is never made."""


class Unrotated(nn.Module):
    """Stands in for a model's rotary module: rotation by zero, for every position."""

    def __init__(self, dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, hidden: Tensor, position_ids: Tensor | None = None, layer_type: str | None = None) -> Angles:
        shape = (1, 1, self.dims)
        return Angles(hidden.new_ones(shape), hidden.new_zeros(shape))


class Decoder:
    """A causal language model of transformers whose attention can be ours."""

    def __init__(self, base: PreTrainedModel, longest: int):
        """Look at `base` without changing it; `longest` tokens of positions decide RoPE variants that depend on length.

        Raises UnsupportedModel, saying what is missing.
        """
        self.base = base
        self.config = base.config.get_text_config(decoder=True)
        self._body = _body(base)
        self.verdicts: dict[str, bool] = {}  # What trials found while attached.
        self._rotary = self._body.rotary_emb
        self._before: str | None = None
        self._ropes = _ropes(self._rotary, self.config, longest)
        _check_rotation(base, next(iter(self._ropes.values())))
        self.layers = int(self.config.num_hidden_layers)
        self.heads = int(self.config.num_attention_heads)
        self.kv_heads = int(getattr(self.config, "num_key_value_heads", None) or self.heads)
        self.head_dim = int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads)
        types = getattr(self.config, "layer_types", None)
        self._types: list[str] = list(types) if types else ["full_attention"] * self.layers

    @property
    def body(self) -> Any:
        """The stack of layers under the head."""
        return self._body

    @property
    def trained_length(self) -> int:
        """Tokens of the longest context the model was trained on, as far as its config tells."""
        # Not `original_max_position_embeddings`: with a scaled RoPE the model was taken further than that.
        return int(self.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.base.device)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.base.dtype)

    def rope(self, layer: int) -> Rope:
        """How this layer rotates."""
        return self._ropes.get(self._types[layer]) or next(iter(self._ropes.values()))

    def sliding(self, layer: int) -> int | None:
        """How far back the layer sees by its own design, tokens; None: all the way."""
        if len(set(self._types)) > 1 or "sliding" in self._types[layer]:
            return int(self.config.sliding_window) if "sliding" in self._types[layer] else None
        width = getattr(self.config, "sliding_window", None)
        return int(width) if width and getattr(self.config, "use_sliding_window", True) else None

    @property
    def softcap(self) -> float | None:
        """The cap on attention scores (Gemma 2), if any."""
        return getattr(self.config, "attn_logit_softcapping", None)

    # --- attached or not ---

    @property
    def attached(self) -> bool:
        return self._before is not None

    def attach(self) -> None:
        """Make every layer's attention the step's. Harmless twice."""
        if self._before is None:
            # Registered here, not at import: transformers' tables are everybody's.
            AttentionInterface.register(NAME, _attend)
            AttentionMaskInterface.register(NAME, _no_mask)
            self._before = self.base.config._attn_implementation
            self.base.set_attn_implementation(NAME)
            self._body.rotary_emb = Unrotated(next(iter(self._ropes.values())).rotary_dims)

    def detach(self) -> None:
        """Put everything back as it was. Harmless twice."""
        if self._before is not None:
            self.base.set_attn_implementation(self._before)
            self._body.rotary_emb = self._rotary
            self._before = None
            self.verdicts.clear()

    @contextmanager
    def off(self) -> Iterator[PreTrainedModel]:
        """The untouched model for a while."""
        was = self.attached
        self.detach()
        try:
            yield self.base
        finally:
            if was:
                self.attach()

    # --- running ---

    def logits(self, input_ids: Tensor, step: Step, keep: int) -> Tensor:
        """Run the whole stack on [B, n] tokens: logits [B, keep or n, V] of the last `keep` (0: all)."""
        out = self.base(input_ids=input_ids, use_cache=False, logits_to_keep=keep, step=step)
        return cast(Tensor, out.logits)

    def hidden(self, input_ids: Tensor, step: Step) -> Tensor:
        """Run the layers and the last norm on [B, n] tokens: [B, n, hidden size], what `head` makes logits of."""
        return cast(Tensor, self._body(input_ids=input_ids, use_cache=False, step=step).last_hidden_state)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of any hidden states [..., hidden size]: where only some tokens matter, only theirs.

        Raises UnsupportedModel for an architecture that does more to its logits than is known here.
        """
        for scaling in _LOGIT_SCALINGS:
            if getattr(self.config, scaling, None) is not None:
                raise UnsupportedModel(f"{type(self.base).__name__} scales its logits ({scaling}): take `logits`")
        logits = cast(Tensor, cast(nn.Module, self.base.get_output_embeddings())(hidden))
        softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        return logits if softcap is None else softcap * (logits / softcap).tanh()

    def fill(self, input_ids: Tensor, step: Step) -> None:
        """Run the layers on [B, n] tokens for their keys and values only, until the step says that it has them all."""
        try:
            self._body(input_ids=input_ids, use_cache=False, step=step)
        except Filled:
            return


def _body(base: PreTrainedModel) -> Any:
    """The stack of layers under the language-model head, if it is one we can serve."""
    kind = type(base).__name__
    body = getattr(base, base.base_model_prefix, None)
    if body is None or not isinstance(getattr(body, "layers", None), nn.ModuleList):
        raise UnsupportedModel(f"{kind} has no stack of decoder layers; load a causal language model")
    if not isinstance(getattr(body, "rotary_emb", None), nn.Module):
        raise UnsupportedModel(
            f"{kind} does not use rotary positions in the usual way; a memory needs a RoPE decoder "
            "(Llama, Mistral, Qwen2, Qwen3, Gemma, Phi, …)"
        )
    if isinstance(body.rotary_emb, Unrotated):
        raise FailedPrecondition("this model already belongs to another FotModel; detach() or close() that one first")
    if not base._can_set_attn_implementation():
        raise UnsupportedModel(f"{kind} does not let its attention be replaced (no AttentionInterface)")
    return body


def _ropes(rotary: Any, config: Any, longest: int) -> dict[str, Rope]:
    """The rotation of every kind of layer, frozen: variants that change with the length take `longest`."""
    kinds = getattr(rotary, "layer_types", None)
    if kinds:
        return {
            kind: Rope(getattr(rotary, f"{kind}_inv_freq").float(), float(getattr(rotary, f"{kind}_attention_scaling")))
            for kind in kinds
        }
    if rotary.rope_type in ("dynamic", "longrope"):
        make = cast(Callable[..., tuple[Tensor, float]], ROPE_INIT_FUNCTIONS[rotary.rope_type])
        inv_freq, scaling = make(config, rotary.inv_freq.device, seq_len=longest)
        return {"full_attention": Rope(inv_freq.float(), float(scaling))}
    return {"full_attention": Rope(rotary.inv_freq.float(), float(rotary.attention_scaling))}


def _check_rotation(base: PreTrainedModel, rope: Rope) -> None:
    """Raise UnsupportedModel unless the architecture rotates the way `rotate` does."""
    theirs = getattr(sys.modules[type(base).__module__], "apply_rotary_pos_emb", None)
    if theirs is None:
        raise UnsupportedModel(f"{type(base).__name__} keeps its rotation to itself; it cannot get a memory")
    query, key = torch.randn(2, 1, 2, 3, rope.rotary_dims, generator=torch.Generator().manual_seed(0)).unbind()
    here = Rope(rope.inv_freq.cpu(), rope.scaling)
    angles = here.angles(torch.arange(3), torch.float32)
    try:
        rotated = theirs(query, key, angles.cos[None], angles.sin[None])[0]
    except (TypeError, RuntimeError, IndexError) as error:
        raise UnsupportedModel(f"{type(base).__name__} rotates in a way of its own: {error}") from error
    if rotated.shape != query.shape or not torch.allclose(rotated, rotate(query, angles), atol=1e-6):
        raise UnsupportedModel(f"{type(base).__name__} rotates pairs of channels in another order than Llama does")
