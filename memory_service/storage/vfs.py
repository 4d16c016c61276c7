"""The few file operations a data directory needs, behind one seam: the real disk, or one that fails on purpose.

Every failed operation raises one of our errors, so no caller handles an errno.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from memory_service.errors import DataLoss, FailedPrecondition, FotError, ResourceExhausted, Unavailable

Buffer = bytes | bytearray | memoryview
MAX_READ_FILE = 64 << 20

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNLINKABLE = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_BUSY = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class StorageFailed(Unavailable):
    """The disk failed to write or sync; what it holds is unknown, so the store turns read-only for good."""

    reason = "STORAGE_FAILED"


class CannotLink(FotError):
    """The file system gives a file no second name there: it is another one, or knows no hard links."""


class File(Protocol):
    """An open file; only the Vfs that opened it looks inside."""

    @property
    def path(self) -> Path: ...


class Vfs(Protocol):
    """File operations. Full disk: ResourceExhausted. Any other failed write or sync: StorageFailed, never retried."""

    def create(self, path: Path, size: int) -> File:
        """Create a new file of `size` bytes, all of them allocated now; it must not exist."""

    def open(self, path: Path, *, write: bool = False) -> File:
        """Open an existing file; FileNotFoundError if there is none."""

    def allocate(self, file: File, size: int) -> None:
        """Grow the file to `size` allocated bytes; the new ones read as zeros."""

    def pwrite(self, file: File, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`."""

    def pread(self, file: File, out: memoryview, offset: int) -> None:
        """Fill `out` from `offset`; DataLoss if the file ends before or the disk cannot read it."""

    def fsync(self, file: File) -> None:
        """Make the file's bytes and all its attributes durable."""

    def fdatasync(self, file: File) -> None:
        """Make the file's bytes and length durable."""

    def close(self, file: File) -> None:
        """Close the file; closing twice is harmless."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename atomically, replacing `target`; durable after `fsync_directory` of the target's directory."""

    def link(self, source: Path, target: Path) -> None:
        """Give a regular file a second name, which must be free; durable after `fsync_directory` of its directory.

        CannotLink where the file system does not; FileNotFoundError if there is no source.
        """

    def unlink(self, path: Path) -> None:
        """Remove a file; a missing one is fine."""

    def fsync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""

    def make_directory(self, path: Path) -> None:
        """Create a directory and its parents; an existing one is fine."""

    def remove_directory(self, path: Path) -> None:
        """Remove a directory with all it holds; a missing one is fine."""

    def list_directory(self, path: Path) -> list[str]:
        """Sorted names in a directory; none if it is missing."""

    def read_file(self, path: Path, limit: int = MAX_READ_FILE) -> bytes:
        """A whole small file; FileNotFoundError if missing, DataLoss if longer than `limit`."""

    def file_size(self, path: Path) -> int:
        """Length in bytes; FileNotFoundError if missing."""

    def lock(self, path: Path) -> File:
        """Take the lock file for this process until `close`; FailedPrecondition if someone else holds it."""


class OsFile:
    """A file of the operating system."""

    __slots__ = ("fd", "path")

    def __init__(self, path: Path, fd: int):
        self.path = path
        self.fd = fd


