"""Which files a corpus has, in a fixed order, and how each is to be read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from memory_service.errors import InvalidArgument, NotFound
from model_worker.corpus.source import Note, NoteTaker, readable


class Format(StrEnum):
    """How a file becomes documents."""

    AUTO = "auto"  # By its suffix; a file whose suffix says nothing is text if its bytes are.
    TEXT = "text"
    MARKDOWN = "markdown"
    CODE = "code"
    JSONL = "jsonl"
    PARQUET = "parquet"
    DATASET = "dataset"  # A directory written by `datasets`' save_to_disk.


ROW_SUFFIXES = {
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".jsonl.gz": Format.JSONL,
    ".ndjson.gz": Format.JSONL,
    ".parquet": Format.PARQUET,
}


@dataclass(frozen=True, slots=True)
class Found:
    """A file, or a dataset's directory."""

    path: Path
    name: str  # Relative to the root, with "/"; the document's id, or the start of its rows' ids.
    root: str  # The name of the directory that holds all that the caller named.
    format: Format
    size: int  # Bytes.
    asked: bool  # The caller chose the format; AUTO may turn a file down.


@dataclass(frozen=True, slots=True)
class Choice:
    """Which files are taken, and as what; of a directory those that match an `include`, if any, and no `exclude`.

    A pattern without "/" is matched with the file's name, else with its path from the root; "*" matches "/" too.
    """

    format: Format = Format.AUTO
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def takes(self, name: str) -> bool:
        """Whether a file of this relative path is wanted."""
        return (not self.include or _matches(name, self.include)) and not _matches(name, self.exclude)


class Place(NamedTuple):
    """A path the caller named, and its name from the root; the root's own is ""."""

    path: Path
    name: str

    def holds(self, name: str) -> bool:
        """Whether a file of this name is it or is inside."""
        return not self.name or name == self.name or name.startswith(f"{self.name}/")


def places(paths: Sequence[Path]) -> tuple[str, list[Place]]:
    """The root's name, and where each path stands in it.

    The root is the deepest directory that holds all paths; for one directory it is that directory. So a directory and
    the list of all its files, as a shell makes it of a pattern, are the same corpus. Raises NotFound.
    """
    for path in paths:
        if not path.exists():
            glob = "; name the directory and give a pattern as include" if set("*?[") & set(str(path)) else ""
            raise NotFound(f"there is no file or directory {path}{glob}")
    whole = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 - links keep the names they were given
    anchors = [path if path.is_dir() and not is_dataset(path) else path.parent for path in whole]
    root = Path(os.path.commonpath(anchors)) if anchors else Path()
    names = ["" if path == root else readable(path.relative_to(root).as_posix()) for path in whole]
    return readable(root.name), [Place(path, name) for path, name in zip(paths, names, strict=True)]


def find(paths: Sequence[Path], choice: Choice, note: NoteTaker) -> Iterator[Found]:
    """Files of `paths` in the order of the paths, each directory sorted; hidden ones and links to directories left out.

    Raises NotFound for a path that is not there, InvalidArgument if it cannot be read as `choice` asks.
    """
    root, named = places(paths)
    for path, name in named:
        if not path.is_dir():
            yield _found(path, name, root, choice.format)
        elif is_dataset(path):
            if choice.format not in (Format.AUTO, Format.DATASET):
                raise InvalidArgument(f"{path} holds a dataset; read it as auto or dataset, not as {choice.format}")
            yield Found(path, name, root, Format.DATASET, _bytes_in(path), asked=True)
        elif choice.format is Format.DATASET:
            raise InvalidArgument(f"{path} holds no dataset that save_to_disk wrote; name its directory")
        else:
            yield from _inside(path, name and f"{name}/", root, choice, note)


def is_dataset(directory: Path) -> bool:
    """Whether `datasets` saved it."""
    return (directory / "dataset_dict.json").is_file() or (
        (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()
    )


def _inside(directory: Path, prefix: str, root: str, choice: Choice, note: NoteTaker) -> Iterator[Found]:
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        note(Note(prefix or root, f"cannot be read: {error.strerror}", unread=True))
        return
    for entry in entries:
        name, path = prefix + readable(entry.name), Path(entry.path)
        if entry.name.startswith("."):
            note(Note(name, "is hidden"))
        elif entry.is_dir(follow_symlinks=False):
            if is_dataset(path):
                if choice.takes(name):
                    yield Found(path, name, root, Format.DATASET, _bytes_in(path), asked=True)
            else:
                yield from _inside(path, f"{name}/", root, choice, note)
        elif not entry.is_file():
            # A link to a directory may lead in a circle; sockets and pipes have no end.
            note(Note(name, "is a link to a directory" if entry.is_dir() else "is no file"))
        elif choice.takes(name):
            yield _found(path, name, root, choice.format)


def _found(path: Path, name: str, root: str, wanted: Format) -> Found:
    asked = wanted is not Format.AUTO
    return Found(path, name, root, wanted if asked else _format_of(path), path.stat().st_size, asked)


def _format_of(path: Path) -> Format:
    name = path.name.lower()
    for suffix, found in ROW_SUFFIXES.items():
        if name.endswith(suffix):
            return found
    return Format.MARKDOWN if name.endswith((".md", ".markdown")) else Format.AUTO


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    last = name.rpartition("/")[2]
    # The slash lets "**/*.py" match a file at the top.
    return any(
        fnmatchcase(f"/{name}", f"/{one}") or fnmatchcase(f"/{name}", one) if "/" in one else fnmatchcase(last, one)
        for one in patterns
    )


def _bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
