"""What a training leaves behind: a plain Hugging Face checkpoint that also says what its memory is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from model_worker.hf.longllama import FIELD, fot_json
from model_worker.settings import FotConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)


@contextmanager
def export(
    place: Path,
    base: PreTrainedModel,
    fot: FotConfig,
    tokenizer: Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Iterator[Path]:
    """Save `base` (or these weights of it) aside, yield that folder for what else belongs in it, put it at `place`.

    The folder loads in LlamaForCausalLM, and in `FotModel.from_pretrained` without further arguments. One that was at
    `place` is replaced; who has its files open keeps them.
    """
    aside, before = (place.with_name(f".{place.name}.{what}") for what in ("partial", "before"))
    for left_over in (aside, before):
        shutil.rmtree(left_over, ignore_errors=True)
    aside.mkdir(parents=True)
    setattr(base.config, FIELD, fot_json(fot))
    told: dict[str, Any] = {} if weights is None else {"state_dict": dict(weights)}
    with _no_bar():
        base.save_pretrained(aside, **told)
    if tokenizer is not None:
        save_tokenizer(tokenizer, aside)
    yield aside
    for file in aside.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone.
    if place.exists():
        place.rename(before)
    aside.rename(place)
    shutil.rmtree(before, ignore_errors=True)


def save_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files; a tokenizer.json that stands alone gets the file that AutoTokenizer asks for."""
    home = source if source.is_dir() else source.parent
    for name in _TOKENIZER_FILES:
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)
    if source.is_file():
        shutil.copyfile(source, folder / "tokenizer.json")
    if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        from transformers import PreTrainedTokenizerFast

        PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(folder)


@contextmanager
def _no_bar() -> Iterator[None]:
    """transformers would draw a progress bar into ours."""
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()
