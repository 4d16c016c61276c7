"""Listings in pages: a token is the name of the last item seen, so that a page is right whatever changed between."""

from __future__ import annotations

from memory_service.errors import InvalidArgument
from memory_service.types.listings import MAX_PAGE_SIZE


def page_size(size: int) -> int:
    """How many items a page holds: what was asked for, 100 if nothing was, never more than MAX_PAGE_SIZE."""
    if size < 0:
        raise InvalidArgument(f"page_size must be ≥ 0, got {size}")
    return min(size or 100, MAX_PAGE_SIZE)


def page_of(names: list[str], size: int, token: str) -> tuple[list[str], str]:
    """The sorted names behind `token`, and the token of the next page (empty at the end)."""
    rest = [name for name in names if name > token] if token else names
    chosen = rest[: page_size(size)]
    return chosen, chosen[-1] if len(rest) > len(chosen) else ""
