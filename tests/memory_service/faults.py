"""A disk that fails on purpose, and all the states a power loss could leave it in.

`FaultVfs` works on a real directory and logs every change. `power_loss_states` replays the log: at every point, what
was synced survives for sure, and of the rest anything may, torn or whole. SQLite is taken to be atomic: its files are
recorded after every transaction (`note_catalog`) and come back as they were then.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from memory_service.storage.vfs import Buffer, File, OsFile, OsVfs, storage_error

SECTOR = 512
ACTIONS = {
    "create": "create",
    "allocate": "allocate",
    "pwrite": "write",
    "pread": "read",
    "fsync": "sync",
    "fdatasync": "sync",
    "rename": "rename",
    "link": "link",
    "unlink": "unlink",
    "fsync_directory": "sync",
    "make_directory": "create",
    "remove_directory": "remove",
}


class FaultFile(OsFile):
    """An open file that knows which of the logged files it is."""

    __slots__ = ("inode",)

    def __init__(self, path: Path, fd: int, inode: int):
        super().__init__(path, fd)
        self.inode = inode


@dataclass(frozen=True)
class Event:
    """One change, or a mark. `path` is relative to the root; `target` is a rename's."""

    kind: str  # An operation's name, "catalog" or "mark".
    path: str = ""
    target: str = ""
    inode: int = -1
    offset: int = 0  # Of a write; the new length for create and allocate.
    data: bytes = b""
    catalog: tuple[tuple[str, bytes], ...] = ()


@dataclass
class Fault:
    """Calls number `nth` to `nth + times - 1` of an operation, counted from now, fail with `error`."""

    operation: str
    nth: int
    error: int
    times: int
    seen: int = 0


@dataclass
class State:
    """A directory as a power loss left it."""

    name: str  # For the test's failure message: the point in the log, the kind, the seed.
    marks: tuple[str, ...]  # Set with `FaultVfs.mark` before that point: what was acknowledged.
    files: dict[str, bytes]
    directories: set[str]

    def materialise(self, directory: Path) -> None:
        """Write the state into an empty directory."""
        for name in sorted(self.directories):
            (directory / name).mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (directory / name).write_bytes(data)


