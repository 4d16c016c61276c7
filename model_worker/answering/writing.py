"""Tokens as text while they come: whole characters only, every one once, and nothing after what ends the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # Half a character, until its other tokens come.


class Writer:
    """Turns tokens into pieces of text; together the pieces are the text of all tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._told = 0
        self._before = ""

    def add(self, ids: Sequence[int]) -> str:
        """Take the next tokens; the characters they complete, if any."""
        self._ids += ids
        return self._tell(last=False)

    def end(self) -> str:
        """What is left."""
        return self._tell(last=True)

    def _tell(self, last: bool) -> str:
        # A token's text depends on the one before it (spaces), so decode from the piece that was told last.
        now, before = self._text(self._start), self._before
        if len(now) == len(before) or (now.endswith(_BROKEN) and not last):
            return ""
        self._start, self._told = self._told, len(self._ids)
        self._before = self._text(self._start)
        return now[len(before) :]

    def _text(self, start: int) -> str:
        ids = self._ids[start:]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Stops:
    """Finds texts that end an answer, across pieces; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """What can be told now; nothing from the stop on."""
        if not self._stops:
            return piece
        text = self._held + piece
        at = min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=None)
        if at is not None:
            self.found, self._held = True, ""
            return text[:at]
        self._held = text[len(text) - self._waiting(text) :]
        return text[: len(text) - len(self._held)]

    def end(self) -> str:
        """What was held back, if no stop came."""
        held, self._held = self._held, ""
        return held

    def _waiting(self, text: str) -> int:
        """Characters at the end of the text that begin a stop; the most there are."""
        longest = min(max(map(len, self._stops)) - 1, len(text))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
