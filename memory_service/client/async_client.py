"""All memories of one place, for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self, TypeVar

from memory_service.client.async_memory import AsyncMemory
from memory_service.client.connection import AsyncConnection, Opening
from memory_service.client.opening import TIMEOUT_S, open_async_place
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


class AsyncClient:
    """All memories of one place that the caller may see."""

    def __init__(self, connection: AsyncConnection):
        """Made by `AsyncClient.open`."""
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
    ) -> Opening[Self]:
        """Open ":memory:", a directory, "grpc://host:port", "grpcs://host:port" or "unix:path".

        `token` is the credential itself, or a Path to a file that holds it; by default FOT_TOKEN or FOT_TOKEN_FILE.
        A token is sent in clear over grpc:// to another machine only if `insecure` says so. `timeout_s` is the
        default of every call. `options` are an embedded store's. `create` false: the directory must exist.
        """

        async def opened() -> Self:
            place = await open_async_place(target, token, tls, insecure, options, create, on_missing)
            return cls(AsyncConnection(place, timeout_s))

        return Opening(opened)

    def memories(self) -> AsyncIterator[MemoryInfo]:
        """All memories, by name."""
        return self.connection.items(lambda page: ListMemories(MAX_PAGE_SIZE, page))

    async def memory(self, name: str = "default", spec: MemorySpec | None = None) -> AsyncMemory:
        """One memory; with a spec it is created if there is none.

        Raises NotFound without a spec, WrongModel or AlreadyExists if it exists with another one.
        """
        return AsyncMemory(self.connection, await self.connection.find_memory(name, spec), owner=False)

    async def delete(self, name: str) -> None:
        """Delete a memory with its documents and sessions."""
        await self.run(DeleteMemory(name))

    async def stats(self) -> Stats:
        """Figures of all memories together."""
        return await self.run(GetStats())

    def operations(self, memory: str = "") -> AsyncIterator[Operation]:
        """Long-running work, of one memory or of all, newest first."""
        return self.connection.items(lambda page: ListOperations(memory, MAX_PAGE_SIZE, page))

    async def operation(self, operation_id: str) -> Operation:
        """How far an operation has come."""
        return await self.run(GetOperation(operation_id))

    async def wait(self, operation: Operation, timeout_s: float | None = None) -> Operation:
        """Wait until an operation has ended, well or not; look at its `state`. Raises DeadlineExceeded."""
        return await self.connection.wait(operation, timeout_s)

    def snapshots(self, memory: str = "") -> AsyncIterator[Snapshot]:
        """Snapshots by id: of the memory that had a name, whether it is still there or not, or of all."""
        return self.connection.items(lambda page: ListSnapshots(memory, MAX_PAGE_SIZE, page))

    async def snapshot(self, snapshot: str) -> Snapshot:
        """What is known of a snapshot. Raises NotFound."""
        return await self.run(GetSnapshot(snapshot))

    async def delete_snapshot(self, snapshot: str) -> None:
        """Delete a snapshot; durable on return. Raises NotFound."""
        await self.run(DeleteSnapshot(snapshot))

    async def restore(self, snapshot: str, name: str = "") -> Operation:
        """Begin to make a memory of a snapshot, of the name it had or of another. `wait` for the operation.

        The memory appears, whole, once every byte was checked; if one is damaged, the operation fails and nothing is
        left. Raises NotFound, AlreadyExists if the name is taken, DataLoss, QuotaExceeded.
        """
        return await self.run(RestoreSnapshot(snapshot, name))

    async def run(self, verb: Verb[Answer], timeout_s: float | None = None) -> Answer:
        """Ask one verb, as `memory_service.verbs` defines it."""
        return await self.connection.run(verb, timeout_s)

    async def close(self) -> None:
        """Let go of the connection or of the directory. Harmless twice."""
        await self.connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.connection.target!r})"
