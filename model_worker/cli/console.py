"""What the worker's commands print: sentences for people, JSON for machines; standard error is for progress."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape


def say(sentence: str) -> None:
    """One line that reports what was done, on standard output."""
    Console(soft_wrap=True, highlight=False).print(escape(sentence))


def print_json(value: Any) -> None:
    """One JSON document on standard output; dataclasses become objects."""
    json.dump(value, sys.stdout, default=_plain, ensure_ascii=False, indent=2)
    sys.stdout.write("\n")


def counted(number: int, noun: str) -> str:
    """1 document, 2 documents."""
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
