"""Whether a model, its settings and a memory fit together, and what follows from them for every layer."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from memory_service import DType, IndexPolicy, InvalidArgument, Memory, MemorySpec
from model_worker.decoder.state import State
from model_worker.decoder.steps import WindowStep
from model_worker.decoder.window import Window
from model_worker.errors import UnsupportedModel
from model_worker.hf.decoder import Decoder
from model_worker.hf.fingerprint import fingerprint
from model_worker.positions.policy import Policy
from model_worker.positions.self_extend import advice, check_reach
from model_worker.settings import Cut, FotConfig, Overflow, Recall, SelfExtend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOG = logging.getLogger(__name__)
_DEFAULT_WINDOW = 2048
# Architectures that our own tests compare with transformers, logit by logit.
_TESTED = frozenset(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"))
_TRIAL = 24  # Tokens.


def spec_of(
    base: PreTrainedModel, fot: FotConfig, name: str | None = None, index: IndexPolicy | None = None
) -> MemorySpec:
    """What a memory of this model's keys and values must be. Raises InvalidArgument without memory layers.

    `name` stands for the model in the fingerprint, by default the last part of its path or hub id.
    """
    decoder = Decoder(base, fot.window)
    _check_layers(decoder, fot)
    return spec_for(decoder, fot, name, index)


def spec_for(decoder: Decoder, fot: FotConfig, name: str | None, index: IndexPolicy | None = None) -> MemorySpec:
    base = decoder.base
    called = name or str(base.config._name_or_path or "").rstrip("/").rsplit("/", 1)[-1] or type(base).__name__
    return MemorySpec(
        fingerprint=fingerprint(base, fot.mem_layers, called),
        layers=fot.mem_layers,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        dtype=fot.mem_dtype,
        index=index or IndexPolicy(),
    )


def check_spec(have: MemorySpec, want: MemorySpec) -> None:
    """Raise WrongModel or InvalidArgument unless a memory is one of this model's."""
    # The name is for people: the same weights under another path are the same model.
    have.check_model(replace(want.fingerprint, model=have.fingerprint.model, revision=have.fingerprint.revision))
    if (have.layers, have.kv_heads, have.head_dim) != (want.layers, want.kv_heads, want.head_dim):
        raise InvalidArgument(
            f"the memory keeps layers {list(have.layers)} of {have.kv_heads} heads of {have.head_dim}; the model has "
            f"memory layers {list(want.layers)} of {want.kv_heads} heads of {want.head_dim}: open it with mem_layers="
            f"{list(have.layers)}, or use another memory"
        )


def config_of(base: PreTrainedModel, fields: dict[str, Any]) -> FotConfig:
    """FotConfig with lengths that suit the model, where nothing says otherwise."""
    trained = int(getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", _DEFAULT_WINDOW))
    fields = dict(fields)
    window = fields.setdefault("window", min(trained, _DEFAULT_WINDOW))
    fields.setdefault("last_context_length", max(1, window // 2))
    for name, kind in (("mem_dtype", DType), ("overflow", Overflow), ("cut", Cut)):
        if name in fields:
            fields[name] = kind(fields[name])
    return FotConfig(**fields)


def check_fit(decoder: Decoder, fot: FotConfig, memory: Memory | None) -> None:
    _check_layers(decoder, fot)
    if fot.mem_layers and memory is None:
        raise InvalidArgument("memory layers need a memory: give memory=':memory:', a folder or grpc://host:port")
    if memory is not None and fot.mem_layers and memory.spec.layers != fot.mem_layers:
        raise InvalidArgument(
            f"the memory keeps layers {list(memory.spec.layers)}, the model was given mem_layers="
            f"{list(fot.mem_layers)}; they must be the same"
        )
    if fot.mem_layers and decoder.softcap is not None:
        raise UnsupportedModel(
            "attention scores are capped in this architecture, which a memory cannot do for its keys"
        )
    for layer in fot.mem_layers:
        width = decoder.sliding(layer)
        if width is not None and width < max(fot.window, fot.last_context_length):
            raise InvalidArgument(
                f"layer {layer} sees only {width} tokens back, less than the window of {fot.window}: tokens would be "
                "in neither window nor memory. Choose a smaller window or a layer that sees everything"
            )
    if fot.self_extend is not None:
        _check_self_extend(decoder, fot, fot.self_extend)


def _check_layers(decoder: Decoder, fot: FotConfig) -> None:
    unknown = [layer for layer in fot.mem_layers if not 0 <= layer < decoder.layers]
    if unknown:
        raise InvalidArgument(f"mem_layers {unknown} are not layers of the model, which has 0 to {decoder.layers - 1}")


def _check_self_extend(decoder: Decoder, fot: FotConfig, extend: SelfExtend) -> None:
    if all(decoder.sliding(layer) is not None for layer in range(decoder.layers)):
        raise InvalidArgument(
            "every layer of this model slides over a part of the window, so Self-Extend changes nothing: load it with "
            "config.sliding_window = None"
        )
    if fot.mem_layers:
        longest = max(fot.window, fot.last_context_length)
        check_reach(extend, decoder.trained_length, longest)
        if (told := advice(extend, decoder.trained_length, longest)) is not None:
            _LOG.warning(told)


def policies_of(decoder: Decoder, fot: FotConfig) -> list[Policy]:
    policies = []
    for layer in range(decoder.layers):
        extend = fot.self_extend if decoder.sliding(layer) is None else None
        if extend is not None and extend.scale_base is None:
            extend = replace(extend, scale_base=decoder.trained_length)
        rotates = fot.mem_positionals or layer not in fot.mem_layers
        policies.append(Policy(decoder.rope(layer), fot, extend, rotates))
    return policies


@torch.no_grad()
def try_out(decoder: Decoder) -> None:
    """Raise UnsupportedModel unless the model with our attention, in two calls, says what it says by itself in one.

    For architectures no test of ours has seen: layers that do not rotate, attention sinks, recurrent layers and the
    like would be left out without an error. Costs three passes of a few tokens.
    """
    if decoder.config.model_type in _TESTED:
        return
    kind = type(decoder.base).__name__
    ids = (7 * torch.arange(_TRIAL, device=decoder.device) % int(decoder.config.vocab_size))[None]
    fot = FotConfig(window=_TRIAL, last_context_length=_TRIAL)
    half = _TRIAL // 2
    training = decoder.base.training
    decoder.base.eval()
    want = decoder.base(input_ids=ids, use_cache=False).logits
    parts = []
    try:
        decoder.attach()
        with State(fot, Window(policies_of(decoder, fot), decoder.device), None, Recall(), 1.0) as state:
            state.begin(1)
            for part in (ids[:, :half], ids[:, half:]):
                state.make_room(part.shape[1], [0], None)
                parts.append(decoder.logits(part, WindowStep(state.window, (), state), 0))
                state.window.advance(part.shape[1])
    except Exception as error:
        raise UnsupportedModel(f"{kind} cannot run with an attention other than its own: {error}") from error
    finally:
        decoder.detach()
        if training:
            decoder.base.train()
    off = float((torch.cat(parts, dim=1) - want).float().norm() / want.float().norm())
    if not off <= (1e-3 if decoder.dtype == torch.float32 else 0.05):
        raise UnsupportedModel(
            f"{kind} computes more than causal attention with rotary positions (its logits would be off by {off:.1%}), "
            "so it cannot get a memory"
        )
