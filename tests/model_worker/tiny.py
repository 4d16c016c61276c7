"""Tiny random models and a byte tokenizer, made on the spot: every test of the worker can have a real model.

Token 0 begins a text, 1 ends it, 2 pads, 3 is unknown; byte b is token b + 4.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
VOCABULARY = 256 + len(SPECIAL)
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi")  # Those the worker promises, at least.
FURTHER = ("gemma2", "gemma3", "phi3")  # Softcap, window and full layers in turn, a fused projection.

_SHARED: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "attn_implementation": "sdpa",
}
_KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma": (GemmaConfig, {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
    "phi": (PhiConfig, {"partial_rotary_factor": 0.5}),
    "gemma2": (
        Gemma2Config,
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "tie_word_embeddings": True,
            "attn_implementation": "eager",  # The only one that knows softcapping everywhere.
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": (Phi3Config, {"num_key_value_heads": 2, "sliding_window": None}),
}


def tiny_config(architecture: str, **overrides: object) -> PreTrainedConfig:
    """Four layers, hidden size 32, two query heads a key/value head where the architecture can."""
    kind, own = _KINDS[architecture]
    return kind(**{**_SHARED, **own, **overrides})


def tiny_model(architecture: str = "llama", *, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random float32 model in eval mode, the same for the same seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, **overrides), dtype=torch.float32)
        # Projections as initialised are so small that attention is flat and its tests see nothing.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("embed" not in name or model.config.tie_word_embeddings):
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; begins every text with <s>, loses nothing."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    vocabulary |= {letter: number + len(SPECIAL) for number, letter in enumerate(_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _letters() -> list[str]:
    """What stands for byte 0 to 255: printable Latin-1 for itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def save_tiny(directory: Path, architecture: str = "llama", *, seed: int = 0, **overrides: object) -> Path:
    """A checkpoint as from_pretrained reads it: config.json, model.safetensors, tokenizer.json; returns `directory`."""
    tiny_model(architecture, seed=seed, **overrides).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def save_tiny_llama(directory: Path, **overrides: object) -> Path:
    """`save_tiny` of a Llama."""
    return save_tiny(directory, "llama", **overrides)
