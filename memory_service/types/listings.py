"""Listings, a page at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
MAX_PAGE_SIZE = 1000


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a listing; an empty `next` means the end."""

    items: tuple[T, ...]
    next: str = ""
