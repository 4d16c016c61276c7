"""What may be a name."""

from __future__ import annotations

import re

from memory_service.errors import InvalidArgument

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(name: str, what: str) -> None:
    """Raise InvalidArgument unless `name` is 1-63 letters, digits, '.', '_' or '-' and starts with one of the first."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"{what} must be 1-63 letters, digits, '.', '_' or '-', starting with a letter or digit")
