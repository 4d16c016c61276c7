"""Segment files brought to another directory, or another disk: linked where that can be, else copied and checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from memory_service.errors import DataLoss
from memory_service.storage.parts import SegmentRef
from memory_service.storage.reading import SegmentReader
from memory_service.storage.vfs import CannotLink, Vfs
from memory_service.types.callers import Cancel
from memory_service.types.specs import MemorySpec


class Copies:
    """Thread-safe."""

    def __init__(self, vfs: Vfs):
        self._vfs = vfs
        self._reader = SegmentReader(vfs)

    def close(self) -> None:
        """Close every file."""
        self._reader.close()

    def link(self, source: Path, target: Path) -> bool:
        """Give a segment a second name, if the file system can; whether it could."""
        try:
            self._vfs.link(source, target)
        except (CannotLink, FileNotFoundError):
            return False
        return True

    def bring(
        self, source: Path, target: Path, segment: SegmentRef, progress: Callable[[int], None], cancel: Cancel
    ) -> None:
        """Link or copy a segment out of a snapshot and check every byte; DataLoss naming file and chunk."""
        if not self.link(source, target):
            self.copy(source, target, segment, progress, cancel)
            return
        self.check(target, segment, progress, cancel)

    def check(self, path: Path, segment: SegmentRef, progress: Callable[[int], None], cancel: Cancel) -> None:
        """Read every byte of a segment where it is; DataLoss naming file and chunk."""
        try:
            self._reader.verify(path, segment, cancel, progress)
        finally:
            self._reader.forget(path)

    def copy(
        self, source: Path, target: Path, segment: SegmentRef, progress: Callable[[int], None], cancel: Cancel
    ) -> None:
        """Copy a segment, durably, each chunk held to its checksum; DataLoss if one does not match."""
        # No room is allocated ahead: what stands for a bucket takes files from front to back.
        file = self._vfs.create(target, 0)
        try:
            for offset, block in self._reader.blocks(source, segment, cancel):
                self._vfs.pwrite(file, block, offset)
                progress(len(block))
            self._vfs.fdatasync(file)
        finally:
            self._vfs.close(file)
            self._reader.forget(source)

    def header(self, path: Path) -> tuple[MemorySpec, SegmentRef]:
        """What a segment file says of itself; DataLoss if it is missing or damaged."""
        try:
            return self._reader.read_header(path)
        except FileNotFoundError:
            raise DataLoss(f"{path.name} is missing") from None