class FaultVfs(OsVfs):
    """The real disk under `root`, logged, failing where told. `calls` counts operations by name."""

    def __init__(self, root: Path):
        self.root = root
        self.log: list[Event] = []
        self.calls: dict[str, int] = {}
        self._faults: list[Fault] = []
        self._forgotten: list[tuple[str, str]] = []
        self._inodes: dict[str, int] = {}
        self._lock = threading.RLock()
        self._baseline = _Disk()
        for path in sorted(root.rglob("*")):
            name = str(path.relative_to(root))
            if path.is_dir():
                self._baseline.names[name] = None
            elif not _is_catalog(name):
                self._inodes[name] = self._baseline.names[name] = len(self._inodes)
                self._baseline.inodes[self._inodes[name]] = _Inode(path.read_bytes())
            else:
                self._baseline.catalog[name] = path.read_bytes()
        self._next = len(self._inodes)

    def fail(self, operation: str, *, nth: int = 1, error: int = errno.ENOSPC, times: int = 1) -> None:
        """Let a later call of `operation` ("any" for whichever comes) fail; `times` may be large for "from then on"."""
        self._faults.append(Fault(operation, nth, error, times))

    def heal(self) -> None:
        """Let nothing fail any more."""
        self._faults.clear()

    def forget_syncs(self, operation: str, ending: str) -> None:
        """Let syncs of paths with this ending do nothing, as if the code had forgotten them."""
        self._forgotten.append((operation, ending))

    def mark(self, label: str) -> None:
        """Note in the log that something happened outside, such as an acknowledgement."""
        with self._lock:
            self.log.append(Event("mark", label))

    def note_catalog(self, path: Path) -> None:
        """Record the catalogue's files; to be called after each of its transactions."""
        found = [one for one in (path, path.with_name(path.name + "-wal")) if one.exists()]
        with self._lock:
            self.log.append(Event("catalog", catalog=tuple((self._name(one), one.read_bytes()) for one in found)))

    def power_loss_states(self, subsets: int = 2, seed: int = 0) -> Iterator[State]:
        """States at every point of the log: what was synced, everything, and `subsets` random, torn mixtures.

        States that look the same after the same marks come once.
        """
        disk, marks = self._baseline.copy(), list[str]()
        seen: set[int] = set()
        for point in range(len(self.log) + 1):
            name = f"{point}/{len(self.log)} {self.log[point - 1].kind} {self.log[point - 1].path}" if point else "0"
            states = [
                disk.state(f"{name}: synced", tuple(marks), None, 0.0),
                disk.state(f"{name}: everything", tuple(marks), None, 1.0),
            ]
            for number in range(subsets):
                dice = random.Random(f"{seed}/{point}/{number}")
                states.append(disk.state(f"{name}: mixture {number} of seed {seed}", tuple(marks), dice, 0.5))
            for state in states:
                look = hash((state.marks, frozenset(state.files.items()), frozenset(state.directories)))
                if look not in seen:
                    seen.add(look)
                    yield state
            if point < len(self.log):
                event = self.log[point]
                if event.kind == "mark":
                    marks.append(event.path)
                else:
                    disk.apply(event)

    # --- The operations ---------------------------------------------------------------------------------------------

    def create(self, path: Path, size: int) -> FaultFile:
        with self._lock:
            self._step("create", path)
            file = super().create(path, size)
            if _is_catalog(path.name):
                return FaultFile(path, file.fd, -1)
            inode = self._next = self._next + 1
            self._inodes[self._name(path)] = inode
            self.log.append(Event("create", self._name(path), inode=inode, offset=size))
            return FaultFile(path, file.fd, inode)

    def open(self, path: Path, *, write: bool = False) -> FaultFile:
        with self._lock:
            return FaultFile(path, super().open(path, write=write).fd, self._inodes.get(self._name(path), -1))

    def allocate(self, file: File, size: int) -> None:
        with self._lock:
            self._step("allocate", file.path)
            super().allocate(file, size)
            if isinstance(file, FaultFile):  # Not while `create` allocates, which logs the length itself.
                self._log(file, "allocate", offset=size)

    def pwrite(self, file: File, data: Buffer, offset: int) -> None:
        with self._lock:
            self._step("pwrite", file.path)
            super().pwrite(file, data, offset)
            self._log(file, "pwrite", offset=offset, data=bytes(memoryview(data).cast("B")))

    def pread(self, file: File, out: memoryview, offset: int) -> None:
        self._step("pread", file.path)
        super().pread(file, out, offset)

    def fsync(self, file: File) -> None:
        with self._lock:
            self._step("fsync", file.path)
            super().fsync(file)
            self._log(file, "fsync")

    def fdatasync(self, file: File) -> None:
        with self._lock:
            self._step("fdatasync", file.path)
            super().fdatasync(file)
            if not self._forgets("fdatasync", file.path):
                self._log(file, "fdatasync")

    def rename(self, source: Path, target: Path) -> None:
        with self._lock:
            self._step("rename", source)
            super().rename(source, target)
            inode = self._inodes.pop(self._name(source), None)
            if inode is not None:
                self._inodes[self._name(target)] = inode
                self.log.append(Event("rename", self._name(source), self._name(target), inode))

    def link(self, source: Path, target: Path) -> None:
        with self._lock:
            self._step("link", source)
            super().link(source, target)
            inode = self._inodes.get(self._name(source))
            if inode is not None:
                self._inodes[self._name(target)] = inode
                self.log.append(Event("link", self._name(source), self._name(target), inode))

    def unlink(self, path: Path) -> None:
        with self._lock:
            self._step("unlink", path)
            super().unlink(path)
            if self._inodes.pop(self._name(path), None) is not None:
                self.log.append(Event("unlink", self._name(path)))

    def fsync_directory(self, path: Path) -> None:
        with self._lock:
            self._step("fsync_directory", path)
            super().fsync_directory(path)
            if not self._forgets("fsync_directory", path):
                self.log.append(Event("fsync_directory", self._name(path)))

    def make_directory(self, path: Path) -> None:
        with self._lock:
            self._step("make_directory", path)
            made = [one for one in (*reversed(path.parents), path) if not one.is_dir()]
            super().make_directory(path)
            self.log += [Event("make_directory", self._name(one)) for one in made if self.root in one.parents]

    def remove_directory(self, path: Path) -> None:
        with self._lock:
            self._step("remove_directory", path)
            super().remove_directory(path)
            inside = [name for name in self._inodes if name.startswith(self._name(path) + "/")]
            for name in inside:
                del self._inodes[name]
            self.log.append(Event("remove_directory", self._name(path)))

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _step(self, operation: str, path: Path) -> None:
        with self._lock:
            self.calls[operation] = self.calls.get(operation, 0) + 1
            for fault in self._faults:
                if fault.operation in (operation, "any"):
                    fault.seen += 1
                    if fault.nth <= fault.seen < fault.nth + fault.times:
                        error = OSError(fault.error, os.strerror(fault.error))
                        raise storage_error(error, ACTIONS[operation], path) from error

    def _forgets(self, operation: str, path: Path) -> bool:
        return any(operation == one and str(path).endswith(ending) for one, ending in self._forgotten)

    def _log(self, file: File, kind: str, *, offset: int = 0, data: bytes = b"") -> None:
        if isinstance(file, FaultFile) and file.inode >= 0:
            self.log.append(Event(kind, self._name(file.path), inode=file.inode, offset=offset, data=data))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))


