"""The snapshots under one root: made, listed, read, deleted. The root may be another disk, or shared by services.

    <root>/<tenant>/<snapshot>[@<shard>]/memory.json               which memory this is
    <root>/<tenant>/<snapshot>[@<shard>]/seg-*.safetensors         linked where the file system can, else copied
    <root>/<tenant>/<snapshot>[@<shard>]/contents.json             what it holds; its creation claims the directory
    <root>/<tenant>/<snapshot>[@<shard>]/snapshot.json             written last: now the snapshot exists
    <data>/unfinished/<tenant>,<snapshot>[@<shard>]                being made or deleted here; swept at the next open

A failure under the root fails the snapshot, never the store: nothing is served from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from memory_service.checksums import crc32
from memory_service.errors import AlreadyExists, DataLoss, FotError, NotFound, ResourceExhausted, Unavailable
from memory_service.storage.copies import Copies
from memory_service.storage.memory_file import MemoryFile, memory_from_json, memory_to_json
from memory_service.storage.parts import SegmentRef, spec_to_json
from memory_service.storage.snapshot_file import (
    CONTENTS,
    DESCRIPTION,
    MAX_DESCRIPTION_BYTES,
    MEMORY,
    Contents,
    Description,
    SegmentEntry,
    cut_name,
    decode_contents,
    decode_description,
    directory_name,
    encode_contents,
    encode_description,
    tenant_directory,
)
from memory_service.storage.vfs import StorageFailed, Vfs, replace_file
from memory_service.types.callers import Cancel

log = logging.getLogger(__name__)

_REMOVALS, _PAUSE_S = 4, 0.02
_EARLIER = 16  # Snapshots that are searched for a segment which need not be copied again.


@dataclass(frozen=True, slots=True)
class Found:
    """A snapshot's directory."""

    tenant: str  # The tenant's directory.
    name: str

    @property
    def id(self) -> str:
        return self.name.partition("@")[0]

    @property
    def shard(self) -> str:
        return self.name.partition("@")[2]


