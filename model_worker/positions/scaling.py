"""RoPE interpolation: a model trained on N positions reads F·N, by the same rule at training and at inference.

The rule is a matter of the Hugging Face config alone, so models, checkpoints and servers need nothing of ours; only
CREAM's own YaRN is no rule of transformers and must be registered before a model with it is made or loaded.
R rotary dims.
"""

from __future__ import annotations

import copy
import math
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from memory_service.errors import InvalidArgument
from model_worker.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Config = TypeVar("Config", bound="PreTrainedConfig")

BETA_FAST, BETA_SLOW = 32, 1  # YaRN: channels that turn more often than this over N positions stay; less often, divide.


class Scaling(StrEnum):
    """A rule of interpolation."""

    NONE = "none"  # Extrapolation: only the config's length grows.
    LINEAR = "linear"  # Position interpolation: positions / F.
    NTK = "ntk"  # Static NTK: the base grows, fast channels hardly change.
    YARN = "yarn"  # NTK by parts, as in YaRN and in transformers: blends frequencies.
    CREAM_YARN = "cream_yarn"  # As CREAM's authors trained: blends divisors, so middle channels turn faster.


class Frequencies(NamedTuple):
    """How fast channels turn."""

    inv_freq: Tensor  # [R/2] float32, as models hold them
    magnitude: float  # Multiplies cos and sin.


def frequencies(kind: Scaling, dims: int, base: float, factor: float, original_max_positions: int) -> Frequencies:
    """How fast `dims` rotary channels turn; N (`original_max_positions`) matters to the two YaRNs only."""
    if kind is Scaling.NTK:
        base = ntk_base(dims, base, factor)
    # In float32 and in this order, so that models, tables and the authors' code hold the same bits: a difference in the
    # last one is 2e-3 radians at position 32K.
    plain = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
    match kind:
        case Scaling.NONE | Scaling.NTK:
            return Frequencies(plain, 1.0)
        case Scaling.LINEAR:
            return Frequencies(plain / factor, 1.0)
    kept = 1 - _ramp(dims, base, original_max_positions)
    if kind is Scaling.YARN:
        return Frequencies(plain / factor * (1 - kept) + plain * kept, _magnitude(factor))
    return Frequencies(plain / ((1 - kept) * factor + kept), _magnitude(factor))


def ntk_base(dims: int, base: float, factor: float) -> float:
    """The base whose slowest channel turns F times slower and whose fastest turns as before."""
    return float(base * factor ** (dims / (dims - 2)))


def angle_tables(positions: Tensor, rule: Frequencies) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., R] in float32, of angles computed in float64.

    transformers computes angles in float32, which is off by up to 5e-4 at 32K positions and 9e-3 at 256K.
    """
    half = positions[..., None].double() * rule.inv_freq.double()
    cos, sin = rule.magnitude * half.cos(), rule.magnitude * half.sin()
    return torch.cat((cos, cos), -1).float(), torch.cat((sin, sin), -1).float()


def scaled_config(
    config: Config, kind: Scaling | str, factor: float, original_max_positions: int | None = None
) -> Config:
    """A copy of a Hugging Face config whose model reads F times as many positions; `config` stays as it is.

    original_max_positions (N): what the model was trained on, None for the config's max_position_embeddings. Where
    layer types have rules of their own (Gemma 3), only full attention is scaled: a sliding window never reaches far.
    CREAM_YARN registers itself. Raises UnsupportedModel if there is nothing to scale, if it is scaled already, or if
    the architecture has other rules only (Phi-3).
    """
    try:
        kind = Scaling(kind)
    except ValueError:
        raise InvalidArgument(f"no scaling {str(kind)!r}; choose from {', '.join(Scaling)}") from None
    if not 1 <= factor < math.inf:
        raise InvalidArgument(f"factor must be a number of at least 1, got {factor}")
    scaled = copy.deepcopy(config)
    text: Any = scaled.get_text_config(decoder=True)
    fields = text.to_dict()
    rules = fields.get("rope_parameters")
    if not rules:
        raise UnsupportedModel(f"a {text.model_type} model has no rotary positions to scale")
    original = int(fields["max_position_embeddings"] if original_max_positions is None else original_max_positions)
    if original < 1:
        raise InvalidArgument(f"original_max_positions must be at least 1, got {original}")
    if kind is Scaling.CREAM_YARN:
        register_cream_yarn()
    if "full_attention" in rules:
        rules = {**rules, "full_attention": _scaled_rule(text, rules["full_attention"], kind, factor, original)}
    else:
        rules = _scaled_rule(text, rules, kind, factor, original)
    if "original_max_position_embeddings" in fields:
        text.original_max_position_embeddings = original  # Where a config has it, this one is believed.
    text.rope_parameters = rules
    text.max_position_embeddings = round(factor * original)
    text.standardize_rope_params()
    try:
        text.validate_rope()
    except ValueError as error:
        raise UnsupportedModel(f"transformers does not scale {text.model_type} models by {kind}: {error}") from error
    return scaled


def register_cream_yarn() -> None:
    """Teach transformers rope_type "cream_yarn"; needed before a checkpoint that has it is loaded. Harmless twice."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RotaryEmbeddingConfigMixin

    ROPE_INIT_FUNCTIONS[Scaling.CREAM_YARN.value] = _cream_yarn_parameters
    # Its parameters are YaRN's. Without a check under this name every config logs a warning.
    mixin: Any = RotaryEmbeddingConfigMixin
    mixin._validate_cream_yarn_rope_parameters = mixin._validate_yarn_rope_parameters


def _scaled_rule(text: Any, rule: dict[str, Any], kind: Scaling, factor: float, original: int) -> dict[str, Any]:
    if rule["rope_type"] != "default":
        raise UnsupportedModel(
            f"this {text.model_type} config is scaled already (rope_type {rule['rope_type']!r}); scale the config of "
            "the model as it was pretrained"
        )
    match kind:
        case Scaling.NONE:
            return dict(rule)
        case Scaling.NTK:
            return {**rule, "rope_theta": ntk_base(_rotary_dims(text, rule), rule["rope_theta"], factor)}
        case Scaling.LINEAR:
            return {**rule, "rope_type": "linear", "factor": float(factor)}
    name = kind.value
    return {**rule, "rope_type": name, "factor": float(factor), "original_max_position_embeddings": original}


def _cream_yarn_parameters(
    config: Any, device: torch.device | None = None, seq_len: int | None = None, layer_type: str | None = None
) -> tuple[Tensor, float]:
    """What transformers asks of a rope type: inverse frequencies [R/2] float32 and the factor of cos and sin."""
    config.standardize_rope_params()
    rule = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    inv_freq, magnitude = frequencies(
        Scaling.CREAM_YARN,
        _rotary_dims(config, rule),
        rule["rope_theta"],
        rule["factor"],
        rule["original_max_position_embeddings"],
    )
    return inv_freq.to(device), magnitude


def _rotary_dims(config: Any, rule: dict[str, Any]) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * rule.get("partial_rotary_factor", 1.0))


def _ramp(dims: int, base: float, original: int) -> Tensor:
    """0 for channels that turn often over N positions, 1 for those that hardly turn, [R/2]."""

    def channel(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(channel(BETA_FAST)), 0), min(math.ceil(channel(BETA_SLOW)), dims - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(dims // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def _magnitude(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0
