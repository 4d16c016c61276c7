"""Which model made keys and values: a name, a revision, a digest of the weights and the RoPE parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memory_service import Fingerprint
from memory_service.errors import InvalidArgument
from model_worker.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SAMPLE = 16_384  # Values of a tensor that are looked at.

# Of the last memory layer: what does not go into its keys and values. A name that is not here counts.
_AFTER_KEYS = (
    "self_attn.q_proj.",
    "self_attn.q_norm.",
    "self_attn.o_proj.",
    "self_attn.dense.",
    "mlp.",
    "post_attention_layernorm.",
    "pre_feedforward_layernorm.",
    "post_feedforward_layernorm.",
)
# RoPE types whose frequencies also depend on the configuration's length.
_BY_LENGTH = ("dynamic", "longrope", "yarn")
# Above this, bfloat16 is nowhere finer than float16, whose steps are never smaller than 2⁻²⁴.
_TINY = 2.0**-17
_GOLDEN = 2654435769  # The golden ratio's fraction of 2³²: its multiples are spread evenly.


def fingerprint(base: PreTrainedModel, mem_layers: Sequence[int], name: str, revision: str = "") -> Fingerprint:
    """The fingerprint of a model's keys and values in these layers.

    `weights` covers the embedding, every parameter of the layers before the last memory layer and, of that one, what
    its keys and values are made from; later layers, the head and the last layer's query, output and MLP do not count.
    Raises InvalidArgument without layers, UnsupportedModel for a layer the model has not or weights that are not
    loaded. Costs a few thousand values a tensor, whatever the model's size.
    """
    if not mem_layers:
        raise InvalidArgument("a fingerprint needs at least one memory layer")
    return Fingerprint(name, revision, weights_digest(base, max(mem_layers)), rope_json(base.config))


def weights_digest(base: PreTrainedModel, last_layer: int) -> str:
    """A hex digest of the weights that make the keys and values of the layers up to `last_layer`.

    Every tensor gives its name, its shape and at most `SAMPLE` values spread evenly (all of a smaller one), rounded
    to bfloat16. So the digest is the same on every device and for float32 and bfloat16 loads of a checkpoint, and
    for float16 loads of one stored in 16 bits. A float32 checkpoint loaded in float16 gets another digest: no
    function of single values but a constant agrees on x, on x rounded to float16 and on x rounded to bfloat16.

    It cannot see changes below bfloat16's precision (relative 2⁻⁹), values of at most 2⁻¹⁷, nor changes that spare
    all sampled values of a large tensor, such as a few rows of an embedding. Training moves all of them.
    """
    digest = blake2b(digest_size=16)
    for name, parameter in _parameters(base, last_layer):
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        digest.update(_sample(name, parameter).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def rope_json(config: PreTrainedConfig) -> str:
    """The RoPE parameters as canonical JSON: sorted, without what is not set, numbers as floats.

    Equal for configurations that mean the same, as `rope_theta` of old files and `rope_parameters` of new ones.
    """
    given = config.to_dict()
    parameters = _canonical(given.get("rope_parameters") or {})
    kinds = [parameters] + [one for one in parameters.values() if isinstance(one, dict)]
    if any(one.get("rope_type") in _BY_LENGTH for one in kinds):
        parameters["max_position_embeddings"] = float(given["max_position_embeddings"])
    return json.dumps(parameters, sort_keys=True, separators=(",", ":"))


def _parameters(base: PreTrainedModel, last_layer: int) -> Iterator[tuple[str, Tensor]]:
    try:
        embedding, layers = base.get_submodule("model.embed_tokens"), base.get_submodule("model.layers")
    except AttributeError as error:
        raise UnsupportedModel(
            f"{type(base).__name__} has no model.embed_tokens and model.layers, so what makes its keys is not known"
        ) from error
    depth = len(list(layers.children()))
    if not 0 <= last_layer < depth:
        raise UnsupportedModel(f"memory layer {last_layer} must be a layer of the model: 0 to {depth - 1}")
    yield from _named("embed_tokens", embedding)
    for number in range(last_layer):
        yield from _named(f"layers.{number}", layers.get_submodule(str(number)))
    for name, parameter in layers.get_submodule(str(last_layer)).named_parameters():
        if not name.startswith(_AFTER_KEYS):
            yield f"layers.{last_layer}.{name}", parameter


def _named(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((f"{prefix}.{name}", parameter) for name, parameter in module.named_parameters())


def _sample(name: str, parameter: Tensor) -> Tensor:
    if parameter.is_meta:
        raise UnsupportedModel(f"{name} is not loaded (device meta); load the whole model to give it a memory")
    values = parameter.detach().reshape(-1)
    if len(values) > SAMPLE:
        number, stretch = torch.arange(SAMPLE, device=values.device), len(values) // SAMPLE
        # One value of every stretch, each at another place in it, so that the sample meets all columns of a matrix.
        values = values[number * len(values) // SAMPLE + (number * _GOLDEN % 2**32 * stretch >> 32)]
    values = values.cpu().to(torch.bfloat16)
    # What is left out is what a float16 load of a bfloat16 checkpoint rounds; -0 becomes 0 too.
    return torch.where(values.abs() <= _TINY, torch.zeros_like(values), values)


def _canonical(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _canonical(value) if isinstance(value, Mapping) else _number(value)
        for name, value in parameters.items()
        if value is not None and name != "type"  # The old name of rope_type, which transformers sets beside it.
    }


def _number(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_number(one) for one in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
