"""Nouns as protobuf messages, and back: `write_x` makes a message, `read_x` checks one and makes the noun."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from memory_service.errors import InvalidArgument
from memory_service.types.conditions import Scalar
from memory_service.types.documents import Conflict, Deleted, DocumentInfo
from memory_service.types.memories import MemoryInfo, Stats
from memory_service.types.operations import Operation, OperationKind, OperationState
from memory_service.types.sessions import SessionAppend, SessionInfo
from memory_service.types.snapshots import Snapshot
from memory_service.types.specs import DType, Fingerprint, IndexPolicy, MemorySpec
from memory_service.types.uploads import Upload
from memory_service.v1 import memory_pb2 as pb
from memory_service.wire.tensors import INTEGERS, read_tensor, write_tensor

MAX_DURATION_S = 315_576_000_000  # Of google.protobuf.Duration: 10,000 years.
Member = TypeVar("Member")


def parse(kind: type[Message], raw: bytes) -> Any:
    """A message from its bytes. Raises InvalidArgument if they are none of this kind."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidArgument(f"these bytes are no {kind.DESCRIPTOR.name}") from error


# --- Words and times ------------------------------------------------------------------------------------------------

DTYPE = {DType.BF16: pb.DATA_TYPE_BF16, DType.F16: pb.DATA_TYPE_F16, DType.F32: pb.DATA_TYPE_F32}
CONFLICT = {Conflict.FAIL: pb.CONFLICT_FAIL, Conflict.REPLACE: pb.CONFLICT_REPLACE}
OPERATION_KIND = {
    OperationKind.INDEX: pb.OPERATION_KIND_INDEX,
    OperationKind.COMPACT: pb.OPERATION_KIND_COMPACT,
    OperationKind.VERIFY: pb.OPERATION_KIND_VERIFY,
    OperationKind.SNAPSHOT: pb.OPERATION_KIND_SNAPSHOT,
    OperationKind.RESTORE: pb.OPERATION_KIND_RESTORE,
}
OPERATION_STATE = {
    OperationState.RUNNING: pb.OPERATION_STATE_RUNNING,
    OperationState.DONE: pb.OPERATION_STATE_DONE,
    OperationState.FAILED: pb.OPERATION_STATE_FAILED,
    OperationState.CANCELLED: pb.OPERATION_STATE_CANCELLED,
}


def by_number(numbers: Mapping[Member, int], default: Member | None = None) -> dict[int, Member]:
    """The members by their numbers; 0, which is "not set", stands for `default` if there is one."""
    words = {number: member for member, number in numbers.items()}
    return words if default is None else {0: default, **words}


DTYPES = by_number(DTYPE)
CONFLICTS = by_number(CONFLICT, Conflict.FAIL)
STORED_DTYPES = by_number(DTYPE, DType.BF16)
OPERATION_KINDS = by_number(OPERATION_KIND)
OPERATION_STATES = by_number(OPERATION_STATE)


def read_word(words: Mapping[int, Member], number: int, field: str) -> Member:
    """The member that stands as `number` on the wire. Raises InvalidArgument for any other number."""
    word = words.get(number)
    if word is None:
        told = f"has the number {number}, unknown to this service" if number else "is not set"
        raise InvalidArgument(f"{field} {told}", field=field)
    return word


def write_time(seconds: float) -> Timestamp:
    """Seconds since the epoch as a timestamp."""
    whole = math.floor(seconds)
    return Timestamp(seconds=whole, nanos=min(round((seconds - whole) * 1e9), 999_999_999))


def read_time(message: Timestamp) -> float:
    """Seconds since the epoch."""
    return message.ToNanoseconds() / 10**9


def write_duration(seconds: float, field: str) -> Duration:
    """Seconds as a duration. Raises InvalidArgument for NaN and what no clock will see."""
    if not abs(seconds) <= MAX_DURATION_S:
        raise InvalidArgument(f"{field} must be a number of seconds, got {seconds}", field=field)
    whole = math.trunc(seconds)
    return Duration(seconds=whole, nanos=round((seconds - whole) * 1e9))


def read_duration(message: Duration) -> float:
    """Seconds."""
    return message.ToNanoseconds() / 10**9


