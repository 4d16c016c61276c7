"""The catalogue: which memories, documents and segments exist.

Each method that writes is one transaction, durable on return: it commits what it says. A crash before leaves the old
state, after it the new one.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from memory_service.errors import AlreadyExists, Internal
from memory_service.storage.database import Database, Row, Value
from memory_service.storage.parts import (
    PartHeader,
    PartLayout,
    PartRef,
    SegmentRef,
    pack_crcs,
    spec_from_json,
    spec_to_json,
    unpack_crcs,
)
from memory_service.storage.records import Committed, DocumentRow, MemoryRow, RequestRow, SegmentRow
from memory_service.storage.schema import DIGESTED
from memory_service.storage.vfs import OsVfs, Vfs
from memory_service.types.operations import Operation, OperationKind, OperationState

REQUEST_DAYS = 7  # How long the answer to a request id is remembered.


class Catalog:
    """One open catalogue. Full disk: ResourceExhausted, nothing changed. I/O error: StorageFailed, outcome unknown."""

    def __init__(self, db: Database):
        self._db = db

    @classmethod
    def open(cls, path: Path | None, *, vfs: Vfs | None = None, on_commit: Callable[[], None] | None = None) -> Catalog:
        """Open or create the catalogue (None: in RAM), check every row, bring an older one up to date.

        Raises DataLoss if anything in it is damaged. `on_commit` is called once open and after every transaction.
        """
        return cls(Database.open(path, vfs or OsVfs(), on_commit))

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; harmless if an error came before."""
        self._db.close()

    # --- Memories ---------------------------------------------------------------------------------------------------

    def memories(self) -> list[MemoryRow]:
        """All memories that are not deleted."""
        rows = self._db.query(
            "SELECT key, tenant, name, spec, created_at, next_generation FROM memories WHERE NOT deleted ORDER BY key"
        )
        return [MemoryRow(key, tenant, name, spec_from_json(spec), *rest) for key, tenant, name, spec, *rest in rows]

    def create_memory(self, memory: MemoryRow, requests: Iterable[RequestRow] = ()) -> None:
        """Create a memory; AlreadyExists if the tenant has one of that name."""
        with self._db.transaction():
            self._create_memory(memory)
            self._record(requests)

    def delete_memory(self, key: str, requests: Sequence[RequestRow] = ()) -> None:
        """Delete a memory: its name is free and its documents are gone; `forget_memory` drops the rows."""

        def work() -> None:
            with self._db.transaction():
                self._db.run("UPDATE memories SET deleted = 1 WHERE key = ?", key)
                self._record(requests)

        self._db.with_reserve(work)

    def deleted_memories(self) -> list[str]:
        """Keys of deleted memories whose files may still be there."""
        return [key for (key,) in self._db.query("SELECT key FROM memories WHERE deleted ORDER BY key")]

    def forget_memory(self, key: str) -> None:
        """Drop every row of a deleted memory, once its files are gone."""
        with self._db.transaction():
            self._db.run("DELETE FROM memories WHERE key = ? AND deleted", key)

    # --- Documents and segments -------------------------------------------------------------------------------------

    def documents(self, key: str) -> list[DocumentRow]:
        """The memory's live documents, by primary key."""
        return self._documents("memory_key = ? AND NOT deleted", key)

    def dead_documents(self, key: str) -> list[tuple[str, int]]:
        """(id, generation) of deleted and replaced documents whose bytes are still in a segment."""
        rows = self._db.query("SELECT id, generation FROM documents WHERE memory_key = ? AND deleted ORDER BY pk", key)
        return [(document, generation) for document, generation in rows]

    def segments(self, key: str) -> list[SegmentRow]:
        """The memory's segments, by primary key. A part whose document is forgotten has an empty document id."""
        memory = self._db.one("SELECT spec FROM memories WHERE key = ?", key)
        if memory is None:
            return []
        spec = spec_from_json(memory[0])
        parts: dict[int, list[PartRef]] = defaultdict(list)
        for segment, offset, crcs, metadata, *rest in self._db.query(
            "SELECT s.pk, p.offset, p.crcs, COALESCE(d.metadata, '{}'), COALESCE(d.id, ''), COALESCE(d.generation, 0), "
            "p.part, p.parts, p.first_token, p.tokens, COALESCE(d.tokens, 0), COALESCE(d.committed_at, 0.0), "
            "COALESCE(d.request_id, '') "
            "FROM segments s JOIN parts p ON p.segment_pk = s.pk LEFT JOIN documents d ON d.pk = p.document_pk "
            "WHERE s.memory_key = ? ORDER BY s.pk, p.number",
            key,
        ):
            fields: Row = (*rest[:7], json.loads(metadata), *rest[7:], unpack_crcs(crcs))
            header = PartHeader(*fields)
            parts[segment].append(PartRef(offset, PartLayout.of(spec, header.tokens), header))
        return [
            SegmentRow(pk, SegmentRef(path, nbytes, header_bytes, header_crc, tuple(parts[pk])))
            for pk, path, nbytes, header_bytes, header_crc in self._db.query(
                "SELECT pk, path, nbytes, header_bytes, header_crc FROM segments WHERE memory_key = ? ORDER BY pk", key
            )
        ]

    def commit(
        self,
        key: str,
        segments: Sequence[SegmentRef],
        replaced: Collection[str] = (),
        requests: Iterable[RequestRow] = (),
    ) -> Committed:
        """Make the documents in sealed segments part of the memory, all in one transaction.

        A document in `replaced` takes the place of its predecessor; otherwise an id in use raises AlreadyExists.
        """
        with self._db.transaction():
            documents: dict[tuple[str, int], int] = {}
            for one in _headers(segments):
                if (one.document, one.generation) not in documents:
                    pk = self._add_document(key, one, replace=one.document in replaced)
                    documents[one.document, one.generation] = pk
            return self._finish_commit(key, segments, documents, requests)

    def adopt(self, key: str, segments: Sequence[SegmentRef], alive: Collection[tuple[str, int]]) -> Committed:
        """Like `commit`, for segments found on disk: only the documents (id, generation) in `alive` become visible.

        They replace older ones. Parts of other documents, and second copies of a part, stay as dead bytes.
        """
        with self._db.transaction():
            documents: dict[tuple[str, int], int] = {}
            for one in _headers(segments):
                if (one.document, one.generation) in alive and (one.document, one.generation) not in documents:
                    documents[one.document, one.generation] = self._add_document(key, one, replace=True)
            return self._finish_commit(key, segments, documents, ())

    def restore(self, memory: MemoryRow, segments: Sequence[SegmentRef], alive: Sequence[tuple[str, int]]) -> None:
        """Create a memory with all its documents at once; AlreadyExists if the tenant has one of that name.

        Only the documents (id, generation) in `alive` are visible, in this order; the others in the segments are known
        as deleted, so that their tombstones are kept for as long as their bytes are there.
        """
        headers = {(one.document, one.generation): one for one in _headers(segments)}
        with self._db.transaction():
            self._create_memory(memory)
            documents = {name: self._insert_document(memory.key, headers[name]) for name in alive}
            for name in headers.keys() - documents.keys():
                documents[name] = self._insert_document(memory.key, headers[name], deleted=True)
            self._add_segments(memory.key, segments, documents)
            self._check_whole(documents.values())

    def tombstone(self, key: str, documents: Sequence[int], requests: Sequence[RequestRow] = ()) -> None:
        """Delete documents by primary key; their bytes stay until `compact` drops the segments."""

        def work() -> None:
            with self._db.transaction():
                for pk in documents:
                    self._db.run("UPDATE documents SET deleted = 1 WHERE pk = ? AND memory_key = ?", pk, key)
                self._record(requests)

        self._db.with_reserve(work)

    def compact(self, key: str, segments: Sequence[SegmentRef], dropped: Collection[int]) -> tuple[SegmentRow, ...]:
        """Replace segments (by primary key) by ones that hold the same documents again; documents keep their rows.

        Raises Internal, changing nothing, if a live document would lose a part.
        """

        def work() -> list[int]:
            with self._db.transaction():
                return self._compact(key, segments, dropped)

        return tuple(map(SegmentRow, self._db.with_reserve(work), segments))

    # --- Requests and operations ------------------------------------------------------------------------------------

    def request(self, tenant: str, request_id: str) -> RequestRow | None:
        """What this request id was answered before, if it was."""
        row = self._db.one(
            "SELECT tenant, request_id, kind, memory_key, fingerprint, answer, created_at FROM requests "
            "WHERE tenant = ? AND request_id = ?",
            tenant,
            request_id,
        )
        return RequestRow(*row) if row else None

    def record(self, requests: Iterable[RequestRow]) -> None:
        """Remember answers of work that wrote nothing else."""
        with self._db.transaction():
            self._record(requests)

    def prune(self, now: float) -> None:
        """Forget requests and finished operations older than REQUEST_DAYS; keep room back for deletes again."""
        before = now - REQUEST_DAYS * 86_400
        with self._db.transaction():
            self._db.run("DELETE FROM requests WHERE created_at < ?", before)
            self._db.run(
                "DELETE FROM operations WHERE updated_at < ? AND state <> ?", before, OperationState.RUNNING.value
            )
        self._db.keep_reserve()

    def save_operation(self, tenant: str, operation: Operation) -> None:
        """Write an operation's present state."""
        with self._db.transaction():
            self._db.run("DELETE FROM operations WHERE id = ?", operation.id)
            one = operation
            self._db.insert(
                "operations",
                (one.id, tenant, one.memory, one.kind.value, one.state.value, one.done, one.total, one.message)
                + (one.created_at, one.updated_at, one.snapshot),
            )

    def operations(self) -> list[tuple[str, Operation]]:
        """(tenant, operation), oldest first."""
        found = []
        for one, tenant, memory, kind, state, *rest in self._db.query(
            f"SELECT {', '.join(DIGESTED['operations'])} FROM operations ORDER BY created_at, id"
        ):
            found.append((tenant, Operation(one, memory, OperationKind(kind), OperationState(state), *rest)))
        return found

    def backup(self, path: Path) -> None:
        """Write a consistent copy, durable on return; a crash leaves the copy that was there before."""
        self._db.backup(path)

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _create_memory(self, memory: MemoryRow) -> None:
        if self._db.one(
            "SELECT 1 FROM memories WHERE tenant = ? AND name = ? AND NOT deleted", memory.tenant, memory.name
        ):
            raise AlreadyExists(f"there is a memory {memory.name!r} already")
        self._db.insert(
            "memories",
            (memory.key, memory.tenant, memory.name, spec_to_json(memory.spec), memory.created_at)
            + (memory.next_generation, 0),
        )

    def _documents(self, where: str, *values: Value) -> list[DocumentRow]:
        parts: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for pk, segment, number in self._db.query(
            "SELECT document_pk, segment_pk, number FROM parts "
            f"WHERE document_pk IN (SELECT pk FROM documents WHERE {where}) ORDER BY document_pk, part",
            *values,
        ):
            parts[pk].append((segment, number))
        return [
            DocumentRow(pk, name, generation, tokens, json.loads(metadata), committed_at, request_id, tuple(parts[pk]))
            for pk, name, generation, tokens, metadata, committed_at, request_id in self._db.query(
                "SELECT pk, id, generation, tokens, metadata, committed_at, request_id "
                f"FROM documents WHERE {where} ORDER BY pk",
                *values,
            )
        ]

    def _compact(self, key: str, segments: Sequence[SegmentRef], dropped: Collection[int]) -> list[int]:
        rows = self._db.query("SELECT id, generation, pk FROM documents WHERE memory_key = ?", key)
        documents = {(document, generation): pk for document, generation, pk in rows}
        touched = {documents[one.document, one.generation] for one in _headers(segments)}
        for pk in dropped:
            rows = self._db.query("SELECT document_pk FROM parts WHERE segment_pk = ? AND document_pk NOTNULL", pk)
            touched.update(document for (document,) in rows)
            self._db.run("DELETE FROM segments WHERE pk = ? AND memory_key = ?", pk, key)
        pks = self._add_segments(key, segments, documents)
        for pk in touched:
            self._db.run(
                "DELETE FROM documents WHERE pk = ? AND deleted "
                "AND NOT EXISTS (SELECT 1 FROM parts WHERE document_pk = documents.pk)",
                pk,
            )
        self._check_whole(touched)
        return pks

    def _add_document(self, key: str, header: PartHeader, *, replace: bool) -> int:
        alive = self._db.one(
            "SELECT pk FROM documents WHERE memory_key = ? AND id = ? AND NOT deleted", key, header.document
        )
        if alive and not replace:
            raise AlreadyExists(f"there is a document {header.document!r} already; delete it, or commit with REPLACE")
        if alive:
            self._db.run("UPDATE documents SET deleted = 1 WHERE pk = ?", *alive)
        return self._insert_document(key, header)

    def _insert_document(self, key: str, header: PartHeader, *, deleted: bool = False) -> int:
        return self._db.insert(
            "documents",
            (None, key, header.document, header.generation, header.document_tokens)
            + (_json(header.metadata), header.committed_at, header.request_id, int(deleted)),
        )

    def _finish_commit(
        self,
        key: str,
        segments: Sequence[SegmentRef],
        documents: Mapping[tuple[str, int], int],
        requests: Iterable[RequestRow],
    ) -> Committed:
        pks = self._add_segments(key, segments, documents)
        self._check_whole(documents.values())
        self._db.run(
            "UPDATE memories SET next_generation = MAX(next_generation, ?) WHERE key = ?",
            1 + max((one.generation for one in _headers(segments)), default=0),
            key,
        )
        self._record(requests)
        new = sorted(documents.values())  # Keys of one transaction follow each other.
        rows = self._documents("pk BETWEEN ? AND ?", new[0], new[-1]) if new else []
        return Committed(tuple(rows), tuple(map(SegmentRow, pks, segments)))

    def _add_segments(
        self, key: str, segments: Sequence[SegmentRef], documents: Mapping[tuple[str, int], int]
    ) -> list[int]:
        """Insert segments and their parts; a document's part counts once, where it stands first."""
        pks, seen = [], set()
        for segment in segments:
            row = (None, key, segment.path, segment.nbytes, segment.header_bytes, segment.header_crc)
            pks.append(self._db.insert("segments", row))
            for number, part in enumerate(segment.parts):
                one = part.header
                document = documents.get((one.document, one.generation))
                if (document, one.part) in seen:
                    document = None
                seen.add((document, one.part))
                self._db.insert(
                    "parts",
                    (pks[-1], number, document, part.offset, one.part, one.parts, one.first_token, one.tokens)
                    + (pack_crcs(one.crcs),),
                )
        return pks

    def _check_whole(self, documents: Iterable[int]) -> None:
        for pk in documents:
            row = self._db.one(
                "SELECT d.tokens = SUM(p.tokens) AND COUNT(*) = MAX(p.parts) AND COUNT(*) = COUNT(DISTINCT p.part) "
                "FROM documents d LEFT JOIN parts p ON p.document_pk = d.pk WHERE d.pk = ? AND NOT d.deleted "
                "GROUP BY d.pk",
                pk,
            )
            if row is not None and row[0] != 1:
                raise Internal("a document in the catalogue would not be whole")

    def _record(self, requests: Iterable[RequestRow]) -> None:
        for one in requests:
            self._db.run("DELETE FROM requests WHERE tenant = ? AND request_id = ?", one.tenant, one.request_id)
            self._db.insert(
                "requests",
                (one.tenant, one.request_id, one.kind, one.memory_key, one.fingerprint, one.answer)
                + (one.created_at or time.time(),),
            )


def _headers(segments: Iterable[SegmentRef]) -> Iterator[PartHeader]:
    return (part.header for segment in segments for part in segment.parts)


def _json(metadata: object) -> str:
    return json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))
