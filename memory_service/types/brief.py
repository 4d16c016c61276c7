"""A repr for what holds tensors."""

from __future__ import annotations

from dataclasses import fields


def brief(self: object) -> str:
    """A repr that tells tensors by shape and dtype: their numbers would fill the screen."""
    told = []
    for one in fields(self):  # type: ignore[arg-type]  # only dataclasses use it
        value = getattr(self, one.name)
        text = f"{list(value.shape)} {value.dtype}" if hasattr(value, "numel") else repr(value)
        told.append(f"{one.name}={text}")
    return f"{type(self).__name__}({', '.join(told)})"
