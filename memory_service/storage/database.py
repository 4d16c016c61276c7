"""The catalogue's SQLite connection: the only file that knows SQLite.

One connection under one lock, because SQLite before 3.51.3 could corrupt a WAL that two connections checkpoint at once.
WAL with synchronous=FULL: a transaction is durable when `transaction` ends; that is what commits.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from memory_service.errors import DataLoss, FailedPrecondition, FotError, Internal, ResourceExhausted
from memory_service.storage.schema import APPLICATION_ID, DIGESTED, SCHEMA
from memory_service.storage.vfs import StorageFailed, Vfs

SQLITE_VERSION = sqlite3.sqlite_version
_DAMAGED = "the catalogue is damaged ({}); run `fot verify --rebuild-catalog` to rebuild it from the segments"
RESERVE_BYTES = 4 << 20
T = TypeVar("T")
Value = str | int | float | bytes | None
Row = tuple[Any, ...]


class Database:
    """One open database. Full disk: ResourceExhausted, nothing changed. I/O error: StorageFailed, outcome unknown."""

    def __init__(self, db: sqlite3.Connection, vfs: Vfs, reserve: Path | None, on_commit: Callable[[], None] | None):
        """Use `Database.open`."""
        self._db = db
        self._reserve = reserve
        self._vfs = vfs
        self._on_commit = on_commit
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: Path | None, vfs: Vfs, on_commit: Callable[[], None] | None) -> Database:
        """Open or create (None: in RAM), check every row, bring an older one up to date; DataLoss if damaged."""
        if path is not None:
            try:
                vfs.file_size(path)
            except FileNotFoundError:
                vfs.close(vfs.create(path, 0))  # By us, so that only its owner can read it; SQLite keeps the mode.
                vfs.fsync_directory(path.parent)
        # Nobody else may have it open, so waiting for a lock cannot help.
        db = sqlite3.connect(path or ":memory:", timeout=0.0, isolation_level=None, check_same_thread=False)
        try:
            with _translated():
                _configure(db)
                _migrate(db)
                _check(db)
        except BaseException:
            db.close()
            raise
        found = cls(db, vfs, path.with_name(path.name + "-reserve") if path else None, on_commit)
        found.keep_reserve()
        if on_commit:
            on_commit()
        return found

    def close(self) -> None:
        """Close the connection; SQLite folds the WAL into the file."""
        with self._lock, suppress(sqlite3.Error):
            self._db.close()

    def query(self, sql: str, *values: Value) -> list[Row]:
        """All rows of a statement."""
        with self._lock, _translated():
            return self._db.execute(sql, values).fetchall()

    def one(self, sql: str, *values: Value) -> Row | None:
        """The first row of a statement, if any."""
        rows = self.query(sql, *values)
        return rows[0] if rows else None

    def run(self, sql: str, *values: Value) -> None:
        """A statement that changes rows; only within `transaction`."""
        assert self._db.in_transaction
        self._db.execute(sql, values)

    def insert(self, table: str, row: tuple[Value, ...]) -> int:
        """Insert a whole row and return its primary key; only within `transaction`."""
        assert self._db.in_transaction
        marks = ", ".join("?" * len(row))
        cursor = self._db.execute(f"INSERT INTO {table} ({', '.join(DIGESTED[table])}) VALUES ({marks})", row)
        return cursor.lastrowid or 0

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block or nothing, durable at its end."""
        with self._lock:
            try:
                with _translated():
                    self._db.execute("BEGIN IMMEDIATE")
                    yield
                    self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    with suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
                raise
            if self._on_commit:
                self._on_commit()

    def with_reserve(self, work: Callable[[], T]) -> T:
        """Run a transaction that will free space; on a full disk, once more with the room kept back for it."""
        try:
            return work()
        except ResourceExhausted:
            if self._reserve is None:
                raise
            self._vfs.unlink(self._reserve)
            try:
                return work()
            finally:
                self.keep_reserve()

    def keep_reserve(self) -> None:
        """Keep room back, so that deleting works on a full disk; if the disk is full now, some other time."""
        if self._reserve is not None and self._reserve.name not in self._vfs.list_directory(self._reserve.parent):
            with suppress(ResourceExhausted):
                self._vfs.close(self._vfs.create(self._reserve, RESERVE_BYTES))

    def backup(self, path: Path) -> None:
        """Write a consistent copy, durable on return; a crash leaves the copy that was there before."""
        aside = path.with_name(path.name + ".new")
        self._vfs.unlink(aside)
        self._vfs.close(self._vfs.create(aside, 0))
        with self._lock, _translated():
            copy = sqlite3.connect(aside)
            try:
                self._db.backup(copy)
            finally:
                copy.close()
        file = self._vfs.open(aside, write=True)
        try:
            self._vfs.fsync(file)
        finally:
            self._vfs.close(file)
        self._vfs.rename(aside, path)
        self._vfs.fsync_directory(path.parent)


def _configure(db: sqlite3.Connection) -> None:
    db.create_function("fold", -1, _fold, deterministic=True)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA cell_size_check = ON")
    db.execute("PRAGMA temp_store = MEMORY")


def _migrate(db: sqlite3.Connection) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(SCHEMA):
        raise FailedPrecondition(
            f"the catalogue has version {version}, this program knows up to {len(SCHEMA)}; upgrade it"
        )
    for number, statements in enumerate(SCHEMA[version:], start=version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {statements} PRAGMA user_version = {number}; COMMIT;")


def _check(db: sqlite3.Connection) -> None:
    """Raise DataLoss unless structure, tables and rows are exactly what was written."""
    if db.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
        raise DataLoss(_DAMAGED.format("its header is not ours"))
    if (found := db.execute("PRAGMA integrity_check(1)").fetchone()) != ("ok",):
        raise DataLoss(_DAMAGED.format(found[0]))
    if db.execute("PRAGMA foreign_key_check").fetchone():
        raise DataLoss(_DAMAGED.format("a row points nowhere"))
    with sqlite3.connect(":memory:", isolation_level=None) as fresh:
        fresh.create_function("fold", -1, _fold, deterministic=True)
        _migrate(fresh)
        if _tables(fresh) != _tables(db):
            raise DataLoss(_DAMAGED.format("its tables are not ours"))
    fresh.close()
    digest = 0
    for table, columns in DIGESTED.items():
        for row in db.execute(f"SELECT {', '.join(columns)} FROM {table}"):
            digest = _fold(digest, table, *row)
    if db.execute("SELECT digest FROM state").fetchall() != [(digest,)]:
        raise DataLoss(_DAMAGED.format("a row does not match its checksum"))


def _tables(db: sqlite3.Connection) -> list[tuple[str, ...]]:
    return db.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name").fetchall()


def _fold(digest: int, *row: Value) -> int:
    """Fold a row into the digest, or out of it: the order of rows does not matter, their content does."""
    return digest ^ int.from_bytes(blake2b(repr(row).encode(), digest_size=8).digest(), "little", signed=True)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _storage_error(error) from error
    except UnicodeDecodeError as error:
        raise DataLoss(_DAMAGED.format("a text is not valid")) from error


def _storage_error(error: sqlite3.Error) -> FotError:
    """The one table from SQLite's result codes to our errors."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return ResourceExhausted(
            "the disk is full; free space (delete documents, compact) and try again", reason="DISK_FULL"
        )
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return StorageFailed(f"the catalogue cannot be written ({error}); the store is read-only until it is restarted")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return FailedPrecondition("another process has the catalogue open; one process may open a data directory")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_SCHEMA):
        return DataLoss(_DAMAGED.format(error))
    return Internal(f"the catalogue refused a statement: {error}")