def check_count(count: int, limit: int, field: str) -> None:
    """Raise InvalidArgument for a list too long to be meant, before time goes into reading it."""
    if count > limit:
        raise InvalidArgument(f"{field} may have {limit} entries, got {count}", field=field)


# --- Memories -------------------------------------------------------------------------------------------------------


def write_fingerprint(fingerprint: Fingerprint) -> pb.Fingerprint:
    return pb.Fingerprint(
        model=fingerprint.model, revision=fingerprint.revision, weights=fingerprint.weights, rope=fingerprint.rope
    )


def read_fingerprint(message: pb.Fingerprint) -> Fingerprint:
    return Fingerprint(message.model, message.revision, message.weights, message.rope)


def write_spec(spec: MemorySpec) -> pb.MemorySpec:
    return pb.MemorySpec(
        fingerprint=write_fingerprint(spec.fingerprint),
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=DTYPE[spec.dtype],
        index=pb.IndexPolicy(factory=spec.index.factory, min_tokens=spec.index.min_tokens),
    )


def read_spec(message: pb.MemorySpec) -> MemorySpec:
    index, policy = message.index, IndexPolicy()
    return MemorySpec(
        fingerprint=read_fingerprint(message.fingerprint),
        layers=tuple(message.layers),
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        dtype=read_word(STORED_DTYPES, message.dtype, "spec.dtype"),
        index=IndexPolicy(
            factory=index.factory if index.HasField("factory") else policy.factory,
            min_tokens=index.min_tokens if index.HasField("min_tokens") else policy.min_tokens,
        ),
    )


def write_memory(memory: MemoryInfo) -> pb.Memory:
    return pb.Memory(
        name=memory.name,
        spec=write_spec(memory.spec),
        created_at=write_time(memory.created_at),
        documents=memory.documents,
        tokens=memory.tokens,
        bytes=memory.bytes,
    )


def read_memory(message: pb.Memory) -> MemoryInfo:
    created_at = read_time(message.created_at)
    spec = read_spec(message.spec)
    return MemoryInfo(message.name, spec, created_at, message.documents, message.tokens, message.bytes)


# --- Documents ------------------------------------------------------------------------------------------------------


def write_scalar(value: Scalar) -> pb.Scalar:
    if isinstance(value, bool):
        return pb.Scalar(flag=value)
    if isinstance(value, int):
        return pb.Scalar(integer=value)
    if isinstance(value, float):
        return pb.Scalar(number=value)
    if isinstance(value, str):
        return pb.Scalar(text=value)
    raise InvalidArgument(f"a metadata value must be text, a number or a flag, got {type(value).__name__}")


def read_scalar(message: pb.Scalar) -> Scalar:
    match message.WhichOneof("value"):
        case "text":
            return message.text
        case "integer":
            return message.integer
        case "number" if math.isfinite(message.number):
            return message.number
        case "flag":
            return message.flag
        case "number":
            raise InvalidArgument("a metadata value must be finite")
        case _:
            raise InvalidArgument("a metadata value is not set")


def write_metadata(metadata: Mapping[str, Scalar], target: MutableMapping[str, pb.Scalar]) -> None:
    """Fill a message's map, which cannot be assigned."""
    for key, value in metadata.items():
        target[key].CopyFrom(write_scalar(value))


def read_metadata(message: Mapping[str, pb.Scalar]) -> dict[str, Scalar]:
    return {key: read_scalar(value) for key, value in message.items()}


def write_document(document: DocumentInfo) -> pb.Document:
    message = pb.Document(
        id=document.id,
        tokens=document.tokens,
        generation=document.generation,
        committed_at=write_time(document.committed_at),
    )
    write_metadata(document.metadata, message.metadata)
    return message


def read_document(message: pb.Document) -> DocumentInfo:
    metadata, committed_at = read_metadata(message.metadata), read_time(message.committed_at)
    return DocumentInfo(message.id, message.tokens, metadata, message.generation, committed_at)


def write_deleted(deleted: Deleted) -> pb.Deleted:
    return pb.Deleted(id=deleted.id, generation=deleted.generation)


def read_deleted(message: pb.Deleted) -> Deleted:
    return Deleted(message.id, message.generation)


def write_upload(upload: Upload) -> pb.Upload:
    return pb.Upload(
        id=upload.id,
        part_tokens=upload.part_tokens,
        parts=upload.parts,
        chunk_bytes=upload.chunk_bytes,
        missing=[pb.ChunkRange(part=part, first=first, chunks=chunks) for part, first, chunks in upload.missing],
        expires_at=write_time(upload.expires_at),
        committed=None if upload.committed is None else write_document(upload.committed),
    )