class SnapshotFiles:
    """The files of all snapshots under `root`. Thread-safe."""

    def __init__(self, root: Path, data: Path, vfs: Vfs):
        self.root = root
        self._unfinished = data / "unfinished"
        self._vfs = vfs
        self.copies = Copies(vfs)

    def close(self) -> None:
        """Close every file."""
        self.copies.close()

    # --- Looking ----------------------------------------------------------------------------------------------------

    def tenants(self) -> list[str]:
        """Directories of tenants."""
        with _outside():
            return [name for name in self._vfs.list_directory(self.root) if not name.startswith(".")]

    def list(self, tenant: str) -> list[Found]:
        """Snapshots in a tenant's directory, by name; half-made ones are none."""
        with _outside():
            names = [name for name in self._vfs.list_directory(self.root / tenant) if cut_name(name)]
            return [one for one in (Found(tenant, name) for name in names) if self.exists(one)]

    def exists(self, one: Found) -> bool:
        """Whether it is a snapshot."""
        try:
            self._vfs.file_size(self.path(one) / DESCRIPTION)
        except FileNotFoundError:
            return False
        return True

    def path(self, one: Found) -> Path:
        """Where it is."""
        return self.root / one.tenant / one.name

    def describe(self, one: Found) -> Description:
        """What it says of itself; NotFound if it is gone, DataLoss if that is damaged."""
        with _outside():
            block = self._read(self.path(one) / DESCRIPTION, MAX_DESCRIPTION_BYTES)
        return decode_description(block, one.tenant, one.name)

    def contents(self, one: Found, told: Description) -> Contents:
        """What it holds; DataLoss if that is damaged."""
        with _outside():
            return decode_contents(self._read(self.path(one) / CONTENTS, told.contents_nbytes), told)

    def memory(self, one: Found) -> MemoryFile:
        """Which memory it is of, where its description does not say; DataLoss if that is damaged too."""
        with _outside():
            return memory_from_json(self._read(self.path(one) / MEMORY, MAX_DESCRIPTION_BYTES))

    # --- Making -----------------------------------------------------------------------------------------------------

    def make(
        self,
        one: Description,
        contents: Contents,
        segments: Sequence[tuple[Path, SegmentRef]],
        progress: Callable[[int], None],
        cancel: Cancel,
    ) -> int:
        """Make a snapshot of these files; how many had to be copied. Nothing of it is left if that fails.

        AlreadyExists if there is one, or if another process is making it. `progress` gets the bytes of each step.
        """
        place = Found(tenant_directory(one.memory.tenant), directory_name(one.id, one.shard))
        with _outside():
            if place.name in self._vfs.list_directory(self.root / place.tenant):
                raise _taken(one.id, whole=self.exists(place))
        self._note(place)
        with _outside():
            try:
                copied = self._fill(place, one, contents, segments, progress, cancel)
            except _Claimed:
                self._forget(place)
                raise _taken(one.id, whole=False) from None
            except BaseException:
                with suppress(FotError):
                    self._remove(place)
                raise
            with suppress(FotError):  # The next open does it.
                self._forget(place)
            return copied

    def _fill(
        self,
        place: Found,
        one: Description,
        contents: Contents,
        segments: Sequence[tuple[Path, SegmentRef]],
        progress: Callable[[int], None],
        cancel: Cancel,
    ) -> int:
        directory = self.path(place)
        new = self.root.name not in self._vfs.list_directory(self.root.parent)
        self._vfs.make_directory(directory)
        for parent in (directory.parent, self.root, *([self.root.parent] if new else [])):
            self._vfs.fsync_directory(parent)
        self._claim(directory / CONTENTS)
        earlier = _Earlier(self, place, one)
        copied = 0
        for source, segment in segments:
            cancel.check()
            target = directory / segment.path
            if self.copies.link(source, target) or any(
                self.copies.link(path, target) for path in earlier.places(segment)
            ):
                progress(segment.nbytes)
            else:
                self.copies.copy(source, target, segment, progress, cancel)
                copied += 1
        cancel.check()
        block = encode_contents(contents)
        file = self._vfs.open(directory / CONTENTS, write=True)
        try:
            self._vfs.pwrite(file, block, 0)
            self._vfs.fdatasync(file)
        finally:
            self._vfs.close(file)
        replace_file(self._vfs, directory / MEMORY, memory_to_json(one.memory))  # Syncs the directory.
        told = replace(one, contents_nbytes=len(block), contents_crc=crc32(block))
        replace_file(self._vfs, directory / DESCRIPTION, encode_description(told))
        return copied

    def _claim(self, path: Path) -> None:
        try:
            self._vfs.close(self._vfs.create(path, 0))
        except StorageFailed as error:
            if isinstance(error.__cause__, FileExistsError):
                raise _Claimed from error
            raise

    def segment(self, one: Found, entry: SegmentEntry, spec_json: str) -> SegmentRef:
        """What a segment file says of itself; DataLoss unless it is the one the snapshot names."""
        spec, segment = self.copies.header(self.path(one) / entry.path)
        if not entry.describes(segment) or spec_to_json(spec) != spec_json:
            raise DataLoss(f"{entry.path} is not the segment that was kept")
        return segment

    # --- Removing ---------------------------------------------------------------------------------------------------

    def delete(self, one: Found) -> None:
        """Delete a snapshot; durable on return."""
        self._note(one)
        with _outside():
            try:
                self._vfs.unlink(self.path(one) / DESCRIPTION)
                self._vfs.fsync_directory(self.path(one))
                self._remove(one)
            except StorageFailed:
                if one.name in self._vfs.list_directory(self.root / one.tenant):
                    raise
                # Of a shared root another service deleted the same.
                self._forget(one)

    def sweep(self) -> int:
        """Remove what was being made or deleted from here when the service stopped; how many there were.

        Where the root is not to be seen now, as of a disk that is not mounted, that waits for another open.
        """
        swept = 0
        for name in self._vfs.list_directory(self._unfinished):
            place = Found(*name.split(",", 1))
            with _outside():
                if place.tenant not in self._vfs.list_directory(self.root):
                    continue
                if self.exists(place):
                    self._forget(place)
                else:
                    self._remove(place)
                    swept += 1
        return swept

    def _remove(self, one: Found) -> None:
        path = self.path(one)
        for attempt in range(_REMOVALS):
            try:
                self._vfs.remove_directory(path)
                break
            except StorageFailed:
                # Of a shared root another service may be removing the same, a file ahead of us.
                if attempt + 1 == _REMOVALS:
                    raise
                time.sleep(_PAUSE_S)
        self._vfs.fsync_directory(path.parent)
        self._forget(one)

    def _note(self, one: Found) -> None:
        """Remember durably, in the data directory, that this one is not whole now."""
        self._vfs.make_directory(self._unfinished)
        self._vfs.fsync_directory(self._unfinished.parent)
        note = f"{one.tenant},{one.name}"
        if note not in self._vfs.list_directory(self._unfinished):
            self._vfs.close(self._vfs.create(self._unfinished / note, 0))
        self._vfs.fsync_directory(self._unfinished)

    def _forget(self, one: Found) -> None:
        self._vfs.unlink(self._unfinished / f"{one.tenant},{one.name}")

    def _read(self, path: Path, limit: int) -> bytes:
        """A whole file, never through a symbolic link; NotFound if missing, DataLoss if it is longer than `limit`."""
        try:
            size = self._vfs.file_size(path)
            file = self._vfs.open(path)
        except FileNotFoundError:
            raise NotFound(f"{path.name} is missing") from None
        try:
            if size > limit:
                raise DataLoss(f"{path.name} is longer than {limit} bytes; it is not one of ours")
            block = bytearray(size)
            self._vfs.pread(file, memoryview(block), 0)
            return bytes(block)
        finally:
            self._vfs.close(file)


