"""Text to token ids for storing: the whole text, and a text's own "</s>" stays text."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import TYPE_CHECKING

from memory_service.errors import InvalidArgument
from model_worker.corpus.source import Source

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def token_ids(source: Source, tokenizer: PreTrainedTokenizerBase | None, special_tokens: bool = True) -> Tensor:
    """Token ids [T] int64 of a document, those it brings or those of its text; T may be 0.

    `special_tokens`: with what the tokenizer puts around a text, such as a first <s>; an empty text is then at least
    the token that begins or ends texts, so that an empty file is a document like any other.
    Raises InvalidArgument if a text comes and no tokenizer is there, or for token ids that the tokenizer does not have.
    """
    import torch  # fot --help does not wait for it.

    if source.token_ids is not None:
        ids = torch.tensor(source.token_ids, dtype=torch.int64)
        if tokenizer is not None and ids.numel() and int(ids.max()) >= len(tokenizer):
            raise InvalidArgument(
                f"document {source.id} has token {int(ids.max())}, the tokenizer has {len(tokenizer)}: "
                "it was made with another one"
            )
        return ids
    if tokenizer is None:
        raise InvalidArgument(f"document {source.id} is text, and text needs a tokenizer")
    # Long texts are what this is for, so no warning about them. What reads like a special token in somebody's text
    # must not end it.
    found = tokenizer(
        source.text or "",
        add_special_tokens=special_tokens,
        split_special_tokens=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    whole = found["input_ids"]
    if not whole and special_tokens:
        whole = [one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None][:1]
    return torch.tensor(whole, dtype=torch.int64)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Sixteen hex digits that change with the token ids a tokenizer gives; "" for none."""
    if tokenizer is None:
        return ""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # How the last call padded and cut.
        told = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
    else:
        told = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
