"""Group commit: whoever comes while one commit is being synced waits and shares the next sync.

The order is the contract: bytes durable under their final name, then the catalogue's transaction (this commits),
then visible, then acknowledged.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from memory_service.errors import AlreadyExists, FotError, InvalidArgument, NotFound, Unavailable
from memory_service.storage.catalog import Catalog
from memory_service.storage.parts import PartHeader, part_ranges
from memory_service.storage.records import DocumentRow, RequestRow
from memory_service.storage.segments import SegmentFiles
from memory_service.storage.staging import RamPayload, Staging
from memory_service.storage.vfs import StorageFailed
from memory_service.store.live_memory import LiveMemory
from memory_service.store.uploads import Request
from memory_service.types.documents import Conflict, DocumentInfo

_BATCH_BYTES = 256 << 20
_BATCH_DOCUMENTS = 512


@dataclass(slots=True, eq=False)
class Job:
    """A complete document that waits for its commit."""

    tenant: str
    memory: LiveMemory
    request: Request
    stagings: Sequence[Staging]
    answer: DocumentInfo | None = None
    error: FotError | None = None

    @property
    def nbytes(self) -> int:
        return sum(staging.nbytes for staging in self.stagings)

    def done(self) -> bool:
        """Whether it was committed or refused."""
        return self.answer is not None or self.error is not None

    def settle(self, answer: DocumentInfo | None, error: FotError | None = None) -> None:
        self.answer, self.error = answer, error


class Commits:
    """Commits jobs of all memories, many at once. Thread-safe."""

    def __init__(self, catalog: Catalog, files: SegmentFiles | None, storage_failed: Callable[[StorageFailed], None]):
        """`files` is None where nothing is durable; `storage_failed` hears of an I/O error that ends all writing."""
        self._catalog = catalog
        self._files = files
        self._storage_failed = storage_failed
        self._queue: list[Job] = []
        self._turn = threading.Condition()
        self._leading = False  # Whether someone is committing.
        self._keys = itertools.count(1)  # Of documents that are not in the catalogue.

    def known(self, tenant: str, request: Request) -> DocumentInfo | None:
        """What this request id was committed as; InvalidArgument if it was another request."""
        row = self._catalog.request(tenant, request.request_id) if request.request_id else None
        if row is None:
            return None
        if row.kind != "put" or row.fingerprint != request.fingerprint:
            raise InvalidArgument("this request_id was used for another request; make a new one")
        return DocumentInfo(**json.loads(row.answer))

    def commit(self, job: Job) -> DocumentInfo:
        """Wait until the document is durable and visible. ResourceExhausted if writers are held for long."""
        with self._turn:
            self._queue.append(job)
        while not job.done():
            self._wait_for_holds(job)
            with self._turn:
                while self._leading and not job.done():
                    self._turn.wait()
                if job.done():
                    break
                self._leading = True
            try:
                # The leader takes all that queued up while the one before was syncing, this job among them.
                self._commit_queued()
            finally:
                with self._turn:
                    self._leading = False
                    self._turn.notify_all()
        if job.error is not None:
            raise job.error
        assert job.answer is not None
        return job.answer

    def _wait_for_holds(self, job: Job) -> None:
        """Who is held gives its turn to others, and in the end its place in the queue, unless it was taken."""
        try:
            job.memory.wait_for_holds()
        except FotError:
            with self._turn:
                if job not in self._queue:
                    return
                self._queue.remove(job)
            raise

    def _commit_queued(self) -> None:
        with self._turn:
            memory = next((job.memory for job in self._queue if not job.memory.writers_wait), None)
            if memory is None:
                return
            batch: list[Job] = []
            size = 0
            for job in self._queue:
                first = all(job.request.document != other.request.document for other in batch)
                if job.memory is memory and first and (not batch or size + job.nbytes <= _BATCH_BYTES):
                    batch.append(job)
                    size += job.nbytes
                if len(batch) == _BATCH_DOCUMENTS:
                    break
            self._queue = [job for job in self._queue if job not in set(batch)]
        try:
            with memory.writing:
                if memory.writers_wait:  # Since just now.
                    with self._turn:
                        self._queue = batch + self._queue
                    return
                ready = [job for job in batch if self._may_commit(job)]
                if ready:
                    self._commit(memory, ready)
        except FotError as error:
            if isinstance(error, StorageFailed):
                self._storage_failed(error)
            for job in batch:
                if not job.done():
                    job.settle(None, error)
        except BaseException:
            for job in batch:
                if not job.done():
                    job.settle(None, Unavailable("the commit failed; whether it took effect is not known, ask again"))
            raise

    def _may_commit(self, job: Job) -> bool:
        try:
            if job.memory.deleted:
                raise NotFound(f"memory {job.memory.row.name!r} was deleted")
            known = self.known(job.tenant, job.request)
            if known is not None:
                job.settle(known)
                return False
            if job.request.conflict is Conflict.FAIL and job.request.document in job.memory.documents:
                raise AlreadyExists(
                    f"document {job.request.document!r} exists; commit with conflict REPLACE to replace it"
                )
            job.memory.check_newest(job.request.document, job.request.generation)
        except FotError as error:
            job.settle(None, error)
            return False
        return True

    def _commit(self, memory: LiveMemory, jobs: Sequence[Job]) -> None:
        now = time.time()
        generations = []
        for job in jobs:
            following = memory.row.next_generation
            generations.append(job.request.generation or following)
            memory.row = replace(memory.row, next_generation=max(following, generations[-1] + 1))
        answers = [
            DocumentInfo(job.request.document, job.request.tokens, dict(job.request.metadata), generation, now)
            for job, generation in zip(jobs, generations, strict=True)
        ]
        requests = [
            RequestRow(
                job.tenant,
                job.request.request_id,
                "put",
                memory.row.key,
                job.request.fingerprint,
                json.dumps(asdict(answer)),
                now,
            )
            for job, answer in zip(jobs, answers, strict=True)
            if job.request.request_id
        ]
        if self._files is None:
            self._commit_in_ram(memory, jobs, answers)
            self._catalog.record(requests)
        else:
            self._commit_to_disk(self._files, memory, jobs, answers, requests)
        for job, answer in zip(jobs, answers, strict=True):
            job.settle(answer)

    def _commit_to_disk(
        self,
        files: SegmentFiles,
        memory: LiveMemory,
        jobs: Sequence[Job],
        answers: Sequence[DocumentInfo],
        requests: Sequence[RequestRow],
    ) -> None:
        parts = [
            (_header(memory, job.request, answer, number, first, tokens), job.stagings[number])
            for job, answer in zip(jobs, answers, strict=True)
            for number, (first, tokens) in enumerate(part_ranges(memory.spec, job.request.tokens))
        ]
        refs = files.seal(memory.row.key, memory.spec, parts)
        replaced = {answer.id for answer in answers if answer.id in memory.documents}
        try:
            committed = self._catalog.commit(memory.row.key, refs, replaced, requests)
        except StorageFailed:
            raise  # Whether the transaction took effect is not known: touch nothing, the next open decides.
        except FotError:
            for ref in refs:
                files.remove(memory.row.key, ref.path, durable=True)
            raise
        memory.publish(committed.documents, [(row.pk, row.ref) for row in committed.segments])

    def _commit_in_ram(self, memory: LiveMemory, jobs: Sequence[Job], answers: Sequence[DocumentInfo]) -> None:
        for job, answer in zip(jobs, answers, strict=True):
            row = DocumentRow(
                next(self._keys),
                answer.id,
                answer.generation,
                answer.tokens,
                answer.metadata,
                answer.committed_at,
                job.request.request_id,
                (),
            )
            for staging in job.stagings:
                staging.begin_seal()
            memory.publish_resident(row, *_tensors(job.stagings))
            for staging in job.stagings:
                staging.end_seal(sealed=True)


def _header(
    memory: LiveMemory, request: Request, answer: DocumentInfo, number: int, first: int, tokens: int
) -> PartHeader:
    return PartHeader(
        document=answer.id,
        generation=answer.generation,
        part=number,
        parts=len(part_ranges(memory.spec, request.tokens)),
        first_token=first,
        tokens=tokens,
        document_tokens=request.tokens,
        metadata=answer.metadata,
        committed_at=answer.committed_at,
        request_id=request.request_id,
    )


def _tensors(stagings: Sequence[Staging]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [L, H, T, D] and token ids [T] of parts staged in RAM."""
    keys, values, ids = [], [], []
    for staging in stagings:
        layout = staging.layout
        assert isinstance(staging.payload, RamPayload), "nothing is on disk here"
        shape = (layout.layers, layout.heads, layout.tokens, layout.dim)
        data = torch.frombuffer(staging.payload.bytes, dtype=torch.uint8)
        plane = layout.plane_nbytes
        keys.append(data[:plane].view(layout.dtype.torch).view(shape))
        values.append(data[plane : 2 * plane].view(layout.dtype.torch).view(shape))
        ids.append(data[2 * plane :].view(torch.uint32).to(torch.int64))
    return torch.cat(keys, dim=2), torch.cat(values, dim=2), torch.cat(ids)
