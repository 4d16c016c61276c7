"""What tasks ask of a tokenizer: texts to ids and back, and which part of a text each token belongs to."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from memory_service.errors import InvalidArgument

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer
    from transformers import PreTrainedTokenizerBase

BEGIN_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>")
END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")


class Tokenizer(Protocol):
    """Texts to token ids and back; nothing is put around a text."""

    @property
    def size(self) -> int:
        """Tokens in the vocabulary."""

    @property
    def begin(self) -> int | None:
        """The token that begins a document, if there is one."""

    @property
    def end(self) -> int | None:
        """The token that ends a document, if there is one."""

    @property
    def name(self) -> str:
        """Changes with the ids it gives, so that what was tokenised can be kept under it."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; on all cores where it can."""

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Token ids of the parts joined, and for every token the index of the part it ends in."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""


class FastTokens:
    """A tokenizer of the tokenizers library, whatever put it around texts left out."""

    def __init__(self, tokenizer: FastTokenizer):
        self._tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()
        self.begin = _first(tokenizer, BEGIN_TOKENS)
        self.end = _first(tokenizer, END_TOKENS)

    @property
    def name(self) -> str:
        """The rules themselves, as JSON."""
        return self._tokenizer.to_str()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores."""
        return [one.ids for one in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Token ids of the parts joined, and for every token the index of the part it ends in."""
        encoding = self._tokenizer.encode("".join(parts), add_special_tokens=False)
        starts = list(accumulate((len(part) for part in parts[:-1]), initial=0))
        # " 123" belongs to the number, the space being only its begin; SentencePiece has tokens of no width.
        return encoding.ids, [bisect_right(starts, max(begin, end - 1)) - 1 for begin, end in encoding.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def tokens_of(tokenizer: str | Path | FastTokenizer | PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer of a folder, of a tokenizer.json, or one that is loaded already.

    Raises InvalidArgument for a folder without tokenizer.json and for a tokenizer that is not a fast one.
    """
    from tokenizers import Tokenizer as FastTokenizer

    if isinstance(tokenizer, str | Path):
        path = Path(tokenizer)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise InvalidArgument(f"there is no tokenizer at {file}: give a folder that holds tokenizer.json")
        try:
            # Copied, because truncation and padding are set on the object and belong to whoever loaded it.
            return FastTokens(_plain(FastTokenizer.from_file(str(file))))
        except Exception as error:  # The library raises nothing narrower.
            raise InvalidArgument(f"{file} is not a tokenizer that the tokenizers library reads: {error}") from error
    if isinstance(tokenizer, FastTokenizer):
        return FastTokens(_plain(FastTokenizer.from_str(tokenizer.to_str())))
    if not tokenizer.is_fast:
        raise InvalidArgument(f"{type(tokenizer).__name__} is not a fast tokenizer: save it with its tokenizer.json")
    return FastTokens(_plain(FastTokenizer.from_str(tokenizer.backend_tokenizer.to_str())))


def _plain(tokenizer: FastTokenizer) -> FastTokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _first(tokenizer: FastTokenizer, tokens: Sequence[str]) -> int | None:
    found = (tokenizer.token_to_id(token) for token in tokens)
    return next((one for one in found if one is not None), None)
