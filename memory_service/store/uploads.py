"""Documents on their way in: reserved at begin, filled chunk by chunk in any order, dropped when nobody writes."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from memory_service.errors import AlreadyExists, InvalidArgument, NotFound, QuotaExceeded, ResourceExhausted
from memory_service.settings import StoreOptions
from memory_service.storage.parts import CHUNK_BYTES, SMALL_PART_BYTES, PartLayout, part_ranges, part_tokens
from memory_service.storage.staging import Staging
from memory_service.store.live_memory import LiveMemory
from memory_service.types.conditions import Scalar
from memory_service.types.documents import (
    MAX_DOCUMENT_TOKENS,
    MAX_METADATA_BYTES,
    MAX_METADATA_KEYS,
    Conflict,
    DocumentInfo,
    check_document_id,
)
from memory_service.types.uploads import Chunk, Upload

Stage = Callable[[LiveMemory, PartLayout], Staging]


@dataclass(frozen=True, slots=True)
class Request:
    """What a document is to be, apart from its bytes."""

    document: str
    tokens: int
    metadata: Mapping[str, Scalar]
    conflict: Conflict
    request_id: str
    generation: int = 0  # 0: the memory gives one.

    def check(self) -> None:
        """Raise InvalidArgument unless every field is within its limits."""
        check_document_id(self.document)
        if not 1 <= self.tokens < MAX_DOCUMENT_TOKENS:
            raise InvalidArgument(f"a document has 1 to {MAX_DOCUMENT_TOKENS - 1} tokens, got {self.tokens}")
        if len(self.metadata) > MAX_METADATA_KEYS:
            raise InvalidArgument(f"metadata may have {MAX_METADATA_KEYS} fields, got {len(self.metadata)}")
        if len(self.request_id) > 128:
            raise InvalidArgument("request_id may have 128 characters")
        if not 0 <= self.generation < 1 << 62:
            raise InvalidArgument(f"a generation is 0 to 2^62, got {self.generation}")
        for key, value in self.metadata.items():
            if not isinstance(value, str | int | float | bool) or not key or len(key) > 128:
                raise InvalidArgument("metadata maps names of 1 to 128 characters to text, numbers or flags")
        try:
            size = len(json.dumps(dict(self.metadata), allow_nan=False, ensure_ascii=False).encode())
        except (ValueError, UnicodeEncodeError):
            raise InvalidArgument("metadata must be valid Unicode and finite numbers") from None
        if size > MAX_METADATA_BYTES:
            raise InvalidArgument(f"metadata takes {size} bytes as JSON, the limit is {MAX_METADATA_BYTES}")

    @property
    def fingerprint(self) -> str:
        """Equal for equal requests: a request id must not be used for another."""
        plain = [self.document, self.tokens, sorted(self.metadata.items()), self.conflict.value]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


@dataclass(slots=True, eq=False)
class PendingUpload:
    """An upload under way."""

    id: str
    tenant: str
    memory: LiveMemory
    request: Request
    stagings: list[Staging]
    expires_at: float
    committed: DocumentInfo | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)  # Held while it is committed.

    @property
    def nbytes(self) -> int:
        return sum(staging.nbytes for staging in self.stagings)

    @property
    def info(self) -> Upload:
        missing = (
            []
            if self.committed
            else [(part, *run) for part, staging in enumerate(self.stagings) for run in staging.missing()]
        )
        tokens = part_tokens(self.memory.spec)
        parts = len(self.stagings)
        return Upload(self.id, tokens, parts, CHUNK_BYTES, tuple(missing), self.expires_at, self.committed)


class Uploads:
    """All uploads of a store: leases, and room for what is staged."""

    def __init__(self, options: StoreOptions, stage: Stage, used: Callable[[str], int]):
        """`used` tells the committed bytes of a tenant."""
        self._options = options
        self._stage = stage
        self._used = used
        self._lock = threading.Lock()
        self._pending: dict[str, PendingUpload] = {}

    def begin(self, tenant: str, memory: LiveMemory, request: Request) -> PendingUpload:
        """Reserve room; the same request id gives the same upload. All refusals come before any allocation."""
        request.check()
        nbytes = memory.stored_bytes(request.tokens)
        with self._lock:
            self._expire()
            for known in self._pending.values():
                if request.request_id and (known.tenant, known.request.request_id) == (tenant, request.request_id):
                    if known.memory is not memory or known.request.fingerprint != request.fingerprint:
                        raise InvalidArgument("this request_id was used for another document; make a new one")
                    return known
            if request.conflict is Conflict.FAIL and request.document in memory.documents:
                raise AlreadyExists(f"document {request.document!r} exists; commit with conflict REPLACE to replace it")
            memory.check_newest(request.document, request.generation)
            self._check_room(tenant, nbytes)
            upload = PendingUpload(
                secrets.token_urlsafe(18), tenant, memory, request, [], time.time() + self._options.upload_lease_s
            )
            for _, tokens in part_ranges(memory.spec, request.tokens):
                try:
                    upload.stagings.append(self._stage(memory, PartLayout.of(memory.spec, tokens)))
                except BaseException:
                    _discard(upload)
                    raise
            self._pending[upload.id] = upload
        return upload

    def get(self, tenant: str, memory: LiveMemory, upload_id: str) -> PendingUpload:
        """An upload of this tenant and memory, its lease renewed; NotFound otherwise."""
        with self._lock:
            self._expire()
            upload = self._pending.get(upload_id)
            if upload is None or upload.tenant != tenant or upload.memory is not memory:
                raise NotFound(
                    "no such upload: it was aborted, nobody wrote to it for too long, or the service restarted; "
                    "begin again with the same request_id",
                    reason="UPLOAD_NOT_FOUND",
                )
            upload.expires_at = time.time() + self._options.upload_lease_s
            return upload

    def write(self, upload: PendingUpload, chunk: Chunk) -> None:
        """Take a chunk; InvalidArgument if it does not fit the upload."""
        if not 0 <= chunk.part < len(upload.stagings):
            raise InvalidArgument(f"the upload has parts 0 to {len(upload.stagings) - 1}, got {chunk.part}")
        upload.stagings[chunk.part].write(chunk.offset, chunk.crc32, chunk.data)

    def abort(self, tenant: str, upload_id: str) -> None:
        """Drop an upload; unknown and committed ones are ignored."""
        with self._lock:
            upload = self._pending.get(upload_id)
            if upload is not None and upload.tenant == tenant and upload.committed is None:
                self._drop(upload)

    def forget(self, upload: PendingUpload) -> None:
        """Stop keeping a committed upload nobody will ask for by its id: every begin walks over all that are kept."""
        with self._lock:
            self._pending.pop(upload.id, None)

    def abort_memory(self, memory: LiveMemory) -> None:
        """Drop every upload into a deleted memory."""
        with self._lock:
            for upload in [one for one in self._pending.values() if one.memory is memory]:
                self._drop(upload)

    def expire(self) -> None:
        """Drop what nobody wrote to for too long."""
        with self._lock:
            self._expire()

    def _check_room(self, tenant: str, nbytes: int) -> None:
        mine = [one for one in self._pending.values() if one.tenant == tenant and not one.committed]
        if self._options.tenant_bytes is not None:
            have = self._used(tenant) + sum(one.nbytes for one in mine)
            if have + nbytes > self._options.tenant_bytes:
                raise QuotaExceeded(
                    f"the tenant holds {have:,} of {self._options.tenant_bytes:,} bytes and asks for {nbytes:,} more; "
                    "delete documents or ask the operator for a larger quota"
                )
        # Large parts are staged on disk; what waits in RAM is bounded for all tenants together.
        sizes = [one.nbytes for one in self._pending.values() if not one.committed]
        waiting = sum(size for size in sizes if size <= SMALL_PART_BYTES)
        if nbytes <= SMALL_PART_BYTES and waiting + nbytes > self._options.staging_bytes:
            raise ResourceExhausted(
                f"{waiting:,} bytes of documents wait for their commit; try again shortly",
                reason="STAGING_FULL",
                retry_after_s=0.2,
            )

    def _expire(self) -> None:
        now = time.time()
        for upload in [one for one in self._pending.values() if one.expires_at < now]:
            self._drop(upload)

    def _drop(self, upload: PendingUpload) -> None:
        del self._pending[upload.id]
        _discard(upload)


def _discard(upload: PendingUpload) -> None:
    for staging in upload.stagings:
        staging.discard()
