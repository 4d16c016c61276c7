"""The thread that looks after memories between calls, so that callers never wait for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from memory_service.errors import FotError
from memory_service.live_memory import LiveMemory
from memory_service.operations import Operations
from memory_service.types import Cancel, OperationKind, OperationState
from memory_service.upkeep import Upkeep
from memory_service.vfs import StorageFailed

log = logging.getLogger(__name__)

_TICK_S = 0.5
_CALM_S = 60.0  # After an operation failed, the same is not started by itself for so long.


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
        self._seen: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, name="fot-upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._cancel.cancel()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(_TICK_S):
            for chore in self._chores:
                self._try(chore)
            for memory in self._memories():
                version = memory.version
                if self._seen.get(memory.row.key) != version and not self._stopping.is_set() and self._writable():
                    self._try(lambda memory=memory: self._look_after(memory))  # type: ignore[misc]
                    self._seen[memory.row.key] = version

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except StorageFailed as error:
            self._storage_failed(error)
        except FotError as error:
            if not self._stopping.is_set():
                log.warning("upkeep failed: %s", error.message)
        except Exception:
            log.exception("upkeep failed")

    def _look_after(self, memory: LiveMemory) -> None:
        self._upkeep.warm(memory, self._cancel)
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
