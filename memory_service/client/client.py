"""All memories of one place: list, create, open, delete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Self, TypeVar

from memory_service.client.connection import Connection
from memory_service.client.memory import Memory
from memory_service.client.opening import TIMEOUT_S, open_place
from memory_service.places.targets import Tls
from memory_service.settings import StoreOptions
from memory_service.types.listings import MAX_PAGE_SIZE
from memory_service.types.memories import MemoryInfo, Stats
from memory_service.types.operations import Operation
from memory_service.types.snapshots import Snapshot
from memory_service.types.specs import MemorySpec
from memory_service.verbs import (
    DeleteMemory,
    DeleteSnapshot,
    GetOperation,
    GetSnapshot,
    GetStats,
    ListMemories,
    ListOperations,
    ListSnapshots,
    RestoreSnapshot,
    Verb,
)

Answer = TypeVar("Answer")


class Client:
    """All memories of one place that the caller may see."""

    def __init__(self, connection: Connection):
        """Made by `Client.open`."""
        self.connection = connection

    @classmethod
    def open(
        cls,
        target: str | Path,
        *,
        token: str | Path | None = None,
        tls: Tls | None = None,
        insecure: bool = False,
        timeout_s: float = TIMEOUT_S,
        options: StoreOptions | None = None,
        on_missing: str | None = None,
        create: bool = True,
    ) -> Self:
        """Open ":memory:", a directory, "grpc://host:port", "grpcs://host:port" or "unix:path".

        `token` is the credential itself, or a Path to a file that holds it; by default FOT_TOKEN or FOT_TOKEN_FILE.
        A token is sent in clear over grpc:// to another machine only if `insecure` says so. `timeout_s` is the
        default of every call. `options` are an embedded store's. `create` false: the directory must exist.
        """
        return cls(Connection(open_place(target, token, tls, insecure, options, create, on_missing), timeout_s))

    def memories(self) -> Iterator[MemoryInfo]:
        """All memories, by name."""
        return self.connection.items(lambda page: ListMemories(MAX_PAGE_SIZE, page))

    def memory(self, name: str = "default", spec: MemorySpec | None = None) -> Memory:
        """One memory; with a spec it is created if there is none.

        Raises NotFound without a spec, WrongModel or AlreadyExists if it exists with another one.
        """
        return Memory(self.connection, self.connection.find_memory(name, spec), owner=False)

    def delete(self, name: str) -> None:
        """Delete a memory with its documents and sessions."""
        self.run(DeleteMemory(name))

    def stats(self) -> Stats:
        """Figures of all memories together."""
        return self.run(GetStats())

    def operations(self, memory: str = "") -> Iterator[Operation]:
        """Long-running work, of one memory or of all, newest first."""
        return self.connection.items(lambda page: ListOperations(memory, MAX_PAGE_SIZE, page))

    def operation(self, operation_id: str) -> Operation:
        """How far an operation has come."""
        return self.run(GetOperation(operation_id))

    def wait(self, operation: Operation, timeout_s: float | None = None) -> Operation:
        """Wait until an operation has ended, well or not; look at its `state`. Raises DeadlineExceeded."""
        return self.connection.wait(operation, timeout_s)

    def snapshots(self, memory: str = "") -> Iterator[Snapshot]:
        """Snapshots by id: of the memory that had a name, whether it is still there or not, or of all."""
        return self.connection.items(lambda page: ListSnapshots(memory, MAX_PAGE_SIZE, page))

    def snapshot(self, snapshot: str) -> Snapshot:
        """What is known of a snapshot. Raises NotFound."""
        return self.run(GetSnapshot(snapshot))

    def delete_snapshot(self, snapshot: str) -> None:
        """Delete a snapshot; durable on return. Raises NotFound."""
        self.run(DeleteSnapshot(snapshot))

    def restore(self, snapshot: str, name: str = "") -> Operation:
        """Begin to make a memory of a snapshot, of the name it had or of another. `wait` for the operation.

        The memory appears, whole, once every byte was checked; if one is damaged, the operation fails and nothing is
        left. Raises NotFound, AlreadyExists if the name is taken, DataLoss, QuotaExceeded.
        """
        return self.run(RestoreSnapshot(snapshot, name))

    def run(self, verb: Verb[Answer], timeout_s: float | None = None) -> Answer:
        """Ask one verb, as `memory_service.verbs` defines it."""
        return self.connection.run(verb, timeout_s)

    def close(self) -> None:
        """Let go of the connection or of the directory. Harmless twice."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.connection.target!r})"
