"""Documents: put, uploaded, committed, listed, deleted. A change is acknowledged when it is durable and visible."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable

from memory_service import verbs
from memory_service.errors import FailedPrecondition, InvalidArgument
from memory_service.paging import page_of
from memory_service.settings import StoreOptions
from memory_service.storage.catalog import Catalog
from memory_service.storage.parts import PartLayout
from memory_service.storage.records import RequestRow
from memory_service.storage.segments import SegmentFiles
from memory_service.storage.staging import RamPayload, Staging
from memory_service.storage.tombstones import Tombstone
from memory_service.storage.vfs import StorageFailed
from memory_service.store.commits import Commits, Job
from memory_service.store.live_memory import LiveMemory
from memory_service.store.uploads import PendingUpload, Request, Uploads
from memory_service.types.documents import Deleted, Document, DocumentInfo
from memory_service.types.listings import Page
from memory_service.types.specs import MemorySpec
from memory_service.types.uploads import Chunk, Upload


class Documents:
    """The documents of all memories of a store. Thread-safe."""

    def __init__(
        self,
        catalog: Catalog,
        files: SegmentFiles | None,
        options: StoreOptions,
        used: Callable[[str], int],
        storage_failed: Callable[[StorageFailed], None],
    ):
        """`used` tells a tenant's committed bytes; `storage_failed` hears of what ends all writing."""
        self._catalog = catalog
        self._files = files
        self._uploads = Uploads(options, self._stage, used)
        self._commits = Commits(catalog, files, storage_failed)

    def put(self, tenant: str, memory: LiveMemory, verb: verbs.PutDocument) -> DocumentInfo:
        """Store a document whose tensors are at hand."""
        memory.spec.check_model(verb.fingerprint)
        one = verb.document
        _check_tensors(memory.spec, one)
        request = Request(one.id, one.tokens, one.metadata, verb.conflict, verb.request_id, verb.generation)
        # The commit asks for the request id anyway; before it, only where the document is there already: the
        # catalogue is busy while others' commits are synced.
        known = self._commits.known(tenant, request) if one.id in memory.documents else None
        if known is not None:
            return known
        upload = self._uploads.begin(tenant, memory, request)
        try:
            with upload.lock:
                first = 0
                for staging in upload.stagings:
                    piece = slice(first, first + staging.layout.tokens)
                    first = piece.stop
                    if not staging.received:
                        ids = None if one.token_ids is None else one.token_ids[piece]
                        staging.fill(one.keys[:, :, piece], one.values[:, :, piece], ids)
            info = self._commit(upload)
            self._uploads.forget(upload)
            return info
        except BaseException:
            self._uploads.abort(tenant, upload.id)
            raise

    def begin(self, tenant: str, memory: LiveMemory, verb: verbs.BeginUpload) -> Upload:
        """Reserve room for a document that comes in chunks."""
        memory.spec.check_model(verb.fingerprint)
        request = Request(verb.document, verb.tokens, verb.metadata, verb.conflict, verb.request_id, verb.generation)
        known = self._commits.known(tenant, request)
        if known is not None:
            return PendingUpload("", tenant, memory, request, [], time.time(), known).info
        return self._uploads.begin(tenant, memory, request).info

    def write(self, tenant: str, memory: LiveMemory, upload_id: str, chunk: Chunk) -> None:
        """Take a chunk of an upload."""
        upload = self._uploads.get(tenant, memory, upload_id)
        if upload.committed is None:
            self._uploads.write(upload, chunk)

    def upload(self, tenant: str, memory: LiveMemory, upload_id: str) -> Upload:
        """What an upload still misses."""
        return self._uploads.get(tenant, memory, upload_id).info

    def commit(self, tenant: str, memory: LiveMemory, upload_id: str) -> DocumentInfo:
        """Make a complete upload durable and visible; twice gives the same document."""
        return self._commit(self._uploads.get(tenant, memory, upload_id))

    def abort(self, tenant: str, upload_id: str) -> None:
        """Drop an upload."""
        self._uploads.abort(tenant, upload_id)

    def abort_memory(self, memory: LiveMemory) -> None:
        """Drop every upload into a deleted memory."""
        self._uploads.abort_memory(memory)

    def expire(self) -> None:
        """Drop uploads nobody wrote to for too long."""
        self._uploads.expire()

    def list(self, memory: LiveMemory, verb: verbs.ListDocuments) -> Page[DocumentInfo]:
        """A page of the documents a filter lets through, by id."""
        documents = memory.documents.copy()
        where = verb.where
        chosen = sorted(name for name, one in documents.items() if where is None or where.matches(one.row.metadata))
        names, rest = page_of(chosen, verb.page_size, verb.page_token)
        return Page(tuple(documents[name].info for name in names), rest)

    def delete(self, tenant: str, memory: LiveMemory, verb: verbs.DeleteDocument) -> None:
        """Delete a document. The catalogue's transaction commits it; the log line only serves a rebuild."""
        fingerprint = hashlib.sha256(json.dumps(["delete", verb.memory, verb.document]).encode()).hexdigest()
        with memory.changing():
            done = self._catalog.request(tenant, verb.request_id) if verb.request_id else None
            if done is not None:
                if done.fingerprint != fingerprint:
                    raise InvalidArgument("this request_id was used for another request; make a new one")
                return
            memory.check_newest(verb.document, verb.generation, or_equal=True)
            if verb.document not in memory.documents and verb.generation > memory.graves.get(verb.document, 0):
                self._bury(memory, verb.document, verb.generation)
            row = memory.document(verb.document).row
            request = RequestRow(tenant, verb.request_id, "delete", memory.row.key, fingerprint, "null", time.time())
            requests = [request] if verb.request_id else []
            if self._files is None:
                self._catalog.record(requests)
            else:
                self._catalog.tombstone(memory.row.key, [row.pk], requests)
            memory.forget(row.id)
            self._bury(memory, row.id, max(row.generation, verb.generation))

    def deleted(self, memory: LiveMemory, verb: verbs.ListDeleted) -> Page[Deleted]:
        """A page of the deletions the memory remembers, by document id."""
        graves = memory.graves.copy()
        names, rest = page_of(sorted(graves), verb.page_size, verb.page_token)
        return Page(tuple(Deleted(name, graves[name]) for name in names), rest)

    def _bury(self, memory: LiveMemory, document: str, generation: int) -> None:
        memory.graves[document] = generation
        if self._files is not None:
            self._files.tombstones.add([Tombstone(memory.row.key, document, generation)])

    def _commit(self, upload: PendingUpload) -> DocumentInfo:
        with upload.lock:
            if upload.committed is None:
                missing = sum(staging.nbytes - staging.received for staging in upload.stagings)
                if missing:
                    raise FailedPrecondition(
                        f"{missing:,} bytes of the upload are still missing; GetUpload says which", reason="INCOMPLETE"
                    )
                job = Job(upload.tenant, upload.memory, upload.request, upload.stagings)
                upload.committed = self._commits.commit(job)
            return upload.committed

    def _stage(self, memory: LiveMemory, layout: PartLayout) -> Staging:
        if self._files is not None:
            return self._files.stage(memory.row.key, layout)
        return Staging(layout, RamPayload(layout.nbytes), lambda _: None)


def _check_tensors(spec: MemorySpec, one: Document) -> None:
    tokens = one.keys.shape[2] if one.keys.ndim == 4 else -1
    for name, tensor in (("keys", one.keys), ("values", one.values)):
        if tuple(tensor.shape) != (len(spec.layers), spec.kv_heads, tokens, spec.head_dim):
            raise InvalidArgument(
                f"{name} must be [{len(spec.layers)} layers, {spec.kv_heads} kv heads, tokens, {spec.head_dim}], "
                f"got {list(tensor.shape)}"
            )
        if tensor.dtype != spec.dtype.torch:
            raise InvalidArgument(f"{name} must be {spec.dtype.value} like the memory, got {tensor.dtype}")
    if one.token_ids is not None and tuple(one.token_ids.shape) != (tokens,):
        raise InvalidArgument(f"token_ids must be [{tokens}], got {list(one.token_ids.shape)}")
