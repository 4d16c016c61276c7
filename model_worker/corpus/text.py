"""Text, Markdown and source code: a file is a document.

Bytes are text in the encoding that a byte-order mark or, in Python, a coding line tells (PEP 263), else in UTF-8. What
is not valid there becomes U+FFFD, or the file is left out, or it is an error: `BadBytes`. Line ends stay as they are.
"""

from __future__ import annotations

import codecs
import io
import tokenize
from collections.abc import Iterator
from enum import StrEnum

from memory_service.errors import InvalidArgument
from model_worker.corpus.files import Format, Found
from model_worker.corpus.source import Note, NoteTaker, Source, fitting

LOOK_AT = 1 << 16  # Bytes that decide whether a file is text.
MOSTLY = 0.1  # A file of which more than this is undecodable was never text.

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # Begins like the next one.
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF32_BE: "utf-32",
}
LANGUAGES = {
    "bash": "shell", "c": "c", "cc": "c++", "cpp": "c++", "cs": "c#", "css": "css", "cu": "cuda", "cxx": "c++",
    "go": "go", "h": "c", "hpp": "c++", "hs": "haskell", "htm": "html", "html": "html", "java": "java",
    "jl": "julia", "js": "javascript", "json": "json", "jsx": "javascript", "kt": "kotlin", "lua": "lua",
    "m": "objective-c", "markdown": "markdown", "md": "markdown", "ml": "ocaml", "php": "php", "pl": "perl",
    "proto": "protobuf", "py": "python", "pyi": "python", "pyw": "python", "r": "r", "rb": "ruby", "rs": "rust",
    "rst": "restructuredtext", "scala": "scala", "sh": "shell", "sql": "sql", "swift": "swift", "tex": "tex",
    "toml": "toml", "ts": "typescript", "tsx": "typescript", "txt": "text", "xml": "xml", "yaml": "yaml",
    "yml": "yaml", "zig": "zig",
}  # fmt: skip
PROSE = ("markdown", "restructuredtext", "tex", "text")


class BadBytes(StrEnum):
    """What happens to a file with bytes that its encoding does not have."""

    REPLACE = "replace"  # Each becomes U+FFFD, with a note.
    SKIP = "skip"  # The file is left out, with a note.
    FAIL = "fail"


def read_text(found: Found, bad_bytes: BadBytes, note: NoteTaker) -> Iterator[Source]:
    """The file as one document; none, with a note, if it is binary or cannot be read."""
    try:
        content = found.path.read_bytes()
    except OSError as error:
        note(Note(found.name, f"cannot be read: {error.strerror}", unread=True, size=found.size))
        return
    suffix = found.path.suffix[1:].lower()
    encoding = _encoding(content, suffix)
    if not found.asked and _is_binary(content, encoding):
        note(Note(found.name, "is binary", size=found.size))
        return
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if bad_bytes is BadBytes.FAIL:
            raise InvalidArgument(f"{found.path} is not valid {encoding} at byte {error.start:,}") from None
        if bad_bytes is BadBytes.SKIP:
            note(Note(found.name, f"is not valid {encoding}", unread=True, size=found.size))
            return
        note(Note(found.name, f"is not valid {encoding}: bad bytes were replaced"))
        text = content.decode(encoding, "replace")
    yield Source(found.name, text, None, _metadata(found, suffix), found.size)


def _metadata(found: Found, suffix: str) -> dict[str, str | int | float | bool]:
    language = LANGUAGES.get(suffix)
    kind = found.format
    if kind is Format.AUTO:
        kind = Format.TEXT if language is None or language in PROSE else Format.CODE
    facts = {
        "path": found.name,
        "root": found.root,
        "name": found.name.rpartition("/")[2],
        "suffix": suffix or None,
        "lang": language,
        "format": str(kind),
        "size": found.size,
    }
    return fitting(facts)[0]


def _encoding(content: bytes, suffix: str) -> str:
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            return encoding
    if suffix in ("py", "pyi", "pyw"):
        try:
            return tokenize.detect_encoding(io.BytesIO(content).readline)[0]
        except SyntaxError:
            return "utf-8"  # A coding line that Python does not know, or bytes that contradict it.
    return "utf-8"


def _is_binary(content: bytes, encoding: str) -> bool:
    head = content[:LOOK_AT]
    if not encoding.startswith(("utf-16", "utf-32")) and b"\0" in head:
        return True
    text = head.decode(encoding, "replace")
    return text.count("\ufffd") > MOSTLY * len(text)
