"""Nouns as protobuf messages, and back: `write_x` makes a message, `read_x` checks one and makes the noun."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from functools import lru_cache
from types import MappingProxyType
from typing import TypeVar

import torch
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from memory_service.errors import InvalidArgument
from memory_service.types import (
    MAX_GROUPS,
    AllOf,
    AnyOf,
    Attended,
    AttendGroup,
    AttendOptions,
    Attribution,
    Compare,
    Condition,
    Conflict,
    Coverage,
    DocumentInfo,
    DType,
    Engine,
    Filter,
    Fingerprint,
    IndexPolicy,
    Measured,
    MemoryInfo,
    MemorySpec,
    Not,
    Operation,
    OperationKind,
    OperationState,
    Scalar,
    Scope,
    SessionAppend,
    SessionInfo,
    SessionScope,
    Stats,
    TopTokens,
    Upload,
)
from memory_service.v1 import memory_pb2 as pb
from memory_service.wire import INTEGERS, read_tensor, write_tensor

MAX_FILTER_DEPTH = 32
MAX_FILTER_PARTS = 1024
MAX_DURATION_S = 315_576_000_000  # Of google.protobuf.Duration: 10,000 years.
Member = TypeVar("Member")

# --- Words and times ------------------------------------------------------------------------------------------------

DTYPE = {DType.BF16: pb.DATA_TYPE_BF16, DType.F16: pb.DATA_TYPE_F16, DType.F32: pb.DATA_TYPE_F32}
CONFLICT = {Conflict.FAIL: pb.CONFLICT_FAIL, Conflict.REPLACE: pb.CONFLICT_REPLACE}
ENGINE = {Engine.AUTO: pb.ENGINE_AUTO, Engine.EXACT: pb.ENGINE_EXACT, Engine.INDEX: pb.ENGINE_INDEX}
COMPARE = {
    Compare.EQ: pb.COMPARE_EQ,
    Compare.NE: pb.COMPARE_NE,
    Compare.LT: pb.COMPARE_LT,
    Compare.LE: pb.COMPARE_LE,
    Compare.GT: pb.COMPARE_GT,
    Compare.GE: pb.COMPARE_GE,
    Compare.IN: pb.COMPARE_IN,
    Compare.EXISTS: pb.COMPARE_EXISTS,
}
OPERATION_KIND = {
    OperationKind.INDEX: pb.OPERATION_KIND_INDEX,
    OperationKind.COMPACT: pb.OPERATION_KIND_COMPACT,
    OperationKind.VERIFY: pb.OPERATION_KIND_VERIFY,
}
OPERATION_STATE = {
    OperationState.RUNNING: pb.OPERATION_STATE_RUNNING,
    OperationState.DONE: pb.OPERATION_STATE_DONE,
    OperationState.FAILED: pb.OPERATION_STATE_FAILED,
    OperationState.CANCELLED: pb.OPERATION_STATE_CANCELLED,
}


def _by_number(numbers: Mapping[Member, int], default: Member | None = None) -> dict[int, Member]:
    """The members by their numbers; 0, which is "not set", stands for `default` if there is one."""
    words = {number: member for member, number in numbers.items()}
    return words if default is None else {0: default, **words}


DTYPES = _by_number(DTYPE)
CONFLICTS = _by_number(CONFLICT, Conflict.FAIL)
STORED_DTYPES, OUTPUT_DTYPES = _by_number(DTYPE, DType.BF16), _by_number(DTYPE, DType.F32)
ENGINES = _by_number(ENGINE, Engine.AUTO)
COMPARES = _by_number(COMPARE)
OPERATION_KINDS = _by_number(OPERATION_KIND)
OPERATION_STATES = _by_number(OPERATION_STATE)


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


# --- Filters and scopes ---------------------------------------------------------------------------------------------


def write_filter(where: Filter) -> pb.Filter:
    if isinstance(where, Condition):
        values = [write_scalar(value) for value in where.values]
        return pb.Filter(condition=pb.Condition(key=where.key, compare=COMPARE[where.compare], values=values))
    if isinstance(where, Not):
        return pb.Filter(negated=write_filter(where.part))
    parts = pb.Filters(parts=[write_filter(part) for part in where.parts])
    return pb.Filter(all_of=parts) if isinstance(where, AllOf) else pb.Filter(any_of=parts)


def read_filter(message: pb.Filter) -> Filter:
    """The filter of a message. Raises InvalidArgument if it is too deep, too large or says nothing."""
    return _FilterReader().read(message, 1)


class _FilterReader:
    """Counts the parts of one filter while it is read."""

    def __init__(self) -> None:
        self.parts = 0

    def read(self, message: pb.Filter, depth: int) -> Filter:
        self.parts += 1
        if depth > MAX_FILTER_DEPTH or self.parts > MAX_FILTER_PARTS:
            raise InvalidArgument(f"a filter may be {MAX_FILTER_DEPTH} deep and have {MAX_FILTER_PARTS} parts")
        match message.WhichOneof("kind"):
            case "condition":
                return self._condition(message.condition)
            case "negated":
                return Not(self.read(message.negated, depth + 1))
            case "all_of":
                return AllOf(tuple(self.read(part, depth + 1) for part in message.all_of.parts))
            case "any_of":
                return AnyOf(tuple(self.read(part, depth + 1) for part in message.any_of.parts))
            case _:
                raise InvalidArgument("a part of the filter is empty")

    def _condition(self, message: pb.Condition) -> Condition:
        compare = read_word(COMPARES, message.compare, "condition.compare")
        wanted = {Compare.IN: range(MAX_FILTER_PARTS + 1), Compare.EXISTS: range(1)}.get(compare, range(1, 2))
        if len(message.values) not in wanted:
            raise InvalidArgument(f"a condition with {compare.name} cannot have {len(message.values)} values")
        return Condition(message.key, compare, tuple(read_scalar(value) for value in message.values))


_EVERYTHING = Scope()


def write_scope(scope: Scope, message: pb.Scope) -> None:
    """Fill a part of a message."""
    if scope.documents is not None:
        message.documents.SetInParent()  # Present, even if empty: no documents is not all documents.
        message.documents.ids.extend(scope.documents)
    if scope.where is not None:
        message.where.CopyFrom(write_filter(scope.where))
    for one in scope.sessions:
        message.sessions.add(id=one.id, until=one.until)


def read_scope(message: pb.Scope) -> Scope:
    check_count(len(message.sessions), MAX_GROUPS, "scope.sessions")
    return Scope(
        documents=tuple(message.documents.ids) if message.HasField("documents") else None,
        where=read_filter(message.where) if message.HasField("where") else None,
        sessions=tuple(SessionScope(one.id, one.until if one.HasField("until") else None) for one in message.sessions),
    )


# --- Attention ------------------------------------------------------------------------------------------------------


def write_options(options: AttendOptions, message: pb.AttendOptions) -> None:
    """Fill a part of a message."""
    message.top_k = options.top_k
    message.engine = ENGINE[options.engine]
    if options.scale is not None:
        message.scale = options.scale
    if options.logit_gap is not None:
        message.logit_gap = options.logit_gap
    message.search.update(options.search)
    message.tokens = options.tokens
    message.attribution = options.attribution
    message.measure = options.measure
    message.output_dtype = DTYPE[options.output_dtype]


def read_options(message: pb.AttendOptions) -> AttendOptions:
    # A worker attends with the same options every time, and reading them costs more than the rest of a small request.
    raw = message.SerializeToString()
    return _known_options(raw) if len(raw) <= _KNOWN_BYTES else _read_options(message)


_KNOWN_BYTES = 256


@lru_cache(maxsize=1024)
def _known_options(raw: bytes) -> AttendOptions:
    return _read_options(pb.AttendOptions.FromString(raw))


def _read_options(message: pb.AttendOptions) -> AttendOptions:
    return AttendOptions(
        top_k=message.top_k,
        engine=read_word(ENGINES, message.engine, "options.engine"),
        scale=message.scale if message.HasField("scale") else None,
        logit_gap=message.logit_gap if message.HasField("logit_gap") else None,
        search=MappingProxyType(dict(message.search)),  # It is shared by all who ask alike.
        tokens=message.tokens,
        attribution=message.attribution,
        measure=message.measure,
        output_dtype=read_word(OUTPUT_DTYPES, message.output_dtype, "options.output_dtype"),
    )


def write_group(group: AttendGroup, message: pb.AttendGroup) -> None:
    """Fill a part of a message."""
    write_scope(group.scope, message.scope)
    write_tensor(group.queries, message.queries)


def read_group(message: pb.AttendGroup) -> AttendGroup:
    scope = read_scope(message.scope) if message.HasField("scope") else _EVERYTHING
    return AttendGroup(scope, read_tensor(message.queries, "queries", "[G, Q, D]"))


def write_top_tokens(tokens: TopTokens, message: pb.TopTokens) -> None:
    """Fill a part of a message."""
    message.sources.extend(tokens.sources)
    write_tensor(tokens.source, message.source)
    write_tensor(tokens.offset, message.offset)
    write_tensor(tokens.score, message.score)
    write_tensor(tokens.weight, message.weight)


def read_top_tokens(message: pb.TopTokens) -> TopTokens:
    return TopTokens(
        sources=tuple(message.sources),
        source=read_tensor(message.source, "source", "[G, Q, K]", (torch.int32,)),
        offset=read_tensor(message.offset, "offset", "[G, Q, K]", (torch.int64,)),
        score=read_tensor(message.score, "score", "[G, Q, K]"),
        weight=read_tensor(message.weight, "weight", "[G, Q, K]"),
    )


def write_attended(answer: Attended, message: pb.Attended) -> None:
    """Fill a part of a message."""
    write_tensor(answer.output, message.output)
    write_tensor(answer.lse, message.lse)
    message.coverage.searched = answer.coverage.searched
    message.coverage.in_scope = answer.coverage.in_scope
    message.engine = answer.engine
    if answer.tokens is not None:
        write_top_tokens(answer.tokens, message.tokens)
    if answer.attribution is not None:
        message.attribution.SetInParent()
        for one in answer.attribution:
            message.attribution.masses.add(source=one.source, mass=one.mass)
    if answer.measured is not None:
        message.measured.recall = answer.measured.recall
        message.measured.captured_mass = answer.measured.captured_mass
        message.measured.SetInParent()


def read_attended(message: pb.Attended) -> Attended:
    tokens = attribution = measured = None
    if message.HasField("tokens"):
        tokens = read_top_tokens(message.tokens)
    if message.HasField("attribution"):
        attribution = tuple(Attribution(one.source, one.mass) for one in message.attribution.masses)
    if message.HasField("measured"):
        measured = Measured(message.measured.recall, message.measured.captured_mass)
    return Attended(
        output=read_tensor(message.output, "output", "[G, Q, D]"),
        lse=read_tensor(message.lse, "lse", "[G, Q]"),
        coverage=Coverage(message.coverage.searched, message.coverage.in_scope),
        engine=message.engine,
        tokens=tokens,
        attribution=attribution,
        measured=measured,
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
    )


_FIGURES = tuple(field for field in Stats.__dataclass_fields__)


def write_stats(stats: Stats) -> pb.Stats:
    return pb.Stats(**{name: getattr(stats, name) for name in _FIGURES})


def read_stats(message: pb.Stats) -> Stats:
    return Stats(**{name: getattr(message, name) for name in _FIGURES})
