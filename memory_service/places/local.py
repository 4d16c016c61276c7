"""A store in this process, opened once a directory however many hold it."""

from __future__ import annotations

import asyncio
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from memory_service.errors import FailedPrecondition
from memory_service.pieces import cut_attend, join_attended
from memory_service.places.place import closed
from memory_service.places.targets import IN_MEMORY
from memory_service.settings import StoreOptions
from memory_service.types.callers import Cancel, Identity, Role
from memory_service.types.questions import MAX_QUERIES
from memory_service.verbs import Attend, Verb

if TYPE_CHECKING:
    from memory_service.store.store import Store

Answer = TypeVar("Answer")

EMBEDDED = Identity("default", Role.ADMIN)  # Who holds a store in their own process may do everything.


class LocalPlace:
    """A store in this process. Stores of a directory are shared and closed by the last who lets go."""

    remote = False

    def __init__(self, directory: Path | None, options: StoreOptions | None = None):
        self.target = IN_MEMORY if directory is None else str(directory)
        if directory is None:
            self._store = _open_store(None, options or StoreOptions())
            self._release = weakref.finalize(self, self._store.close)
        else:
            directory = directory.resolve()
            shared = _share(directory, options)
            self._store = shared.store
            self._release = weakref.finalize(self, partial(_let_go, directory, shared))

    def run(self, verb: Verb[Answer], timeout_s: float, cancel: Cancel | None = None) -> Answer:
        """Ask the store in the calling thread."""
        if not self._release.alive:
            raise closed(self.target)
        cancel = cancel or Cancel(timeout_s)
        if isinstance(verb, Attend) and _has_too_many_rows(verb):
            # What a service is asked in several messages, a store takes in several calls.
            messages, calls = cut_attend(verb)
            joined = join_attended(messages, [self._store.run(EMBEDDED, call, cancel) for call in calls])
            return cast(Answer, joined)
        return self._store.run(EMBEDDED, verb, cancel)

    def close(self) -> None:
        """Let go of the store. Harmless twice."""
        self._release()


def _has_too_many_rows(verb: Attend) -> bool:
    shapes = [group.queries.shape for group in verb.groups if group.queries.ndim == 3]
    return any(heads * queries > MAX_QUERIES for heads, queries, _ in shapes)


class AsyncLocalPlace:
    """A store in this process, asked in threads of the loop's executor."""

    def __init__(self, place: LocalPlace):
        self._place = place
        self.target = place.target

    async def run(self, verb: Verb[Answer], timeout_s: float) -> Answer:
        """Ask the store in another thread. Cancelling the task stops the work at its next block."""
        cancel = Cancel(timeout_s)
        try:
            return await asyncio.to_thread(self._place.run, verb, timeout_s, cancel)
        except asyncio.CancelledError:
            cancel.cancel()
            raise

    async def close(self) -> None:
        """Let go of the store. Harmless twice."""
        await asyncio.to_thread(self._place.close)


# --- Stores shared within the process -------------------------------------------------------------------------------


class _Shared:
    def __init__(self, store: Store, options: StoreOptions | None):
        self.store = store
        self.options = options
        self.holders = 0


# A directory has one owner at a time, so those in one process must find each other. Re-entrant because a holder may be
# collected, and so let go, while another is being opened in the same thread.
_shared: dict[Path, _Shared] = {}
_shared_lock = threading.RLock()


def _share(directory: Path, options: StoreOptions | None) -> _Shared:
    with _shared_lock:
        shared = _shared.get(directory)
        if shared is None:
            shared = _shared[directory] = _Shared(_open_store(directory, options or StoreOptions()), options)
        shared.holders += 1
    if options is not None and options != shared.options:
        _let_go(directory, shared)
        raise FailedPrecondition(f"{directory} is already open in this process with other options")
    return shared


def _let_go(directory: Path, shared: _Shared) -> None:
    with _shared_lock:
        shared.holders -= 1
        if shared.holders == 0:
            del _shared[directory]
            shared.store.close()


def _open_store(directory: Path | None, options: StoreOptions) -> Store:
    # Who talks to a service needs neither the store nor Faiss.
    from memory_service.store.store import Store

    return Store.open(directory, options)
