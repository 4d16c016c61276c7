"""Documents on their way into a memory while the model works on the next ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from torch import Tensor

from memory_service import AlreadyExists, DocumentInfo, Memory
from memory_service.types.conditions import Scalar

WRITERS = 8  # Puts at once: those that commit together share one sync of the disk.
MOST_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """A document to be put."""

    id: str
    keys: Tensor  # [L, K, T, D]
    values: Tensor  # [L, K, T, D]
    token_ids: Tensor  # [T]
    metadata: Mapping[str, Scalar]
    replace: bool
    request_id: str | None = None  # The same one commits once, however often it is sent; None: a new one.

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class Uploads:
    """Puts in threads, a bounded number of bytes under way; the first failure stops everything not yet begun.

    `on_stored` is called, one call at a time, for every document that is durably stored. Leaving the `with` waits for
    what is under way and, unless another error is on its way, raises the first failure.
    """

    def __init__(
        self,
        memory: Memory,
        on_stored: Callable[[Outgoing], None],
        writers: int = WRITERS,
        most_bytes: int = MOST_BYTES,
    ):
        self._memory = memory
        self._on_stored = on_stored
        self._most_bytes = most_bytes
        self._state = threading.Condition()
        self._bytes = 0
        self._failure: Exception | None = None
        self._pool = ThreadPoolExecutor(writers, "fot-upload")

    def put(self, document: Outgoing) -> None:
        """Send a document on its way; waits while too many bytes are. Raises the first failure of any put."""
        with self._state:
            self._state.wait_for(
                lambda: self._failure or not self._bytes or self._bytes + document.nbytes <= self._most_bytes
            )
            self._raise_failure()
            self._bytes += document.nbytes
        self._pool.submit(self._put, document)

    def check(self) -> None:
        """Raise the first failure of any put."""
        with self._state:
            self._raise_failure()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.check()

    def _put(self, document: Outgoing) -> None:
        try:
            if self._failure is None:
                self._store(document)
                with self._state:
                    self._on_stored(document)
        except Exception as error:  # Raised by the caller's next put, or at the end.
            with self._state:
                self._failure = self._failure or error
        finally:
            with self._state:
                self._bytes -= document.nbytes
                self._state.notify_all()

    def _store(self, document: Outgoing) -> DocumentInfo:
        try:
            return self._memory.put(
                document.id,
                document.keys,
                document.values,
                token_ids=document.token_ids,
                metadata=document.metadata,
                replace=document.replace,
                request_id=document.request_id,
            )
        except AlreadyExists:
            # Somebody else runs the same ingest, or the answer to an earlier attempt was lost.
            stored = self._memory.get(document.id)
            if stored.metadata != document.metadata:
                raise
            return stored

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