@dataclass
class _Inode:
    """A file's synced bytes, and what was done to it since, in order: (new length, None) or (offset, bytes)."""

    synced: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def content(self, dice: random.Random | None, chance: float) -> bytes:
        """The bytes after a power loss; each pending change survives with `chance`, a write perhaps in part."""
        data = bytearray(self.synced)
        for at, new in self.pending:
            if (dice.random() if dice else 0.5) >= chance:
                continue
            if new is None:
                data += bytes(max(0, at - len(data)))
                continue
            if dice and dice.random() < 0.5:
                new = new[: dice.randrange(0, len(new) + 1) // SECTOR * SECTOR]
            data += bytes(max(0, at + len(new) - len(data)))
            data[at : at + len(new)] = new
        return bytes(data)

    def sync(self) -> None:
        self.synced, self.pending = self.content(None, 1.0), []


@dataclass
class _Disk:
    """Synced names (a directory has no inode), and changes to names since, in order."""

    names: dict[str, int | None] = field(default_factory=dict)
    inodes: dict[int, _Inode] = field(default_factory=dict)
    pending: list[Event] = field(default_factory=list)
    catalog: dict[str, bytes] = field(default_factory=dict)

    def copy(self) -> _Disk:
        inodes = {number: _Inode(one.synced, list(one.pending)) for number, one in self.inodes.items()}
        return _Disk(dict(self.names), inodes, list(self.pending), dict(self.catalog))

    def apply(self, event: Event) -> None:
        match event.kind:
            case "create":
                self.inodes[event.inode] = _Inode(b"", [(event.offset, None)])
                self.pending.append(event)
            case "allocate":
                self.inodes[event.inode].pending.append((event.offset, None))
            case "pwrite":
                self.inodes[event.inode].pending.append((event.offset, event.data))
            case "fsync" | "fdatasync":
                self.inodes[event.inode].sync()
            case "rename" | "link" | "unlink" | "make_directory" | "remove_directory":
                self.pending.append(event)
            case "fsync_directory":
                here = [one for one in self.pending if event.path in _directories(one)]
                for one in here:
                    _rename(self.names, one)
                self.pending = [one for one in self.pending if one not in here]
            case "catalog":
                self.catalog = dict(event.catalog)
            case _:
                raise AssertionError(event)

    def state(self, name: str, marks: tuple[str, ...], dice: random.Random | None, chance: float) -> State:
        names = dict(self.names)
        for event in self.pending:
            if (dice.random() if dice else 0.5) < chance:
                _rename(names, event)
        directories = {one for one, inode in names.items() if inode is None} | {"."}
        reachable = {one for one in directories if all(up in directories for up in _parents(one))} | {"."}
        files = {
            one: self.inodes[inode].content(dice, chance)
            for one, inode in names.items()
            if inode is not None and _parent(one) in reachable
        }
        return State(name, marks, files | self.catalog, reachable)


def _rename(names: dict[str, int | None], event: Event) -> None:
    """Apply a change of names; one whose precondition did not survive changes nothing."""
    match event.kind:
        case "create":
            names[event.path] = event.inode
        case "link":
            names[event.target] = event.inode
        case "make_directory":
            names[event.path] = None
        case "unlink":
            names.pop(event.path, None)
        case "rename":
            if names.get(event.path) == event.inode:
                del names[event.path]
            names[event.target] = event.inode
        case "remove_directory":
            for name in [one for one in names if one == event.path or one.startswith(event.path + "/")]:
                del names[name]


def _directories(event: Event) -> tuple[str, ...]:
    """Where a change of names is to be synced; a link changes nothing where its source is."""
    if event.kind == "link":
        return (_parent(event.target),)
    return (_parent(event.path), _parent(event.target or event.path))


def _parent(name: str) -> str:
    return str(Path(name).parent)


def _parents(name: str) -> list[str]:
    return [str(one) for one in Path(name).parents]


def _is_catalog(name: str) -> bool:
    return Path(name).name.startswith("catalog.sqlite")


# --- Damage to files at rest ------------------------------------------------------------------------------------------


def flip_bit(path: Path, dice: random.Random) -> str:
    """Flip one bit; returns what was done."""
    data = bytearray(path.read_bytes())
    bit = dice.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bit {bit} of {path.name} flipped"


def truncate(path: Path, dice: random.Random) -> str:
    """Cut the file off somewhere; returns what was done."""
    size = dice.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.name} cut to {size} bytes"


def zero_page(path: Path, dice: random.Random) -> str:
    """Zero one page of 4 KiB; returns what was done."""
    data = bytearray(path.read_bytes())
    page = dice.randrange(-(-len(data) // 4096)) * 4096
    data[page : page + 4096] = bytes(len(data[page : page + 4096]))
    path.write_bytes(data)
    return f"page at {page} of {path.name} zeroed"
