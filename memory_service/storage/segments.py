"""The files of a data directory: staged, sealed into immutable segments, read, checked, removed.

    memories/<key>/memory.json                 what the memory is
    memories/<key>/seg-<time><random>.safetensors
    staging/                                   parts on their way in; emptied at every open
    tombstones.log                             what was deleted

Sealing makes a segment durable but not visible: the catalogue's transaction that names it commits it. A crash before
leaves a file nobody knows, which `recovery.recover` adopts or removes at the next open.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from memory_service.errors import DataLoss, FotError
from memory_service.storage.memory_file import MemoryFile, memory_from_json, memory_to_json
from memory_service.storage.parts import (
    FILE_HEADER_BYTES,
    SEGMENT_NAME,
    SMALL_PART_BYTES,
    PartHeader,
    PartLayout,
    SegmentRef,
    Which,
    encode_header,
)
from memory_service.storage.reading import SegmentReader, writable_bytes
from memory_service.storage.staging import FilePayload, RamPayload, Staging
from memory_service.storage.tombstones import EVERYTHING, Tombstone, Tombstones
from memory_service.storage.vfs import Vfs, replace_file
from memory_service.types.callers import Cancel
from memory_service.types.specs import MemorySpec

_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
RESTORING = "restoring.new"  # Stands in the directory of a memory until the catalogue knows that it was restored.


@dataclass(frozen=True, slots=True)
class Scanned:
    """A segment file found on disk: what its header says, or why it cannot be used."""

    path: str
    segment: SegmentRef | None = None
    spec: MemorySpec | None = None
    problem: str = ""


class SegmentFiles:
    """All segment files under one root. Thread-safe; a memory's key is its directory's name."""

    def __init__(self, root: Path, vfs: Vfs):
        self._root = root
        self._vfs = vfs
        self._memories = root / "memories"
        self._staging = root / "staging"
        for directory in (self._memories, self._staging):
            vfs.make_directory(directory)
        vfs.fsync_directory(root)
        self.tombstones = Tombstones(root / "tombstones.log", vfs)
        self._reader = SegmentReader(vfs)
        self._background = ThreadPoolExecutor(2, thread_name_prefix="fot-sync")
        self._stagings: set[Staging] = set()
        self._known: set[str] = set()  # Memories whose directory is durable.

    def __enter__(self) -> SegmentFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is staged and close every file."""
        for staging in list(self._stagings):
            staging.discard()
        self._background.shutdown()
        self._reader.close()
        self.tombstones.close()

    # --- Memories ---------------------------------------------------------------------------------------------------

    def create_memory(self, memory_key: str, memory: MemoryFile) -> None:
        """Make the memory's directory and description durable. The catalogue's row creates the memory, after this."""
        replace_file(self._vfs, self._directory(memory_key) / "memory.json", memory_to_json(memory))

    def memory_keys(self) -> list[str]:
        """Keys of all memories that have a directory."""
        return [name for name in self._vfs.list_directory(self._memories) if _KEY.fullmatch(name)]

    def read_memory(self, memory_key: str) -> MemoryFile:
        """The memory's description; DataLoss if it is missing or damaged."""
        path = self._path(memory_key, "memory.json")
        try:
            return memory_from_json(self._vfs.read_file(path))
        except FileNotFoundError:
            raise DataLoss("memory.json is missing") from None

    def drop_memory(self, memory_key: str) -> None:
        """Remove a memory's directory with all its files; the catalogue must have deleted the memory before."""
        directory = self._path(memory_key, "")
        for name in self._vfs.list_directory(directory):
            self._reader.forget(directory / name)
        self._known.discard(memory_key)
        self._vfs.remove_directory(directory)
        self._vfs.fsync_directory(self._memories)

    # --- Restoring --------------------------------------------------------------------------------------------------

    def place(self, memory_key: str, segment_path: str) -> Path:
        """Where a segment lies, or is to lie; it stays while its memory is being read."""
        return self._path(memory_key, segment_path)

    def begin_restore(self, memory_key: str) -> None:
        """Make a directory for segments to be restored into; until `end_restore`, the next open removes it."""
        directory = self._directory(memory_key)
        self._vfs.close(self._vfs.create(directory / RESTORING, 0))
        self._vfs.fsync_directory(directory)

    def describe_restored(self, memory_key: str, memory: MemoryFile, dead: Iterable[Tombstone]) -> None:
        """All segments are in place: make that durable, with what is dead in them. A rebuild would adopt it now."""
        self._vfs.fsync_directory(self._path(memory_key, ""))
        self.tombstones.add(dead)
        self.create_memory(memory_key, memory)

    def end_restore(self, memory_key: str) -> None:
        """The catalogue knows the memory."""
        self._vfs.unlink(self._path(memory_key, RESTORING))

    def restoring(self, memory_key: str) -> bool:
        """Whether the memory was being restored when the service stopped, if the catalogue does not know it."""
        return RESTORING in self._vfs.list_directory(self._path(memory_key, ""))

    def abandon_memory(self, memory_key: str) -> None:
        """Remove a memory that is not to be; what a crash leaves of it, the next open removes."""
        self.tombstones.add([Tombstone(memory_key, EVERYTHING, 0)])
        self.drop_memory(memory_key)

    # --- Writing ----------------------------------------------------------------------------------------------------

    def stage(self, memory_key: str, layout: PartLayout) -> Staging:
        """Make room for a part: in RAM if it is small, else on disk, where a full disk is told now."""
        assert _KEY.fullmatch(memory_key)
        if layout.nbytes <= SMALL_PART_BYTES:
            payload: RamPayload | FilePayload = RamPayload(layout.nbytes)
        else:
            path = self._staging / f"{memory_key}-{_unique()}.part"
            payload = FilePayload(self._vfs, path, layout.nbytes, self._background)
        staging = Staging(layout, payload, self._stagings.discard)
        self._stagings.add(staging)
        return staging

    def seal(self, memory_key: str, spec: MemorySpec, parts: Sequence[tuple[PartHeader, Staging]]) -> list[SegmentRef]:
        """Turn complete parts into durable segments, not yet visible. Those in RAM share the first segment, in order.

        On success the stagings are used up; on failure no segment is left and they can be sealed again. Costs one data
        sync per file and one directory sync per call.
        """
        assert parts
        begun: list[Staging] = []
        moves: list[tuple[Path, Path]] = []
        sealed = False
        try:
            for _, staging in parts:
                staging.begin_seal()
                begun.append(staging)
            directory = self._directory(memory_key)
            segments = self._prepare(directory, spec, parts, moves)
            self._publish(directory, moves)
            sealed = True
            return segments
        except BaseException:
            for staged, _ in moves:
                if SEGMENT_NAME.search(staged.name):  # Of the parts in RAM; the others go on being uploads.
                    with suppress(FotError):
                        self._vfs.unlink(staged)
            raise
        finally:
            for staging in begun:
                staging.end_seal(sealed=sealed)

    def remove(self, memory_key: str, segment_path: str, *, durable: bool = False) -> None:
        """Unlink a segment; reads in progress finish. With `durable` not even a power loss brings it back."""
        path = self._path(memory_key, segment_path)
        self._reader.forget(path)
        self._vfs.unlink(path)
        if durable:
            self._vfs.fsync_directory(path.parent)

    # --- Reading ----------------------------------------------------------------------------------------------------

    def read(
        self, memory_key: str, segment: SegmentRef, part_index: int, offset: int, out: memoryview | Tensor
    ) -> None:
        """Fill `out` (or a contiguous CPU tensor) with a part's payload from byte `offset`; DataLoss if damaged."""
        view = writable_bytes(out) if isinstance(out, Tensor) else out.cast("B")
        self._reader.read(self._path(memory_key, segment.path), segment, part_index, offset, view)

    def read_tensor(
        self,
        memory_key: str,
        segment: SegmentRef,
        part_index: int,
        which: Which,
        layer_index: int,
        first: int,
        count: int,
    ) -> Tensor:
        """Keys or values of `count` tokens of one layer (its place in the spec), [H, count, D]; DataLoss if damaged."""
        path = self._path(memory_key, segment.path)
        return self._reader.read_tensor(path, segment, part_index, which, layer_index, first, count)

    def read_ids(self, memory_key: str, segment: SegmentRef, part_index: int, first: int, count: int) -> Tensor:
        """Token ids, [count] int64; DataLoss if damaged."""
        return self._reader.read_ids(self._path(memory_key, segment.path), segment, part_index, first, count)

    def verify(
        self,
        memory_key: str,
        segment: SegmentRef,
        cancel: Cancel | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Read the whole file and check every byte; DataLoss naming file and chunk. `progress` gets bytes per step."""
        self._reader.verify(self._path(memory_key, segment.path), segment, cancel, progress)

    def present(self, memory_key: str, segment: SegmentRef) -> bool:
        """Whether the file exists with the right length; nothing is read."""
        try:
            return self._vfs.file_size(self._path(memory_key, segment.path)) == segment.nbytes
        except FileNotFoundError:
            return False

    # --- After a crash ----------------------------------------------------------------------------------------------

    def scan(self, memory_key: str) -> Iterator[Scanned]:
        """Every segment file of a memory by its header alone, oldest first; the payload is not read."""
        for name in self._vfs.list_directory(self._path(memory_key, "")):
            if SEGMENT_NAME.fullmatch(name):
                try:
                    spec, segment = self._reader.read_header(self._path(memory_key, name))
                    yield Scanned(name, segment, spec)
                except DataLoss as error:
                    yield Scanned(name, problem=error.message)

    def sweep(self, memory_key: str, keep: Collection[str]) -> int:
        """Remove segments not in `keep` and half-written files; returns how many. Only while nothing is sealed."""
        doomed = [
            name
            for name in self._vfs.list_directory(self._path(memory_key, ""))
            if name.endswith(".new") or (SEGMENT_NAME.fullmatch(name) and name not in keep)
        ]
        for name in doomed:
            self.remove(memory_key, name)
        if doomed:
            self._vfs.fsync_directory(self._path(memory_key, ""))
        return len(doomed)

    def sweep_staging(self) -> int:
        """Remove what an earlier process left in staging; returns how many files."""
        live = {staging.path for staging in list(self._stagings)}
        doomed = [self._staging / name for name in self._vfs.list_directory(self._staging)]
        doomed = [path for path in doomed if path not in live]
        for path in doomed:
            self._vfs.unlink(path)
        return len(doomed)

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _prepare(
        self,
        directory: Path,
        spec: MemorySpec,
        parts: Sequence[tuple[PartHeader, Staging]],
        moves: list[tuple[Path, Path]],
    ) -> list[SegmentRef]:
        """Write and sync every file under its staging name; `moves` gets where each belongs."""
        segments = []
        group = [(replace(header, crcs=one.crcs), one.payload) for header, one in parts if one.path is None]
        if group:
            target = directory / f"seg-{_unique()}.safetensors"
            block, segment = encode_header(target.name, spec, [header for header, _ in group])
            staged = self._staging / f"{directory.name}-{target.name}"
            self._write_group(staged, segment, [block, *(p.bytes for _, p in group if isinstance(p, RamPayload))])
            moves.append((staged, target))
            segments.append(segment)
        for header, staging in parts:
            if isinstance(staging.payload, FilePayload):
                target = directory / f"seg-{_unique()}.safetensors"
                headers = [replace(header, crcs=staging.crcs)]
                block, segment = encode_header(target.name, spec, headers, room=FILE_HEADER_BYTES)
                staging.payload.finish(block)
                moves.append((staging.payload.path, target))
                segments.append(segment)
        return segments

    def _write_group(self, path: Path, segment: SegmentRef, pieces: Sequence[bytes | bytearray]) -> None:
        file = self._vfs.create(path, segment.nbytes)
        try:
            offset = 0
            for piece in pieces:
                self._vfs.pwrite(file, piece, offset)
                offset += len(piece)
            assert offset == segment.nbytes
            self._vfs.fdatasync(file)
        except BaseException:
            self._vfs.unlink(path)
            raise
        finally:
            self._vfs.close(file)

    def _publish(self, directory: Path, moves: Sequence[tuple[Path, Path]]) -> None:
        """Give synced files their names, durably; on failure take the names back."""
        try:
            for staged, target in moves:
                self._vfs.rename(staged, target)
            self._vfs.fsync_directory(directory)
        except BaseException:
            for staged, target in moves:
                with suppress(FotError):
                    self._vfs.rename(target, staged)
            with suppress(FotError):
                self._vfs.fsync_directory(directory)
            raise

    def _directory(self, memory_key: str) -> Path:
        directory = self._path(memory_key, "")
        if memory_key not in self._known:
            self._vfs.make_directory(directory)
            self._vfs.fsync_directory(self._memories)
            self._known.add(memory_key)
        return directory

    def _path(self, memory_key: str, name: str) -> Path:
        assert _KEY.fullmatch(memory_key) and "/" not in name, "keys and segment names are ours alone"
        return self._memories / memory_key / name


def _unique() -> str:
    """Hex that sorts by time of creation."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"
