"""Packages whose names are imported when they are asked for: torch takes seconds, which `fot --help` should not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from importlib import import_module


def finder(package: str, names: Collection[str], homes: Sequence[str]) -> Callable[[str], object]:
    """The `__getattr__` (PEP 562) of a package whose public names are in the modules `homes`, the light ones first."""

    def find(name: str) -> object:
        if name in names:
            for home in homes:
                module = import_module(home)
                if hasattr(module, name):
                    found: object = getattr(module, name)
                    setattr(import_module(package), name, found)  # The next time nobody asks.
                    return found
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
