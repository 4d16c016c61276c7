"""What a snapshot says of itself: a description that is quick to read, and the list of what it holds. No I/O here.

A snapshot may come from anywhere, so nothing it says is believed: names never become paths unless they are names,
numbers have limits, and every file is held to its checksum.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from memory_service.checksums import crc32
from memory_service.errors import DataLoss, FotError
from memory_service.shards import MAX_SHARDS
from memory_service.storage.memory_file import MemoryFile
from memory_service.storage.parts import SEGMENT_NAME, SegmentRef, spec_from_json, spec_to_json
from memory_service.types.documents import check_document_id
from memory_service.types.names import check_name
from memory_service.types.snapshots import Snapshot, check_snapshot_id
from memory_service.types.specs import MemorySpec

FORMAT = "fot.snapshot.v1"
DESCRIPTION = "snapshot.json"
CONTENTS = "contents.json"
MEMORY = "memory.json"
MAX_DESCRIPTION_BYTES = 1 << 20
MAX_CONTENTS_BYTES = 1 << 30
_MOST = (1 << 63) - 2  # The largest generation: one more must still fit the catalogue.
MAX_TIME = 1e11  # Seconds since the epoch.


class SegmentEntry(NamedTuple):
    """A segment file of a snapshot."""

    path: str  # File name.
    nbytes: int
    header_bytes: int
    header_crc: int

    def describes(self, segment: SegmentRef) -> bool:
        """Whether it is this segment."""
        return self == (segment.path, segment.nbytes, segment.header_bytes, segment.header_crc)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a snapshot holds; whatever else is in its segments is dead."""

    next_generation: int
    documents: tuple[tuple[str, int], ...]  # (id, generation), in the order of their commits.
    deleted: tuple[tuple[str, int], ...]  # Of deletions the memory remembered: (id, last dead generation).
    segments: tuple[SegmentEntry, ...]


@dataclass(frozen=True, slots=True)
class Description:
    """What `snapshot.json` says."""

    id: str
    memory: MemoryFile
    created_at: float  # Seconds since the epoch.
    documents: int
    tokens: int
    nbytes: int  # Of all segments.
    shard: str
    shards: tuple[str, ...]
    contents_nbytes: int
    contents_crc: int

    @property
    def snapshot(self) -> Snapshot:
        """The same, as it is told."""
        figures = (self.documents, self.tokens, self.nbytes)
        return Snapshot(self.id, self.memory.name, self.created_at, *figures, self.shard, self.shards)


