"""Reading segment files: plain reads into the caller's buffer, every chunk checked the first time it is touched.

No memory maps: a truncated mapped file kills the process, and mapped pages cannot be kept under a byte budget.
H key/value heads, D head_dim.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from memory_service.checksums import crc32
from memory_service.errors import DataLoss
from memory_service.storage.parts import CHUNK_BYTES, MAX_HEADER_BYTES, PartRef, SegmentRef, Which, decode_header
from memory_service.storage.vfs import File, Vfs
from memory_service.types.callers import Cancel
from memory_service.types.specs import MemorySpec

OPEN_FILES = 256


class _Open:
    """An open segment file; closed when it is no longer cached and the last reader is done."""

    __slots__ = ("cached", "file", "readers")

    def __init__(self, file: File):
        self.file = file
        self.readers = 0
        self.cached = True


class _Checked:
    """Which chunks of a segment matched their checksum since this process started."""

    __slots__ = ("flags", "starts")

    def __init__(self, segment: SegmentRef):
        counts = [part.layout.chunks for part in segment.parts]
        self.starts = [0, *accumulate(counts)]
        self.flags = bytearray(self.starts[-1])


class SegmentReader:
    """Thread-safe reads of immutable files. One read call per run of bytes; a chunk's first touch reads all of it."""

    def __init__(self, vfs: Vfs, open_files: int = OPEN_FILES):
        self._vfs = vfs
        self._limit = open_files
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, _Open] = OrderedDict()
        self._checked: dict[Path, _Checked] = {}

    def read(self, path: Path, segment: SegmentRef, part_index: int, offset: int, out: memoryview) -> None:
        """Fill `out` with a part's payload from byte `offset`; DataLoss if a byte is missing or fails its checksum."""
        part = segment.parts[part_index]
        assert 0 <= offset <= offset + len(out) <= part.nbytes, "outside the part"
        if not len(out):
            return
        checked = self._checked.get(path) or self._checked.setdefault(path, _Checked(segment))
        start = checked.starts[part_index]
        first, last = offset // CHUNK_BYTES, (offset + len(out) - 1) // CHUNK_BYTES
        with self._opened(path) as file:
            if all(checked.flags[start + first : start + last + 1]):
                self._vfs.pread(file, out, part.offset + offset)
                return
            for chunk in range(first, last + 1):
                begin = max(offset, chunk * CHUNK_BYTES)
                end = min(offset + len(out), (chunk + 1) * CHUNK_BYTES)
                piece = out[begin - offset : end - offset]
                if checked.flags[start + chunk]:
                    self._vfs.pread(file, piece, part.offset + begin)
                    continue
                size = part.layout.chunk_nbytes(chunk)
                whole = piece if len(piece) == size else memoryview(bytearray(size))
                self._read_chunk(file, part, part_index, chunk, whole)
                checked.flags[start + chunk] = 1
                if whole is not piece:
                    inside = begin - chunk * CHUNK_BYTES
                    piece[:] = whole[inside : inside + len(piece)]

    def read_tensor(
        self, path: Path, segment: SegmentRef, part_index: int, which: Which, layer_index: int, first: int, count: int
    ) -> Tensor:
        """Keys or values of one layer, [H, count, D] in the part's dtype."""
        layout = segment.parts[part_index].layout
        out = torch.empty(layout.heads, count, layout.dim, dtype=layout.dtype.torch)
        view = writable_bytes(out)
        if count == layout.tokens:
            start = layout.extent(which, layer_index, 0, first, count).offset
            self.read(path, segment, part_index, start, view)
            return out
        for head in range(layout.heads):
            extent = layout.extent(which, layer_index, head, first, count)
            self.read(path, segment, part_index, extent.offset, view[head * extent.nbytes : (head + 1) * extent.nbytes])
        return out

    def read_ids(self, path: Path, segment: SegmentRef, part_index: int, first: int, count: int) -> Tensor:
        """Token ids, [count] int64."""
        extent = segment.parts[part_index].layout.ids_extent(first, count)
        out = torch.empty(count, dtype=torch.int32)
        self.read(path, segment, part_index, extent.offset, writable_bytes(out))
        return out.to(torch.int64) & 0xFFFF_FFFF

    def verify(
        self,
        path: Path,
        segment: SegmentRef,
        cancel: Cancel | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Check every byte of a file; DataLoss naming the first wrong chunk. `progress` gets the bytes of each step."""
        for _, block in self.blocks(path, segment, cancel):
            if progress:
                progress(len(block))

    def blocks(
        self, path: Path, segment: SegmentRef, cancel: Cancel | None = None
    ) -> Iterator[tuple[int, memoryview | bytearray]]:
        """All bytes of a file in order, each block checked: (offset, bytes), which the next one overwrites.

        DataLoss naming the first wrong chunk.
        """
        with self._opened(path) as file:
            if (size := self._vfs.file_size(path)) != segment.nbytes:
                raise DataLoss(f"{path.name} has {size} bytes instead of {segment.nbytes}")
            header = bytearray(segment.header_bytes)
            self._vfs.pread(file, memoryview(header), 0)
            if crc32(header) != segment.header_crc:
                raise DataLoss(f"{path.name}: the header does not match its checksum")
            yield 0, header
            buffer = memoryview(bytearray(CHUNK_BYTES))
            for part_index, part in enumerate(segment.parts):
                for chunk in range(part.layout.chunks):
                    if cancel:
                        cancel.check()
                    size = part.layout.chunk_nbytes(chunk)
                    self._read_chunk(file, part, part_index, chunk, buffer[:size])
                    yield part.offset + chunk * CHUNK_BYTES, buffer[:size]

    def read_header(self, path: Path) -> tuple[MemorySpec, SegmentRef]:
        """What a segment file says of itself, without its payload; DataLoss unless header and file length are sound."""
        size = self._vfs.file_size(path)
        file = self._vfs.open(path)
        try:
            prefix = bytearray(8)
            self._vfs.pread(file, memoryview(prefix), 0)
            length = 8 + int.from_bytes(prefix, "little")
            if length > min(size, MAX_HEADER_BYTES):
                raise DataLoss(f"{path.name}: the header is damaged")
            block = bytearray(length)
            self._vfs.pread(file, memoryview(block), 0)
        finally:
            self._vfs.close(file)
        spec, segment = decode_header(path.name, bytes(block))
        if segment.nbytes != size:
            raise DataLoss(f"{path.name} has {size} bytes instead of {segment.nbytes}")
        return spec, segment

    def forget(self, path: Path) -> None:
        """Close the file as soon as its last reader is done; the path may be unlinked now."""
        with self._lock:
            self._checked.pop(path, None)
            entry = self._open.pop(path, None)
            if entry is not None:
                self._uncache(entry)

    def close(self) -> None:
        """Forget every file."""
        for path in list(self._open):
            self.forget(path)

    def _read_chunk(self, file: File, part: PartRef, part_index: int, chunk: int, out: memoryview) -> None:
        self._vfs.pread(file, out, part.offset + chunk * CHUNK_BYTES)
        if crc32(out) != part.header.crcs[chunk]:
            raise DataLoss(f"{file.path.name}: chunk {chunk} of part {part_index} does not match its checksum")

    @contextmanager
    def _opened(self, path: Path) -> Iterator[File]:
        with self._lock:
            entry = self._open.get(path)
            if entry is None:
                try:
                    entry = self._open[path] = _Open(self._vfs.open(path))
                except FileNotFoundError:
                    raise DataLoss(f"{path.name} is missing") from None
                while len(self._open) > self._limit:
                    self._uncache(self._open.popitem(last=False)[1])
            self._open.move_to_end(path)
            entry.readers += 1
        try:
            yield entry.file
        finally:
            with self._lock:
                entry.readers -= 1
                self._close_if_unused(entry)

    def _uncache(self, entry: _Open) -> None:
        entry.cached = False
        self._close_if_unused(entry)

    def _close_if_unused(self, entry: _Open) -> None:
        if not entry.cached and not entry.readers:
            self._vfs.close(entry.file)


def writable_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor; writing to them writes the tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
