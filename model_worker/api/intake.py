"""Documents on their way in: texts are encoded and stored, batch after batch, however many callers send."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from memory_service import Memory
from memory_service.errors import InvalidArgument, ResourceExhausted
from memory_service.types.conditions import Scalar
from memory_service.types.documents import check_document_id
from model_worker.corpus import Source
from model_worker.corpus.source import fitting
from model_worker.decoder.model import FotModel
from model_worker.ingestion.encoding import Encoder
from model_worker.ingestion.ingest import ingest
from model_worker.ingestion.intake import IngestReport, settings_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Intake:
    """Encodes in a thread of its own beside the one that answers: attention's state travels with each call.

    Costs the time of the forward pass, and one commit a document, several at once.
    """

    def __init__(self, model: FotModel, tokenizer: PreTrainedTokenizerBase, most_bytes: int):
        """`most_bytes` of text wait at most."""
        self._encoder = Encoder(model)
        self._settings = settings_of(self._encoder)
        self._tokenizer = tokenizer
        self._most_bytes = most_bytes
        self._bytes = 0
        self._pool = ThreadPoolExecutor(1, "fot-intake")

    async def put(self, memory: Memory, documents: Sequence[Source], replace: bool = False) -> IngestReport:
        """Store documents that the memory does not hold as they are sent; durable on return.

        Raises ResourceExhausted if too much waits, and what `ingest` does.
        """
        size = sum(one.size for one in documents)
        if self._bytes and self._bytes + size > self._most_bytes:
            raise ResourceExhausted("too many documents wait to be encoded", retry_after_s=2.0)
        self._bytes += size
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._pool, self._ingest, memory, documents, replace
            )
        finally:
            self._bytes -= size

    def close(self) -> None:
        """Finish what is under way and end the thread."""
        self._pool.shutdown(wait=True)

    def _ingest(self, memory: Memory, documents: Sequence[Source], replace: bool) -> IngestReport:
        return ingest(documents, self._encoder, self._tokenizer, memory, settings=self._settings, replace=replace)


def source_of(document: str, text: str, metadata: Mapping[str, Scalar]) -> Source:
    """A document as ingest takes it. Raises InvalidArgument for an id or metadata that a memory cannot keep."""
    check_document_id(document)
    kept, left_out = fitting(metadata)
    if left_out:
        name, why = next(iter(left_out.items()))
        raise InvalidArgument(f"metadata {name!r} of document {document!r} {why}", field="metadata")
    return Source(document, text=text, metadata=kept, size=len(text.encode("utf-8", "surrogatepass")))
