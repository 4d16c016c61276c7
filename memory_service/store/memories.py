"""The open memories of a store, by tenant and name: created, found, deleted, and room kept for those to come."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from memory_service import verbs
from memory_service.attention.residency import Residency
from memory_service.errors import AlreadyExists, FotError, NotFound, QuotaExceeded
from memory_service.index.factories import check_factory
from memory_service.paging import page_of
from memory_service.settings import StoreOptions
from memory_service.storage.catalog import Catalog
from memory_service.storage.memory_file import MemoryFile
from memory_service.storage.records import MemoryRow
from memory_service.storage.segments import SegmentFiles
from memory_service.storage.tombstones import Tombstone
from memory_service.storage.vfs import StorageFailed
from memory_service.store.live_memory import LiveMemory
from memory_service.store.upkeep import Upkeep
from memory_service.types.listings import Page
from memory_service.types.memories import MemoryInfo
from memory_service.types.names import check_name

log = logging.getLogger(__name__)


class Memories:
    """All memories of a store, of all tenants. Thread-safe."""

    def __init__(
        self,
        catalog: Catalog,
        files: SegmentFiles | None,
        upkeep: Upkeep,
        options: StoreOptions,
        device: torch.device,
        storage_failed: Callable[[StorageFailed], None],
    ):
        """None is open before `load`. `storage_failed` hears of an I/O error that ends all writing."""
        self.residency = Residency(options.resident_bytes)
        self._catalog = catalog
        self._files = files
        self._upkeep = upkeep
        self._options = options
        self._device = device
        self._storage_failed = storage_failed
        self._lock = threading.Lock()
        self._open: dict[tuple[str, str], LiveMemory] = {}
        self._reserved: dict[tuple[str, str], int] = {}  # Bytes of memories that are being restored.

    def load(self) -> None:
        """Open what the catalogue knows, and remove what was derived from memories that are gone."""
        rows = self._catalog.memories()
        for row in rows:
            self.admit(row)
        self._upkeep.sweep_indexes({row.key for row in rows})

    def find(self, tenant: str, name: str) -> LiveMemory | None:
        """The tenant's memory of that name, if there is one."""
        return self._open.get((tenant, name))

    def get(self, tenant: str, name: str) -> LiveMemory:
        """The tenant's memory of that name. Raises NotFound, also for what is another tenant's."""
        memory = self.find(tenant, name)
        if memory is None:
            raise NotFound(f"no memory {name!r}; create it first")
        return memory

    def all(self) -> list[LiveMemory]:
        """Every tenant's."""
        with self._lock:
            return list(self._open.values())

    def of(self, tenant: str) -> list[LiveMemory]:
        """One tenant's."""
        with self._lock:
            return [memory for (owner, _), memory in self._open.items() if owner == tenant]

    def names(self) -> set[tuple[str, str]]:
        """The tenants and names of all."""
        with self._lock:
            return set(self._open)

    def bytes_of(self, tenant: str) -> int:
        """What counts towards the tenant's quota: what its memories hold, and what those to come will."""
        # Copies, for `reserve` asks with the lock held.
        reserved = sum(nbytes for (owner, _), nbytes in self._reserved.copy().items() if owner == tenant)
        return reserved + sum(one.nbytes for (owner, _), one in self._open.copy().items() if owner == tenant)

    def create(self, tenant: str, verb: verbs.CreateMemory) -> MemoryInfo:
        """A new memory, or the one there is with this spec. Raises AlreadyExists, QuotaExceeded, InvalidArgument."""
        check_name(verb.name, "a memory's name")
        verb.spec.check()
        check_factory(verb.spec.index.factory, verb.spec.head_dim)
        with self._lock:
            known = self._open.get((tenant, verb.name))
            if known is not None:
                if known.spec != verb.spec:
                    raise AlreadyExists(f"memory {verb.name!r} exists with another spec: {known.spec}")
                return known.info
            self._check_name_free(tenant, verb.name)
            created_at = verb.created_at or time.time()
            row = MemoryRow(secrets.token_hex(16), tenant, verb.name, verb.spec, created_at, 1)
            if self._files is not None:
                self._files.create_memory(row.key, MemoryFile(tenant, row.name, row.spec, row.created_at))
            self._catalog.create_memory(row)
            memory = self._open[tenant, verb.name] = LiveMemory(row, self._files, self.residency, self._device)
            return memory.info

    def list(self, tenant: str, verb: verbs.ListMemories) -> Page[MemoryInfo]:
        """The tenant's memories by name, a page at a time."""
        with self._lock:
            mine = sorted(name for owner, name in self._open if owner == tenant)
            names, rest = page_of(mine, verb.page_size, verb.page_token)
            return Page(tuple(self._open[tenant, name].held(verb.placement) for name in names), rest)

    def delete(self, tenant: str, name: str, let_go: Callable[[LiveMemory], None]) -> None:
        """Delete a memory; `let_go` ends what others hold of it. Raises NotFound. Readers under way finish."""
        memory = self.get(tenant, name)
        key = memory.row.key
        with memory.writing, self._lock:
            if self._open.get((tenant, name)) is not memory:
                raise NotFound(f"no memory {name!r}")
            self._catalog.delete_memory(key)
            del self._open[tenant, name]
            if self._files is not None:
                self._files.tombstones.add([Tombstone(key, "", 0)])
            let_go(memory)
            memory.close(lambda: self._reclaim(key))

    # --- Memories that are being restored -----------------------------------------------------------------------------

    def reserve(self, tenant: str, name: str, nbytes: int) -> None:
        """Keep a name and room for a memory that is to be. Raises AlreadyExists, QuotaExceeded."""
        with self._lock:
            if (tenant, name) in self._open:
                raise AlreadyExists(
                    f"there is a memory {name!r} already; restore under another name, or delete that one first"
                )
            self._check_name_free(tenant, name)
            limit, have = self._options.tenant_bytes, self.bytes_of(tenant)
            if limit is not None and have + nbytes > limit:
                raise QuotaExceeded(
                    f"the tenant holds {have:,} of {limit:,} bytes and the snapshot has {nbytes:,} more; delete "
                    "documents or ask the operator for a larger quota"
                )
            self._reserved[tenant, name] = nbytes

    def release(self, tenant: str, name: str) -> None:
        """The memory is there, or will not be."""
        with self._lock:
            del self._reserved[tenant, name]

    def admit(self, row: MemoryRow) -> None:
        """Serve a memory that the catalogue knows."""
        memory = self._load(row)
        with self._lock:
            self._open[row.tenant, row.name] = memory

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _check_name_free(self, tenant: str, name: str) -> None:
        if (tenant, name) in self._reserved:
            raise AlreadyExists(f"a memory {name!r} is being restored; wait for that operation, or cancel it")
        mine = [owner for owner, _ in (*self._open, *self._reserved) if owner == tenant]
        if len(mine) >= self._options.tenant_memories:
            raise QuotaExceeded(f"the tenant has {self._options.tenant_memories} memories, which is its limit")

    def _load(self, row: MemoryRow) -> LiveMemory:
        if self._files is not None:
            # A rebuilt catalogue does not know the generations of documents that compaction left no trace of: a new
            # document of the same id must not get one the log says was deleted.
            deleted = [number for (key, _), number in self._files.tombstones.entries.items() if key == row.key]
            row = replace(row, next_generation=max([row.next_generation, *(number + 1 for number in deleted)]))
        memory = LiveMemory(row, self._files, self.residency, self._device)
        if self._files is not None:
            entries = self._files.tombstones.entries.items()
            memory.graves.update((name, number) for (key, name), number in entries if key == row.key)
        segments = [(one.pk, one.ref) for one in self._catalog.segments(row.key)]
        memory.publish(self._catalog.documents(row.key), segments)
        self._upkeep.load_indexes(memory)
        return memory

    def _reclaim(self, key: str) -> None:
        """Remove a deleted memory's files. What a crash leaves, the next open removes."""
        try:
            self._upkeep.drop_indexes(key)
            if self._files is not None:
                self._files.drop_memory(key)
            self._catalog.forget_memory(key)
        except StorageFailed as error:
            self._storage_failed(error)
        except FotError as error:
            log.warning("could not remove a deleted memory's files yet: %s", error.message)
