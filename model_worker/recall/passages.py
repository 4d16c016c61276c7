"""Passages: the fixed runs of tokens in which an answer tells where its attention went, and their text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from memory_service import NotFound
from memory_service.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memory_service import Memory

PASSAGE_TOKENS = 64


class Passage(NamedTuple):
    """Consecutive tokens of a document or session."""

    first_token: int
    tokens: int

    @property
    def last_token(self) -> int:
        return self.first_token + self.tokens - 1


def check_passage_tokens(tokens: int) -> None:
    """Raise InvalidArgument unless passages of so many tokens can be told apart."""
    if tokens < 1:
        raise InvalidArgument(f"a passage must have ≥ 1 token, got {tokens}")


def passage_count(length: int, passage_tokens: int = PASSAGE_TOKENS) -> int:
    """How many passages a text of `length` tokens has; the last may be short."""
    return -(-length // passage_tokens)


def passage_at(number: int, length: int, passage_tokens: int = PASSAGE_TOKENS) -> Passage:
    """Passage `number`, from 0, of a text of `length` tokens."""
    first = number * passage_tokens
    return Passage(first, max(0, min(passage_tokens, length - first)))


def passage_text(memory: Memory, tokenizer: PreTrainedTokenizerBase, document: str, passage: Passage) -> str | None:
    """What a document says there; None if it was stored without token ids or has been deleted since.

    Costs one fetch of the passage's keys and values in one layer.
    """
    if not passage.tokens:
        return None
    try:
        found = memory.fetch(document, memory.spec.layers[0], passage.first_token, passage.tokens)
    except NotFound:
        return None
    # A document stored without token ids holds zeros.
    return text_of(tokenizer, found.token_ids.tolist()) if found.token_ids.any() else None


def text_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of token ids, without the tokens that only steer the model."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
