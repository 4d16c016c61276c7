"""Loading a checkpoint by transformers: LongLLaMA's as a plain Llama, every other as what it says it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from model_worker.errors import UnsupportedModel
from model_worker.hf.longllama import fot_fields, fot_fields_of_config, is_longllama, llama_config, read_config
from model_worker.positions.scaling import register_cream_yarn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Checkpoint(NamedTuple):
    """A loaded model and what its configuration says of its memory, as arguments of `FotConfig`."""

    base: PreTrainedModel
    fields: dict[str, Any]


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Checkpoint:
    """The causal language model at `path`, a folder or a hub id, in evaluation mode. Runs no code of the checkpoint.

    dtype None: the one it is stored in. Raises UnsupportedModel.
    """
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    register_cream_yarn()  # Checkpoints trained with it name it in their configuration.
    config = read_config(path, revision, token)
    chosen = {"dtype": dtype or "auto", "revision": revision or "main", "token": token}
    if is_longllama(config):
        base = LlamaForCausalLM.from_pretrained(path, config=llama_config(config), **chosen)
        fields = fot_fields(config)
    else:
        try:
            base = AutoModelForCausalLM.from_pretrained(path, **chosen)
        except ValueError as error:
            raise UnsupportedModel(f"{str(path)!r} is no causal language model of transformers: {error}") from error
        fields = fot_fields_of_config(base.config)
    base.eval()
    return Checkpoint(base.to(device) if device is not None else base, fields)
