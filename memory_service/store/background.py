"""The thread that looks after memories between calls, so that callers never wait for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memory_service.errors import FotError
from memory_service.storage.vfs import StorageFailed
from memory_service.store.live_memory import LiveMemory
from memory_service.store.operations import Operations, give_way
from memory_service.store.upkeep import Upkeep
from memory_service.types.callers import Cancel
from memory_service.types.operations import OperationKind, OperationState

log = logging.getLogger(__name__)

_TICK_S = 0.5
_QUIET_S = 2.0  # A memory nobody wrote to for so long is compacted and indexed, …
_PATIENCE_S = 60.0  # … and one that is written to all the time, this often.
_CALM_S = 60.0  # After an operation failed, the same is not started by itself for so long.


@dataclass(slots=True)
class _Seen:
    """What is known of a memory since the last visit."""

    changed_at: float
    tended_at: float
    version: int = -1
    tended_version: int = -1


class Background:
    """Warms, compacts and indexes memories that changed. `stop` waits for the step under way."""

    def __init__(
        self,
        memories: Callable[[], Sequence[LiveMemory]],
        upkeep: Upkeep,
        operations: Operations,
        writable: Callable[[], bool],
        chores: Sequence[Callable[[], None]],
        storage_failed: Callable[[StorageFailed], None],
    ):
        """`chores` run at every tick: they are cheap and drop what ran out; `storage_failed` hears of an I/O error."""
        self._memories = memories
        self._upkeep = upkeep
        self._operations = operations
        self._writable = writable
        self._chores = chores
        self._storage_failed = storage_failed
        self._stopping = threading.Event()
        self._cancel = Cancel()
        self._seen: dict[str, _Seen] = {}  # By the memory's key.
        self._thread = threading.Thread(target=self._run, name="fot-upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._cancel.cancel()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        give_way()
        while not self._stopping.wait(_TICK_S):
            for chore in self._chores:
                self._try(chore)
            for memory in self._memories():
                if not self._stopping.is_set() and self._writable():
                    self._visit(memory)

    def _visit(self, memory: LiveMemory) -> None:
        """Warm what is new at once; compact and index when writers pause, or when they have not for long."""
        now = time.monotonic()
        seen = self._seen.setdefault(memory.row.key, _Seen(changed_at=now, tended_at=now))
        if seen.version != memory.version:
            self._try(lambda: self._upkeep.warm(memory, self._cancel))
            seen.version, seen.changed_at = memory.version, now
        quiet, patience = now - seen.changed_at, now - seen.tended_at
        if seen.tended_version != memory.version and (quiet >= _QUIET_S or patience >= _PATIENCE_S):
            self._try(lambda: self._tend(memory))
            seen.tended_version, seen.tended_at = memory.version, now

    def _try(self, step: Callable[[], object]) -> None:
        try:
            step()
        except StorageFailed as error:
            self._storage_failed(error)
        except FotError as error:
            if not self._stopping.is_set():
                log.warning("upkeep failed: %s", error.message)
        except Exception:
            log.exception("upkeep failed")

    def _tend(self, memory: LiveMemory) -> None:
        row = memory.row
        if self._upkeep.wants_compaction(memory) and self._calm(memory, OperationKind.COMPACT):
            self._operations.start(
                row.tenant,
                row.name,
                OperationKind.COMPACT,
                lambda progress, cancel: self._upkeep.compact(memory, progress, cancel, force=False),
            )
        if self._upkeep.wants_index(memory) and self._calm(memory, OperationKind.INDEX):
            self._operations.start(
                row.tenant,
                row.name,
                OperationKind.INDEX,
                lambda progress, cancel: self._upkeep.build_index(memory, progress, cancel),
            )

    def _calm(self, memory: LiveMemory, kind: OperationKind) -> bool:
        """Whether the last such operation on the memory did not fail just now."""
        for operation in self._operations.list(memory.row.tenant, memory.row.name):
            if operation.kind is kind and operation.state is not OperationState.RUNNING:
                return operation.state is OperationState.DONE or time.time() - operation.updated_at > _CALM_S
        return True
