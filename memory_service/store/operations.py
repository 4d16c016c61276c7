"""Long-running work: started once, watched by id, remembered in the catalogue."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from memory_service.errors import Cancelled, FotError, InvalidArgument, NotFound, ResourceExhausted
from memory_service.paging import page_size
from memory_service.storage.catalog import Catalog
from memory_service.storage.vfs import StorageFailed
from memory_service.types.callers import Cancel
from memory_service.types.listings import Page
from memory_service.types.operations import Operation, OperationKind, OperationState
from memory_service.verbs import ListOperations

log = logging.getLogger(__name__)

Work = Callable[[Callable[[int, int], None], Cancel], str]  # (progress(done, total), cancel) -> outcome

_KEPT = 1000  # Finished operations remembered.


def give_way() -> None:
    """Let the calling thread, and the threads it starts for arithmetic, run only when nobody else wants the cores."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class Operations:
    """Runs work two at a time. Thread-safe; `close` cancels what runs and waits for it."""

    def __init__(self, catalog: Catalog, storage_failed: Callable[[StorageFailed], None]):
        """`storage_failed` hears of an I/O error that ends all writing."""
        self._catalog = catalog
        self._storage_failed = storage_failed
        self._lock = threading.Lock()
        self._all: dict[str, tuple[str, Operation]] = {}  # By id: tenant, operation; oldest first.
        self._cancels: dict[str, Cancel] = {}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="fot-operation", initializer=give_way)
        for tenant, operation in sorted(catalog.operations(), key=lambda pair: pair[1].created_at)[-_KEPT:]:
            if operation.state is OperationState.RUNNING:
                message = "the service stopped before it was done; start it again"
                operation = replace(operation, state=OperationState.FAILED, message=message, updated_at=time.time())
                catalog.save_operation(tenant, operation)
            self._all[operation.id] = (tenant, operation)

    def find(self, tenant: str, memory: str, kind: OperationKind, snapshot: str) -> Operation | None:
        """The newest operation of this kind on the memory and the snapshot, if one is remembered."""
        wanted = (memory, kind, snapshot)
        return next((one for one in self.list(tenant, memory) if (one.memory, one.kind, one.snapshot) == wanted), None)

    def start(
        self,
        tenant: str,
        memory: str,
        kind: OperationKind,
        work: Work,
        snapshot: str = "",
        cancel: Cancel | None = None,
    ) -> Operation:
        """Run work in the background; if the memory already has such work running, that one.

        `cancel` is told when the work is cancelled.
        """
        now = time.time()
        wanted = (tenant, memory, kind, snapshot, OperationState.RUNNING)
        with self._lock:
            for owner, known in self._all.values():
                if (owner, known.memory, known.kind, known.snapshot, known.state) == wanted:
                    return known
            name, running = secrets.token_hex(12), OperationState.RUNNING
            operation = Operation(name, memory, kind, running, 0, 0, "", now, now, snapshot)
            self._all[operation.id] = (tenant, operation)
            for old in [key for key, (_, one) in self._all.items() if one.state is not OperationState.RUNNING][:-_KEPT]:
                del self._all[old]
            cancel = self._cancels[operation.id] = cancel or Cancel()
        try:
            self._catalog.save_operation(tenant, operation)
        except ResourceExhausted as error:  # Compaction is what a full disk needs.
            log.warning("a restart will not remember operation %s: %s", operation.id, error.message)
        except BaseException:
            with self._lock:
                del self._all[operation.id], self._cancels[operation.id]
            raise
        self._pool.submit(self._run, tenant, operation, work, cancel)
        return operation

    def get(self, tenant: str, operation_id: str) -> Operation:
        """An operation of this tenant; NotFound otherwise."""
        with self._lock:
            owner, operation = self._all.get(operation_id, ("", None))
        if operation is None or owner != tenant:
            raise NotFound(f"no operation {operation_id!r}")
        return operation

    def list(self, tenant: str, memory: str) -> list[Operation]:
        """The tenant's operations (of a memory), newest first."""
        with self._lock:
            mine = [one for owner, one in self._all.values() if owner == tenant and memory in ("", one.memory)]
        return sorted(mine, key=lambda one: (-one.created_at, one.id))

    def page(self, tenant: str, verb: ListOperations) -> Page[Operation]:
        """`list`, a page at a time. Raises InvalidArgument for a page token that is none of it."""
        known = {one.id: one for one in self.list(tenant, verb.memory)}
        ids = list(known)
        if verb.page_token and verb.page_token not in known:
            raise InvalidArgument("page_token is not of this listing; start again without it")
        start = ids.index(verb.page_token) + 1 if verb.page_token else 0
        size = page_size(verb.page_size)
        chosen = ids[start : start + size]
        return Page(tuple(known[one] for one in chosen), chosen[-1] if start + size < len(ids) else "")

    def cancel(self, tenant: str, operation_id: str) -> Operation:
        """Ask an operation to stop; it ends within a block of its work."""
        operation = self.get(tenant, operation_id)
        with self._lock:
            cancel = self._cancels.get(operation_id)
        if cancel is not None:
            cancel.cancel()
        return operation

    def cancel_memory(self, tenant: str, memory: str) -> None:
        """Ask everything that runs on a memory to stop."""
        for operation in self.list(tenant, memory):
            self.cancel(tenant, operation.id)

    def close(self) -> None:
        with self._lock:
            for cancel in self._cancels.values():
                cancel.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, tenant: str, operation: Operation, work: Work, cancel: Cancel) -> None:
        def progress(done: int, total: int) -> None:
            self._update(operation.id, done=done, total=total)

        try:
            message = work(progress, cancel)
            state = OperationState.DONE
        except Cancelled:
            message, state = "cancelled", OperationState.CANCELLED
        except FotError as error:
            self._heed(error)
            message, state = error.message, OperationState.FAILED
        except Exception:
            log.exception("operation %s on memory %s failed", operation.kind.value, operation.memory)
            message, state = "internal error; the service's log has the details", OperationState.FAILED
        with self._lock:
            self._cancels.pop(operation.id, None)
        ended = self._update(operation.id, state=state, message=message)
        try:
            self._catalog.save_operation(tenant, ended)
        except FotError as error:
            self._heed(error)
            log.warning("could not remember operation %s: %s", operation.id, error.message)

    def _heed(self, error: FotError) -> None:
        if isinstance(error, StorageFailed):
            self._storage_failed(error)

    def _update(self, operation_id: str, **changes: object) -> Operation:
        with self._lock:
            tenant, operation = self._all[operation_id]
            operation = replace(operation, updated_at=time.time(), **changes)  # type: ignore[arg-type]
            self._all[operation_id] = (tenant, operation)
            return operation
