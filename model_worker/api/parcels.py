"""Documents as they come in a stream of messages: put together, and handed on in batches."""

from __future__ import annotations

from memory_service import Memory
from memory_service.errors import InvalidArgument
from memory_service.types.callers import Identity
from model_worker.api.intake import source_of
from model_worker.api.limits import BATCH_BYTES, BATCH_DOCUMENTS
from model_worker.api.messages import read_metadata
from model_worker.api.worker import Worker
from model_worker.corpus import Source
from model_worker.v1 import model_worker_pb2 as pb


class Parcels:
    """One call of PutDocuments. Holds one document and one batch at most."""

    def __init__(self, worker: Worker, caller: Identity):
        self._worker = worker
        self._caller = caller
        self._memory: Memory | None = None
        self._replace = False
        self._batch: list[Source] = []
        self._open: pb.PutDocumentsRequest | None = None  # The first message of a document that is not whole.
        self._texts: list[str] = []
        self._told = pb.PutDocumentsResponse()

    async def take(self, message: pb.PutDocumentsRequest) -> None:
        """Take the next message; returns once there is room for another. Raises InvalidArgument, NotFound, …"""
        if self._memory is None:
            self._memory = await self._worker.memory(self._caller, message.collection)
            self._replace = message.replace
        elif message.collection not in ("", self._memory.name):
            raise InvalidArgument("all documents of a call go to one collection", field="collection")
        if self._open is None:
            self._open = message
        elif message.id != self._open.id:
            raise InvalidArgument(f"document {self._open.id!r} ended in the middle: its text goes on", field="id")
        self._texts.append(message.text)
        if sum(map(len, self._texts)) > self._worker.limits.document_bytes:
            raise InvalidArgument(f"a document has at most {self._worker.limits.document_bytes} bytes", field="text")
        if message.more:
            return
        self._batch.append(source_of(self._open.id, "".join(self._texts), read_metadata(dict(self._open.metadata))))
        self._open, self._texts = None, []
        if len(self._batch) >= BATCH_DOCUMENTS or sum(one.size for one in self._batch) >= BATCH_BYTES:
            await self._store()

    async def end(self) -> pb.PutDocumentsResponse:
        """Store what is left and tell what was done. Raises InvalidArgument for a document that is not whole."""
        if self._open is not None:
            raise InvalidArgument(f"document {self._open.id!r} ended in the middle: its text goes on", field="text")
        await self._store()
        return self._told

    async def _store(self) -> None:
        if self._memory is None or not self._batch:
            return
        batch, self._batch = self._batch, []
        report = await self._worker.intake.put(self._memory, batch, self._replace)
        self._told.added += report.added
        self._told.replaced += report.replaced
        self._told.unchanged += report.unchanged
        self._told.tokens += report.tokens
        self._told.left_out += sum(one.times for one in report.left_out)
