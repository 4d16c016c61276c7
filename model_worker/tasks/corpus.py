"""Real text and code that any machine with Python has: its library, its documentation, and licences."""

from __future__ import annotations

import importlib
import os
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from memory_service.errors import FailedPrecondition
from model_worker.tasks.tokens import Tokenizer

# Tests repeat themselves, encodings are tables, installed packages differ between machines.
SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
LICENCES = Path("/usr/share/common-licenses")
HELD_OUT = 16  # One file in so many is kept from training.
SHORTEST = 400  # Characters; shorter files are stubs.


class Kind(StrEnum):
    """What a text is written in."""

    CODE = "code"
    PROSE = "prose"


class Split(StrEnum):
    """What a text may be used for."""

    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True, slots=True)
class Text:
    """One file, topic or licence."""

    name: str
    kind: Kind
    text: str = field(repr=False)

    @property
    def split(self) -> Split:
        """By the name alone, so that a file stays on its side whatever else is found."""
        held_out = sha256(self.name.encode()).digest()[0] % HELD_OUT == 0
        return Split.HELD_OUT if held_out else Split.TRAIN


def texts(split: Split | None = None, kind: Kind | None = None) -> list[Text]:
    """What this machine has, in the order of the names. Raises FailedPrecondition if there is nothing."""
    found = [*_library(), *_topics(), *_licences()]
    if not found:
        raise FailedPrecondition(
            f"no source files in {sysconfig.get_path('stdlib')}: is this Python without its library?"
        )
    chosen = (one for one in found if split in (None, one.split) and kind in (None, one.kind))
    return sorted((one for one in chosen if len(one.text) >= SHORTEST), key=lambda one: one.name)


def token_ids(found: Sequence[Text], tokenizer: Tokenizer, cache: Path | None = None) -> NDArray[np.int32]:
    """The texts' token ids one after the other, each closed by the tokenizer's end of text. [T]

    Tokenising takes seconds; the ids are kept in `cache` (default: fot below the user's cache folder) under a name
    made of texts and tokenizer, and read from there the next time.
    """
    digest = sha256(tokenizer.name.encode())
    for one in found:
        digest.update(one.name.encode() + b"\0" + one.text.encode("utf-8", "replace") + b"\0")
    folder = cache or _cache()
    file = folder / f"tokens-{digest.hexdigest()[:20]}.safetensors"
    try:
        kept: NDArray[np.int32] = load_file(file)["ids"]
        return kept
    except (OSError, SafetensorError):
        pass  # Not there, or not whole: made again.
    end = [] if tokenizer.end is None else [tokenizer.end]
    encoded = tokenizer.encode_many([one.text for one in found])
    ids = np.concatenate([np.array([*one, *end], dtype=np.int32) for one in encoded] or [np.empty(0, np.int32)])
    _keep(file, ids)
    return ids


def _keep(file: Path, ids: NDArray[np.int32]) -> None:
    """Write aside and rename, so that another process never reads half a file. No room for a cache is no error."""
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ids": ids}, aside)
        aside.replace(file)
    except (OSError, SafetensorError):
        with suppress(OSError):
            aside.unlink()


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fot"


def _library() -> list[Text]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not SKIPPED.intersection(name.parts[:-1]):
            found.append(_read(path, f"library/{name.as_posix()}", Kind.CODE))
    return [one for one in found if one is not None]


def _topics() -> list[Text]:
    """The language reference as `help()` shows it."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return []
    return [Text(f"topics/{name}", Kind.PROSE, text) for name, text in topics.items()]


def _licences() -> list[Text]:
    files = [path for path in sorted(LICENCES.glob("*")) if path.is_file() and not path.is_symlink()]
    python = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    found = [_read(path, f"licences/{path.name}", Kind.PROSE) for path in files]
    found.append(_read(python, "licences/Python", Kind.PROSE))
    return [one for one in found if one is not None]


def _read(path: Path, name: str, kind: Kind) -> Text | None:
    try:
        return Text(name, kind, path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