def tenant_directory(tenant: str) -> str:
    """The directory of a tenant's snapshots: its name, or a digest of one that is no safe file name."""
    try:
        check_name(tenant, "a tenant")
    except FotError:
        return "=" + blake2b(tenant.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return tenant


def directory_name(snapshot: str, shard: str) -> str:
    """The directory of a snapshot: two shards may keep theirs under one root."""
    return f"{snapshot}@{shard}" if shard else snapshot


def cut_name(name: str) -> tuple[str, str] | None:
    """Snapshot and shard of a directory's name; None if it is no snapshot's."""
    snapshot, at, shard = name.partition("@")
    try:
        check_snapshot_id(snapshot)
    except FotError:
        return None
    return (snapshot, shard) if bool(shard) == bool(at) and (not shard or _is_shard(shard)) else None


def encode_contents(contents: Contents) -> bytes:
    """The bytes of `contents.json`; the description keeps their checksum."""
    return json.dumps(
        {
            "next_generation": contents.next_generation,
            "segments": contents.segments,
            "documents": contents.documents,
            "deleted": contents.deleted,
        },
        separators=(",", ":"),
    ).encode()


def encode_description(one: Description) -> bytes:
    """The bytes of `snapshot.json`, with their own checksum."""
    data: dict[str, object] = {
        "format": FORMAT,
        "id": one.id,
        "tenant": one.memory.tenant,
        "memory": one.memory.name,
        "spec": spec_to_json(one.memory.spec),
        "memory_created_at": one.memory.created_at,
        "created_at": one.created_at,
        "documents": one.documents,
        "tokens": one.tokens,
        "bytes": one.nbytes,
        "shard": one.shard,
        "shards": list(one.shards),
        "contents_bytes": one.contents_nbytes,
        "contents_crc32": one.contents_crc,
    }
    return json.dumps(data | {"crc32": crc32(json.dumps(data).encode())}, indent=1).encode()


def decode_description(block: bytes, tenant: str, name: str) -> Description:
    """Read `snapshot.json` of the directory `name` of a tenant's back; DataLoss unless it is what was written there."""
    try:
        data = json.loads(block)
        spec = _spec(data["spec"])
        check_name(data["memory"], "a memory's name")
        memory = MemoryFile(data["tenant"], data["memory"], spec, _time(data["memory_created_at"]))
        found = Description(
            id=data["id"],
            memory=memory,
            created_at=_time(data["created_at"]),
            documents=_natural(data["documents"]),
            tokens=_natural(data["tokens"]),
            nbytes=_natural(data["bytes"]),
            shard=data["shard"],
            shards=tuple(data["shards"]),
            contents_nbytes=_natural(data["contents_bytes"], MAX_CONTENTS_BYTES),
            contents_crc=_natural(data["contents_crc32"], 0xFFFF_FFFF),
        )
        if encode_description(found) != block:
            raise DataLoss(f"{DESCRIPTION} does not match its checksum")
        if len(found.shards) > MAX_SHARDS or not all(map(_is_shard, found.shards)):
            raise ValueError
        if found.shard and found.shard not in found.shards:
            raise ValueError
    except DataLoss:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, FotError) as error:
        raise DataLoss(f"{DESCRIPTION} is damaged") from error
    if tenant_directory(memory.tenant) != tenant or directory_name(found.id, found.shard) != name:
        raise DataLoss(f"{DESCRIPTION} is of another snapshot; a snapshot's directory keeps its name and its tenant's")
    return found


def decode_contents(block: bytes, told: Description) -> Contents:
    """Read `contents.json` back; DataLoss unless it is what the description says, and makes sense."""
    if len(block) != told.contents_nbytes or crc32(block) != told.contents_crc:
        raise DataLoss(f"{CONTENTS} does not match its checksum")
    try:
        data = json.loads(block)
        found = Contents(
            next_generation=_natural(data["next_generation"]),
            documents=tuple(_generations(data["documents"])),
            deleted=tuple(_generations(data["deleted"])),
            segments=tuple(_segments(data["segments"])),
        )
    except (ValueError, TypeError, KeyError, RecursionError, FotError) as error:
        raise DataLoss(f"{CONTENTS} is damaged") from error
    alive = {name for name, _ in found.documents}
    if len(alive) != len(found.documents) or alive & {name for name, _ in found.deleted}:
        raise DataLoss(f"{CONTENTS} names a document twice")
    if len({one.path for one in found.segments}) != len(found.segments):
        raise DataLoss(f"{CONTENTS} names a segment twice")
    if len(alive) != told.documents or sum(one.nbytes for one in found.segments) != told.nbytes:
        raise DataLoss(f"{CONTENTS} and {DESCRIPTION} contradict each other")
    return found


def _spec(text: str) -> MemorySpec:
    spec = spec_from_json(text)
    spec.check()
    made = spec.fingerprint
    numbers = (*spec.layers, spec.kv_heads, spec.head_dim, spec.index.min_tokens)
    texts = (made.model, made.revision, made.weights, made.rope, spec.index.factory)
    if not all(type(one) is int for one in numbers) or not all(isinstance(one, str) for one in texts):
        raise ValueError(text)
    return spec


def _generations(pairs: Iterable[Sequence[Any]]) -> Iterator[tuple[str, int]]:
    for document, generation in pairs:
        check_document_id(document)
        yield document, _natural(generation)


def _segments(entries: Iterable[Sequence[Any]]) -> Iterator[SegmentEntry]:
    for path, *numbers in entries:
        if not SEGMENT_NAME.fullmatch(path):
            raise ValueError(path)
        yield SegmentEntry(path, *map(_natural, numbers))


def _natural(value: object, most: int = _MOST) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(value)
    return value


def _time(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= MAX_TIME:
        raise ValueError(value)
    return value


def _is_shard(name: str) -> bool:
    return 1 <= len(name) <= 63 and name.isalnum()
