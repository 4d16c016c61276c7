"""A part on its way in: collected in RAM if small, else in a pre-allocated file, every chunk checked as it comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memory_service import checksums
from memory_service.errors import FailedPrecondition, FotError, InvalidArgument
from memory_service.storage.parts import CHUNK_BYTES, FILE_HEADER_BYTES, PartLayout
from memory_service.storage.vfs import Buffer, File, Vfs
from memory_service.types.specs import DType

SYNC_BYTES = 32 << 20  # Written bytes that start a sync in the background, so that the commit's own is short.
# The bit patterns of infinity: those of NaN lie above, those of finite numbers of the same sign below.
_BITS = {
    DType.BF16: (np.int16, np.uint16, 0x7F80, 0xFF80),
    DType.F16: (np.int16, np.uint16, 0x7C00, 0xFC00),
    DType.F32: (np.int32, np.uint32, 0x7F80_0000, 0xFF80_0000),
}


class Staging:
    """The bytes of one part until they are sealed. Thread-safe; nothing of it survives a restart."""

    def __init__(self, layout: PartLayout, payload: RamPayload | FilePayload, on_end: Callable[[Staging], None]):
        self.layout = layout
        self.payload = payload
        self.received = 0  # Bytes.
        self._on_end = on_end
        self._lock = threading.Lock()
        self._crcs: list[int | None] = [None] * layout.chunks
        self._unwanted = False
        self._ended = ""  # What happened to it, once nothing can be written any more.

    @property
    def nbytes(self) -> int:
        """Bytes of the part's payload."""
        return self.layout.nbytes

    @property
    def path(self) -> Path | None:
        """The staging file; None if the part waits in RAM."""
        return self.payload.path

    @property
    def complete(self) -> bool:
        return self.received == self.nbytes

    @property
    def crcs(self) -> tuple[int, ...]:
        """CRC-32 of every chunk; the part must be complete."""
        assert self.complete, "the part is not complete"
        return tuple(crc for crc in self._crcs if crc is not None)

    def missing(self) -> list[tuple[int, int]]:
        """Runs of chunks not yet received: (first chunk, chunks)."""
        runs: list[tuple[int, int]] = []
        with self._lock:
            for chunk, crc in enumerate(self._crcs):
                if crc is not None:
                    continue
                if runs and sum(runs[-1]) == chunk:
                    runs[-1] = (runs[-1][0], runs[-1][1] + 1)
                else:
                    runs.append((chunk, 1))
        return runs

    def write(self, offset: int, crc32: int, data: Buffer) -> None:
        """Take one whole chunk, in any order; the same chunk again is harmless.

        Raises InvalidArgument if it is misplaced, has the wrong length, does not match its checksum, holds NaN or
        infinity, or differs from what came before; FailedPrecondition if the upload has ended.
        """
        view = memoryview(data).cast("B")
        chunk, rest = divmod(offset, CHUNK_BYTES)
        if rest or not 0 <= chunk < self.layout.chunks:
            raise InvalidArgument(
                f"a chunk must start at a multiple of {CHUNK_BYTES} within the part's {self.nbytes} bytes, got {offset}"
            )
        if len(view) != self.layout.chunk_nbytes(chunk):
            raise InvalidArgument(
                f"the chunk at byte {offset} must have {self.layout.chunk_nbytes(chunk)} bytes, got {len(view)}"
            )
        if checksums.crc32(view) != crc32:
            raise InvalidArgument(f"the chunk at byte {offset} does not match its CRC-32; send it again")
        self._check_finite(view, offset)
        with self._lock:
            self._check_open()
            before = self._crcs[chunk]
            if before is None:
                self.payload.write(view, offset)
                self._note(chunk, crc32)
            elif before != crc32:
                raise InvalidArgument(f"the chunk at byte {offset} came before with other bytes; abort and begin anew")

    def fill(self, keys: Tensor, values: Tensor, token_ids: Tensor | None) -> None:
        """Take the whole part at once: keys and values [L, H, T, D] in the memory's dtype, ids [T] or None for zeros.

        Copies a head at a time and only what is not contiguous. InvalidArgument if shape, dtype or ids do not fit, or
        if a key or value is NaN or infinite: then discard the upload.
        """
        layout = self.layout
        shape = (layout.layers, layout.heads, layout.tokens, layout.dim)
        for name, tensor in (("keys", keys), ("values", values)):
            if tuple(tensor.shape) != shape or tensor.dtype != layout.dtype.torch:
                raise InvalidArgument(
                    f"{name} must be {layout.dtype.value} of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
                )
        planes = _planes(keys, values, _uint32(token_ids, layout.tokens))
        with self._lock:
            self._check_open()
            assert not self.received, "fill takes the whole part, but chunks came before"
            offset = crc = 0
            for plane in planes:
                while plane:
                    room = CHUNK_BYTES - offset % CHUNK_BYTES
                    piece, plane = plane[:room], plane[room:]
                    self._check_finite(piece, offset)
                    self.payload.write(piece, offset)
                    crc, offset = checksums.crc32(piece, crc), offset + len(piece)
                    if offset % CHUNK_BYTES == 0 or offset == self.nbytes:
                        self._note((offset - 1) // CHUNK_BYTES, crc)
                        crc = 0

    def discard(self) -> None:
        """Forget the part and free its room: at once, or if the seal in progress fails. Harmless if it has ended."""
        with self._lock:
            self._unwanted = True
            if not self._ended:
                self._end("was dropped", remove=True)

    def begin_seal(self) -> None:
        """Take no more bytes; FailedPrecondition if chunks are missing or the upload has ended."""
        with self._lock:
            self._check_open()
            if not self.complete:
                raise FailedPrecondition(f"{self.nbytes - self.received} bytes of the upload are still missing")
            self._ended = "is being committed"

    def end_seal(self, *, sealed: bool) -> None:
        """After `begin_seal`: the bytes live in a segment now, or the upload goes on."""
        with self._lock:
            if sealed:
                self._end("was committed", remove=False)
            elif self._unwanted:
                self._end("was dropped", remove=True)
            else:
                self._ended = ""

    def _end(self, how: str, *, remove: bool) -> None:
        self._ended = how
        self.payload.release(remove=remove)
        self._on_end(self)

    def _check_open(self) -> None:
        if self._ended:
            raise FailedPrecondition(f"this upload {self._ended}; begin a new one")

    def _check_finite(self, data: memoryview, offset: int) -> None:
        """Two integer maxima, of bit patterns as signed and unsigned, see any NaN or infinity at memory speed."""
        floats = data[: max(0, 2 * self.layout.plane_nbytes - offset)]
        signed, unsigned, infinity, minus_infinity = _BITS[self.layout.dtype]
        if floats and (
            np.frombuffer(floats, signed).max() >= infinity or np.frombuffer(floats, unsigned).max() >= minus_infinity
        ):
            raise InvalidArgument(f"keys or values hold NaN or infinity near byte {offset} of the part")

    def _note(self, chunk: int, crc: int) -> None:
        self._crcs[chunk] = crc
        self.received += self.layout.chunk_nbytes(chunk)


class RamPayload:
    """A small part's bytes."""

    path = None

    def __init__(self, nbytes: int):
        self.bytes = bytearray(nbytes)

    def write(self, data: memoryview, offset: int) -> None:
        self.bytes[offset : offset + len(data)] = data

    def release(self, *, remove: bool) -> None:
        self.bytes = bytearray()


class FilePayload:
    """A large part's bytes, in a file with room for the segment's header before them."""

    def __init__(self, vfs: Vfs, path: Path, nbytes: int, background: Executor):
        self.path = path
        self.nbytes = nbytes
        self._vfs = vfs
        self._background = background
        self._file: File = vfs.create(path, FILE_HEADER_BYTES + nbytes)
        self._written = self._unsynced = 0
        self._sync: Future[None] | None = None
        self._failed: FotError | None = None

    def write(self, data: memoryview, offset: int) -> None:
        self._check(wait=False)
        self._vfs.pwrite(self._file, data, FILE_HEADER_BYTES + offset)
        self._written += len(data)
        self._unsynced += len(data)
        if (self._unsynced >= SYNC_BYTES or self._written == self.nbytes) and self._sync is None:
            self._unsynced = 0
            self._sync = self._background.submit(self._vfs.fdatasync, self._file)

    def finish(self, header: bytes) -> None:
        """Write the header and make the whole file durable under its staging name."""
        assert len(header) == FILE_HEADER_BYTES
        self._check(wait=True)
        self._vfs.pwrite(self._file, header, 0)
        try:
            self._vfs.fdatasync(self._file)
        except FotError as error:
            self._failed = error
            raise

    def release(self, *, remove: bool) -> None:
        if self._sync is not None:
            self._sync.exception()
        self._vfs.close(self._file)
        if remove:
            self._vfs.unlink(self.path)

    def _check(self, *, wait: bool) -> None:
        """Raise what a background sync met, for good: a second sync would report success for pages already lost."""
        if self._sync is not None and (wait or self._sync.done()):
            error = self._sync.exception()
            self._sync = None
            if error is not None:
                assert isinstance(error, FotError), error
                self._failed = error
        if self._failed is not None:
            raise self._failed


def _planes(keys: Tensor, values: Tensor, ids: Tensor) -> Iterator[memoryview]:
    for tensor in (keys, values):
        if tensor.is_contiguous() and tensor.device.type == "cpu":
            yield _bytes(tensor)
        else:
            yield from (_bytes(head) for layer in tensor for head in layer)  # [T, D], whole in a longer document
    yield _bytes(ids)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _uint32(token_ids: Tensor | None, tokens: int) -> Tensor:
    if token_ids is None:
        return torch.zeros(tokens, dtype=torch.int32)
    if tuple(token_ids.shape) != (tokens,) or token_ids.is_floating_point():
        raise InvalidArgument(f"token_ids must be {tokens} integers, got {token_ids.dtype} {tuple(token_ids.shape)}")
    wide = token_ids.to(torch.int64)
    if not 0 <= int(wide.min()) <= int(wide.max()) < 2**32:
        raise InvalidArgument("token_ids must be 0 to 2^32 - 1")
    return wide.to(torch.uint32)