class _Claimed(Exception):
    """Another process was first."""


class _Earlier:
    """The newest snapshots of the same memory, looked at only where links to the memory itself are not possible."""

    def __init__(self, files: SnapshotFiles, mine: Found, one: Description):
        self._files = files
        self._mine = mine
        self._spec = spec_to_json(one.memory.spec)
        self._memory = one.memory.name
        self._found: list[Found] | None = None

    def places(self, segment: SegmentRef) -> Iterator[Path]:
        """Where an equal segment lies already: by its whole header, which names it and all its checksums."""
        entry = SegmentEntry(segment.path, segment.nbytes, segment.header_bytes, segment.header_crc)
        for one in self._newest():
            try:
                self._files.segment(one, entry, self._spec)
            except DataLoss:
                continue
            yield self._files.path(one) / segment.path

    def _newest(self) -> list[Found]:
        if self._found is None:
            dated = []
            for one in self._files.list(self._mine.tenant):
                try:
                    told = self._files.describe(one)
                except (DataLoss, NotFound):
                    continue
                if told.memory.name == self._memory and spec_to_json(told.memory.spec) == self._spec:
                    dated.append((told.created_at, one.name, one))
            self._found = [one for *_, one in sorted(dated, key=lambda each: each[:2], reverse=True)[:_EARLIER]]
        return self._found


def _taken(snapshot: str, *, whole: bool) -> AlreadyExists:
    if whole:
        return AlreadyExists(f"there is a snapshot {snapshot!r} already; delete it, or choose another id")
    return AlreadyExists(
        f"snapshot {snapshot!r} is being made by another process, or was left half-made by one that is gone; choose "
        "another id, or remove its directory if nobody is at it"
    )


@contextmanager
def _outside() -> Iterator[None]:
    """What fails under the root fails the snapshot alone."""
    try:
        yield
    except StorageFailed as error:
        raise Unavailable(
            f"the snapshots' directory cannot be used: {error.message.partition(';')[0]}", reason="SNAPSHOTS_FAILED"
        ) from error
    except ResourceExhausted as error:
        if error.code != "DISK_FULL":
            raise
        told = error.message.partition(";")[0]
        raise ResourceExhausted(
            f"{told}; delete snapshots, or keep them where there is room (--snapshots)", reason="DISK_FULL"
        ) from error
