"""LongLLaMA checkpoints as transformers' own Llama, and FoT's fields in the configuration of any checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_service import DType
from model_worker.errors import UnsupportedModel
from model_worker.settings import Cut, FotConfig, LogitScaling, MemoryPosition, Overflow, SelfExtend

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig

MODEL_TYPE = "longllama"
FIELD = "fot"  # Where a configuration of another model type keeps FoT's fields.

# What a LongLLaMA config.json may leave out, by the authors' LongLlamaConfig.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_OPTIONAL = ("num_key_value_heads", "rope_parameters", "dtype", "torch_dtype")
_LAST_CONTEXT_LENGTH = 1024
_DTYPES = {
    "bfloat16": DType.BF16,
    "float16": DType.F16,
    "half": DType.F16,
    "float32": DType.F32,
    "float": DType.F32,
    **{str(one): one for one in DType},
}
# Not kept in a configuration: results do not depend on it.
_LEFT_OUT = ("block_tokens",)


def read_config(path: str | Path, revision: str | None = None, token: str | None = None) -> dict[str, Any]:
    """A checkpoint's config.json, from a folder, transformers' cache or the hub; runs none of the checkpoint's code.

    Raises UnsupportedModel if there is no such checkpoint.
    """
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(path, revision=revision, token=token)
    except OSError as error:
        raise UnsupportedModel(f"no checkpoint can be read at {str(path)!r}: {error}") from error
    if not config:
        raise UnsupportedModel(f"no config.json at {str(path)!r}; give the folder of a checkpoint or its hub id")
    return dict(config)


def is_longllama(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is LongLLaMA's."""
    return config.get("model_type") == MODEL_TYPE


def llama_config(config: Mapping[str, Any]) -> LlamaConfig:
    """A LongLLaMA config.json as transformers' LlamaConfig, with FoT's fields in `fot`.

    `LlamaForCausalLM.from_pretrained(path, config=llama_config(...))` loads the checkpoint: parameters have the same
    names, and the `rotary_emb.inv_freq` buffers of old checkpoints are skipped by transformers.
    Raises UnsupportedModel for another model type or for fields that make no sense.
    """
    from transformers import LlamaConfig

    fields = FotConfig(**fot_fields(config))
    given: dict[str, Any] = {name: config.get(name, default) for name, default in _DEFAULTS.items()}
    given |= {name: config[name] for name in _OPTIONAL if config.get(name) is not None}
    # The authors have a key/value head for every query head, and files from before LLaMA 2 do not say so.
    given.setdefault("num_key_value_heads", given["num_attention_heads"])
    given.setdefault("rope_parameters", _rope_parameters(config))
    given |= {"architectures": ["LlamaForCausalLM"], FIELD: fot_json(fields)}
    return LlamaConfig(**given)


def fot_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a LongLLaMA config.json says of the memory, as arguments of `FotConfig`.

    Windows overflow and batches are cut as the authors' code does. `mem_attention_grouping` and `torch_attention` are
    left out: they choose among equal computations. Raises UnsupportedModel.
    """
    if not is_longllama(config):
        raise UnsupportedModel(
            f"a configuration of model_type {config.get('model_type')!r} is not LongLLaMA's ({MODEL_TYPE!r})"
        )
    layers = tuple(sorted(set(config.get("mem_layers", ()))))
    depth = config.get("num_hidden_layers", _DEFAULTS["num_hidden_layers"])
    if any(not 0 <= layer < depth for layer in layers):
        raise UnsupportedModel(f"mem_layers {list(layers)} must be layers of the model: 0 to {depth - 1}")
    return {
        "mem_layers": layers,
        "window": config.get("max_position_embeddings", _DEFAULTS["max_position_embeddings"]),
        "last_context_length": config.get("last_context_length", _LAST_CONTEXT_LENGTH),
        "mem_positionals": config.get("mem_positionals", True),
        "mem_dtype": _dtype(config.get("mem_dtype", "bfloat16")),
        "overflow": Overflow.FLUSH,
        "cut": Cut.BATCH,
    }


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    parameters = dict(config.get("rope_scaling") or {})
    parameters.setdefault("rope_theta", float(config.get("rope_theta", 10_000.0)))
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    return parameters


def _dtype(word: str) -> DType:
    try:
        return _DTYPES[str(word).removeprefix("torch.")]
    except KeyError:
        raise UnsupportedModel(f"mem_dtype {word!r} is unknown; a memory keeps bfloat16, float16 or float32") from None


# --- FoT's fields in any configuration ------------------------------------------------------------------------------


def fot_json(fot: FotConfig) -> dict[str, Any]:
    """The fields of `FotConfig` as JSON values, to be kept as `config.fot` when a checkpoint is saved."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(fot).items()
        if name not in _LEFT_OUT
    }


def fot_fields_of_config(config: PreTrainedConfig) -> dict[str, Any]:
    """What `fot_json` left in a configuration, as arguments of `FotConfig`; empty if there is nothing.

    Raises UnsupportedModel if the fields were not written by this version or an older one.
    """
    kept = config.to_dict().get(FIELD)
    if kept is None:
        return {}
    if not isinstance(kept, Mapping):
        raise UnsupportedModel(f"config.{FIELD} must be an object of FotConfig's fields, got {kept!r}")
    if unknown := sorted(set(kept) - set(fot_json(FotConfig()))):
        raise UnsupportedModel(f"config.{FIELD} has fields this version does not know: {unknown}; it may be newer")
    try:
        return {name: _read(name, value) for name, value in kept.items()}
    except (TypeError, ValueError) as error:
        raise UnsupportedModel(f"config.{FIELD} cannot be read: {error}") from error


def _read(name: str, value: Any) -> Any:
    match name:
        case "mem_layers":
            return tuple(value)
        case "memory_position":
            return MemoryPosition(value)
        case "mem_dtype":
            return DType(value)
        case "overflow":
            return Overflow(value)
        case "cut":
            return Cut(value)
        case "self_extend" if value is not None:
            return SelfExtend(**{**value, "logit_scaling": LogitScaling(value.get("logit_scaling", LogitScaling.NONE))})
    return value
