"""The environment variables that `fot` reads; a misspelt one is refused rather than ignored."""

from __future__ import annotations

import os
from dataclasses import fields
from difflib import get_close_matches

from memory_service.errors import InvalidArgument
from memory_service.settings import ServerSettings, StoreOptions

PREFIX = "FOT_"
OF_THE_CLIENT = ("FOT_TARGET", "FOT_TOKEN", "FOT_TOKEN_FILE", "FOT_CA", "FOT_DEBUG")


def variable(setting: str) -> str:
    """The environment variable of a setting, as in store.device."""
    return PREFIX + setting.replace(".", "__").upper()


def known_variables() -> list[str]:
    """All names that mean something."""
    own = [variable(name) for name in ServerSettings.model_fields if name != "store"]
    return sorted([*OF_THE_CLIENT, *own, *(variable(f"store.{field.name}") for field in fields(StoreOptions))])


def check_environment() -> None:
    """Raise InvalidArgument if a FOT_ variable is set that nobody reads."""
    known = known_variables()
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name.upper() not in known:
            near = get_close_matches(name, known, 1)
            guess = f"; is it {near[0]}?" if near else ""
            raise InvalidArgument(f"the environment variable {name} means nothing to fot{guess}")