class OsVfs:
    """The real disk. Files are readable by their owner only."""

    def create(self, path: Path, size: int) -> OsFile:
        with _translated("create", path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        file = OsFile(path, fd)
        try:
            self.allocate(file, size)
        except BaseException:
            self.close(file)
            self.unlink(path)
            raise
        return file

    def open(self, path: Path, *, write: bool = False) -> OsFile:
        with _translated("open", path, missing_is_normal=True):
            # Non-blocking: what stands in a pipe's place of a file must not be waited for. Files do not care.
            flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            return OsFile(path, os.open(path, flags))

    def allocate(self, file: File, size: int) -> None:
        if size:
            with _translated("allocate", file.path):
                os.posix_fallocate(_fd(file), 0, size)

    def pwrite(self, file: File, data: Buffer, offset: int) -> None:
        rest = memoryview(data).cast("B")
        fd = _fd(file)
        with _translated("write", file.path):
            while rest:
                written = os.pwrite(fd, rest, offset)
                rest, offset = rest[written:], offset + written

    def pread(self, file: File, out: memoryview, offset: int) -> None:
        fd = _fd(file)
        with _translated("read", file.path):
            while out:
                got = os.preadv(fd, [out], offset)
                if not got:
                    raise DataLoss(f"{file.path.name} ends at byte {offset}, before what it should hold")
                out, offset = out[got:], offset + got

    def fsync(self, file: File) -> None:
        with _translated("sync", file.path):
            os.fsync(_fd(file))

    def fdatasync(self, file: File) -> None:
        with _translated("sync", file.path):
            os.fdatasync(_fd(file))

    def close(self, file: File) -> None:
        assert isinstance(file, OsFile)
        fd, file.fd = file.fd, -1
        if fd >= 0:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        with _translated("rename", source):
            os.rename(source, target)  # noqa: PTH104 - one style for all calls of this file

    def link(self, source: Path, target: Path) -> None:
        with _translated("link", source, missing_is_normal=True):
            if not stat.S_ISREG(source.lstat().st_mode):
                raise DataLoss(f"{source.name} is not a regular file")
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError as error:
                if error.errno in _UNLINKABLE:
                    raise CannotLink(f"{source.name} cannot be linked: {error.strerror}") from error
                raise

    def unlink(self, path: Path) -> None:
        with _translated("unlink", path):
            path.unlink(missing_ok=True)

    def fsync_directory(self, path: Path) -> None:
        with _translated("sync", path):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def make_directory(self, path: Path) -> None:
        with _translated("create", path):
            missing = [one for one in (path, *path.parents) if not one.is_dir()]
            for one in reversed(missing):
                one.mkdir(mode=0o700, exist_ok=True)

    def remove_directory(self, path: Path) -> None:
        with _translated("remove", path):
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                if path.exists():
                    raise

    def list_directory(self, path: Path) -> list[str]:
        with _translated("list", path):
            try:
                return sorted(os.listdir(path))  # noqa: PTH208 - names, not paths
            except FileNotFoundError:
                return []

    def read_file(self, path: Path, limit: int = MAX_READ_FILE) -> bytes:
        with _translated("read", path, missing_is_normal=True), path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise DataLoss(f"{path.name} is longer than {limit} bytes; it is not one of ours")
        return data

    def file_size(self, path: Path) -> int:
        with _translated("read", path, missing_is_normal=True):
            return path.stat().st_size

    def lock(self, path: Path) -> OsFile:
        with _translated("lock", path):
            file = OsFile(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            try:
                fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(file.fd, 32, 0).decode("ascii", "replace").strip()
                self.close(file)
                raise FailedPrecondition(
                    f"{path.parent} is in use by process {holder or 'unknown'}; one process may open a data directory: "
                    "stop it, or connect to it over gRPC",
                    reason="DIRECTORY_IN_USE",
                ) from None
            os.ftruncate(file.fd, 0)
            os.pwrite(file.fd, f"{os.getpid()}\n".encode(), 0)
        return file


def replace_file(vfs: Vfs, path: Path, data: Buffer, *, sync: bool = True) -> None:
    """Write a whole file so that a crash leaves the old or the new one: the rename commits, durably if `sync`."""
    aside = path.with_name(path.name + ".new")
    vfs.unlink(aside)
    file = vfs.create(aside, memoryview(data).nbytes)
    try:
        vfs.pwrite(file, data, 0)
        if sync:
            vfs.fdatasync(file)
    except BaseException:
        vfs.close(file)
        vfs.unlink(aside)
        raise
    vfs.close(file)
    vfs.rename(aside, path)
    if sync:
        vfs.fsync_directory(path.parent)


def storage_error(error: OSError, action: str, path: Path) -> FotError:
    """The one table from errno to our errors."""
    what = f"cannot {action} {path.name}: {error.strerror or error}"
    if error.errno in _FULL:
        return ResourceExhausted(
            f"{what}; free disk space (delete documents, compact) and try again", reason="DISK_FULL"
        )
    if error.errno in _BUSY:
        return ResourceExhausted(f"{what}; raise the process's limits (ulimit -n) or try later", retry_after_s=1.0)
    if action in ("open", "read", "list"):
        return DataLoss(what)
    return StorageFailed(f"{what}; the store is read-only until it is restarted on a sound disk")


@contextmanager
def _translated(action: str, path: Path, *, missing_is_normal: bool = False) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if missing_is_normal and isinstance(error, FileNotFoundError):
            raise
        raise storage_error(error, action, path) from error


def _fd(file: File) -> int:
    assert isinstance(file, OsFile) and file.fd >= 0, "the file is closed or of another Vfs"
    return file.fd
