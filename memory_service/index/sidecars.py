"""Directories of derived files that may vanish at any time: what is read back is what was written, or `Damaged`.

A directory holds blobs and a manifest with the length and CRC of each. The manifest is written last and carries its own
CRC, so a crash, a flipped bit, a cut or a missing file can only make the directory unreadable, never wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memory_service.checksums import crc32
from memory_service.errors import DataLoss
from memory_service.storage.vfs import Buffer, Vfs, replace_file

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20


class Damaged(Exception):
    """The directory is missing or not as it was written; remove it and derive it again."""


def write(
    vfs: Vfs,
    directory: Path,
    about: Mapping[str, Any],
    blobs: Iterable[tuple[str, Sequence[Buffer]]],
    *,
    sync: bool = False,
) -> None:
    """Replace `directory` by these named blobs, each given in pieces; on an error nothing of it remains.

    `about` is what to remember of the whole: JSON without floats. `sync` makes it survive a power loss at once; without
    it a power loss costs only deriving it again.
    """
    vfs.remove_directory(directory)
    vfs.make_directory(directory)
    try:
        files = {name: _write_blob(vfs, directory / name, pieces, sync) for name, pieces in blobs}
        body = json.dumps({"about": about, "files": files}, sort_keys=True, separators=(",", ":")).encode()
        replace_file(vfs, directory / MANIFEST, b"%08x\n" % crc32(body) + body, sync=sync)
    except BaseException:
        vfs.remove_directory(directory)
        raise


def read_manifest(vfs: Vfs, directory: Path) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """What was written of the whole, and the (length, CRC) of each blob by name."""
    try:
        checksum, _, body = vfs.read_file(directory / MANIFEST, MAX_MANIFEST_BYTES).partition(b"\n")
    except (FileNotFoundError, DataLoss) as error:
        raise Damaged(f"{directory.name}/{MANIFEST} cannot be read: {error}") from error
    if checksum != b"%08x" % crc32(body):
        raise Damaged(f"{directory.name}/{MANIFEST} does not match its checksum")
    manifest = json.loads(body)
    return manifest["about"], {name: (length, crc) for name, (length, crc) in manifest["files"].items()}


def read_blob(vfs: Vfs, path: Path, length: int, crc: int) -> bytes:
    """A blob, once its bytes matched the manifest."""
    try:
        data = vfs.read_file(path, length) if vfs.file_size(path) == length else b""
    except (FileNotFoundError, DataLoss) as error:
        raise Damaged(f"{path.name} cannot be read: {error}") from error
    if len(data) != length or crc32(data) != crc:
        raise Damaged(f"{path.name} does not match the manifest")
    return data


def _write_blob(vfs: Vfs, path: Path, pieces: Sequence[Buffer], sync: bool) -> tuple[int, int]:
    length = sum(memoryview(piece).nbytes for piece in pieces)
    file = vfs.create(path, length)
    try:
        offset = crc = 0
        for piece in pieces:
            if not memoryview(piece).nbytes:
                continue  # An empty view cannot be cast.
            view = memoryview(piece).cast("B")
            vfs.pwrite(file, view, offset)
            offset, crc = offset + view.nbytes, crc32(view, crc)
        if sync:
            vfs.fdatasync(file)
    finally:
        vfs.close(file)
    return length, crc
