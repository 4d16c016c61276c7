"""The small trained models that come with the package."""

from __future__ import annotations

from pathlib import Path

from memory_service.errors import InvalidArgument

NAMES = ("reference", "lookup", "dictionary")


def path(name: str = "reference") -> Path:
    """The checkpoint's folder: configuration, weights, tokenizer, card, and the file it was trained by.

    Raises InvalidArgument for a name there is no model of.
    """
    if name not in NAMES:
        raise InvalidArgument(f"no model {name!r} comes with the package; there are {', '.join(NAMES)}")
    return Path(__file__).parent / name
