"""The log of what was deleted, so that a catalogue rebuilt from segments does not bring it back.

A line is written after the catalogue committed a delete and before the delete is acknowledged, so every line is true.
A crash in between leaves the catalogue ahead; `recovery.recover` adds the line at the next open.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from memory_service.checksums import crc32
from memory_service.storage.vfs import File, Vfs, replace_file

ROOM_BYTES = 64 << 10  # Allocated ahead, so that deletes still work on a full disk.
MAX_LOG_BYTES = 4 << 30
EVERYTHING = ""  # In place of a document id: the whole memory.


class Tombstone(NamedTuple):
    """A deleted document; kills it in every generation up to this one."""

    memory_key: str
    document: str
    generation: int


class Tombstones:
    """An append-only file of checksummed lines; what does not match its checksum is counted and ignored."""

    def __init__(self, path: Path, vfs: Vfs):
        self.damaged_lines = 0
        self._path = path
        self._vfs = vfs
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str], int] = {}
        self._unwritten: list[Tombstone] = []  # Of a failed `add`; the next one writes them too.
        self._file: File
        self._room = self._end = 0
        self._open()

    @property
    def entries(self) -> Mapping[tuple[str, str], int]:
        """(memory key, document) -> last deleted generation."""
        return MappingProxyType(self._entries)

    def covers(self, memory_key: str, document: str, generation: int) -> bool:
        """Whether this generation of the document, or its whole memory, was deleted."""
        if (memory_key, EVERYTHING) in self._entries:
            return True
        return generation <= self._entries.get((memory_key, document), -1)

    def add(self, tombstones: Iterable[Tombstone]) -> None:
        """Append lines, durable on return; one sync. What is already covered costs nothing."""
        with self._lock:
            self._unwritten += [one for one in tombstones if not self.covers(*one)]
            if not self._unwritten:
                return
            data = b"".join(map(_line, self._unwritten))
            end = self._end + len(data)
            if end > self._room:
                self._vfs.allocate(self._file, end + ROOM_BYTES)
                self._room = end + ROOM_BYTES
            self._vfs.pwrite(self._file, data, self._end)
            self._vfs.fdatasync(self._file)
            self._end = end
            self._note(self._unwritten)
            self._unwritten = []

    def rewrite(self, keep: Iterable[Tombstone]) -> None:
        """Replace the log by these lines (those whose segments still exist); a crash leaves the old log or the new."""
        with self._lock:
            lines = [*keep, *self._unwritten]
            replace_file(self._vfs, self._path, b"".join(map(_line, lines)).ljust(ROOM_BYTES, b"\0"))
            self._vfs.close(self._file)
            self._entries.clear()
            self._unwritten = []
            self._open()

    def close(self) -> None:
        """Close the file."""
        self._vfs.close(self._file)

    def _open(self) -> None:
        try:
            data = self._vfs.read_file(self._path, limit=MAX_LOG_BYTES)
        except FileNotFoundError:
            data = b"\0" * ROOM_BYTES
            replace_file(self._vfs, self._path, data)
        self._file = self._vfs.open(self._path, write=True)
        self._room, self._end = len(data), 0
        written = data.rstrip(b"\0")
        found = []
        for line in written.split(b"\n"):
            entry = _parse(line)
            if entry is not None:
                found.append(entry)
            elif line:
                self.damaged_lines += 1
        # A torn last line stays, closed by a line break, and counts as damaged: overwriting it could join two halves.
        self._end = len(written)
        if written and not written.endswith(b"\n"):
            self._vfs.allocate(self._file, self._end + 1)
            self._vfs.pwrite(self._file, b"\n", self._end)
            self._end += 1
        self._note(found)

    def _note(self, tombstones: Iterable[Tombstone]) -> None:
        for key, document, generation in tombstones:
            self._entries[key, document] = max(generation, self._entries.get((key, document), -1))


def _line(tombstone: Tombstone) -> bytes:
    text = json.dumps(tombstone, separators=(",", ":")).encode()
    return b"%08x %s\n" % (crc32(text), text)


def _parse(line: bytes) -> Tombstone | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % crc32(text):
        return None
    return Tombstone(*json.loads(text))