def read_upload(message: pb.Upload) -> Upload:
    return Upload(
        id=message.id,
        part_tokens=message.part_tokens,
        parts=message.parts,
        chunk_bytes=message.chunk_bytes,
        missing=tuple((one.part, one.first, one.chunks) for one in message.missing),
        expires_at=read_time(message.expires_at),
        committed=read_document(message.committed) if message.HasField("committed") else None,
    )


# --- Sessions, operations and figures -------------------------------------------------------------------------------


def write_session(session: SessionInfo) -> pb.Session:
    return pb.Session(
        id=session.id,
        memory=session.memory,
        lease=write_duration(session.lease_s, "lease"),
        expires_at=write_time(session.expires_at),
        tokens=session.tokens,
    )


def read_session(message: pb.Session) -> SessionInfo:
    lease_s, expires_at = read_duration(message.lease), read_time(message.expires_at)
    return SessionInfo(message.id, message.memory, lease_s, expires_at, tuple(message.tokens))


def write_append(append: SessionAppend) -> pb.SessionAppend:
    return pb.SessionAppend(
        session=append.session,
        layers=append.layers,
        first_token=append.first_token,
        keys=write_tensor(append.keys),
        values=write_tensor(append.values),
        token_ids=None if append.token_ids is None else write_tensor(append.token_ids),
    )


def read_append(message: pb.SessionAppend) -> SessionAppend:
    token_ids = read_tensor(message.token_ids, "token_ids", "[T]", INTEGERS) if message.HasField("token_ids") else None
    return SessionAppend(
        session=message.session,
        layers=tuple(message.layers),
        first_token=message.first_token,
        keys=read_tensor(message.keys, "keys", "[l, H, T, D]"),
        values=read_tensor(message.values, "values", "[l, H, T, D]"),
        token_ids=token_ids,
    )


def write_operation(operation: Operation) -> pb.Operation:
    return pb.Operation(
        id=operation.id,
        memory=operation.memory,
        kind=OPERATION_KIND[operation.kind],
        state=OPERATION_STATE[operation.state],
        done=operation.done,
        total=operation.total,
        message=operation.message,
        created_at=write_time(operation.created_at),
        updated_at=write_time(operation.updated_at),
        snapshot=operation.snapshot,
        held_until=write_time(operation.held_until) if operation.held_until else None,
    )


def read_operation(message: pb.Operation) -> Operation:
    return Operation(
        id=message.id,
        memory=message.memory,
        kind=read_word(OPERATION_KINDS, message.kind, "operation.kind"),
        state=read_word(OPERATION_STATES, message.state, "operation.state"),
        done=message.done,
        total=message.total,
        message=message.message,
        created_at=read_time(message.created_at),
        updated_at=read_time(message.updated_at),
        snapshot=message.snapshot,
        held_until=read_time(message.held_until) if message.HasField("held_until") else 0.0,
    )


def write_snapshot(snapshot: Snapshot) -> pb.Snapshot:
    return pb.Snapshot(
        id=snapshot.id,
        memory=snapshot.memory,
        created_at=write_time(snapshot.created_at),
        documents=snapshot.documents,
        tokens=snapshot.tokens,
        bytes=snapshot.bytes,
        shard=snapshot.shard,
        shards=snapshot.shards,
        missing=snapshot.missing,
        problem=snapshot.problem,
    )


def read_snapshot(message: pb.Snapshot) -> Snapshot:
    return Snapshot(
        id=message.id,
        memory=message.memory,
        created_at=read_time(message.created_at),
        documents=message.documents,
        tokens=message.tokens,
        bytes=message.bytes,
        shard=message.shard,
        shards=tuple(message.shards),
        missing=tuple(message.missing),
        problem=message.problem,
    )


_FIGURES = tuple(field for field in Stats.__dataclass_fields__)


def write_stats(stats: Stats) -> pb.Stats:
    return pb.Stats(**{name: getattr(stats, name) for name in _FIGURES})


def read_stats(message: pb.Stats) -> Stats:
    return Stats(**{name: getattr(message, name) for name in _FIGURES})
