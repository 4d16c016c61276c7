import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_BF16: _ClassVar[DataType]
    DATA_TYPE_F16: _ClassVar[DataType]
    DATA_TYPE_F32: _ClassVar[DataType]
    DATA_TYPE_I32: _ClassVar[DataType]
    DATA_TYPE_I64: _ClassVar[DataType]

class Conflict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONFLICT_UNSPECIFIED: _ClassVar[Conflict]
    CONFLICT_FAIL: _ClassVar[Conflict]
    CONFLICT_REPLACE: _ClassVar[Conflict]

class Compare(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPARE_UNSPECIFIED: _ClassVar[Compare]
    COMPARE_EQ: _ClassVar[Compare]
    COMPARE_NE: _ClassVar[Compare]
    COMPARE_LT: _ClassVar[Compare]
    COMPARE_LE: _ClassVar[Compare]
    COMPARE_GT: _ClassVar[Compare]
    COMPARE_GE: _ClassVar[Compare]
    COMPARE_IN: _ClassVar[Compare]
    COMPARE_EXISTS: _ClassVar[Compare]

class Engine(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_UNSPECIFIED: _ClassVar[Engine]
    ENGINE_AUTO: _ClassVar[Engine]
    ENGINE_EXACT: _ClassVar[Engine]
    ENGINE_INDEX: _ClassVar[Engine]

class OperationKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_KIND_UNSPECIFIED: _ClassVar[OperationKind]
    OPERATION_KIND_INDEX: _ClassVar[OperationKind]
    OPERATION_KIND_COMPACT: _ClassVar[OperationKind]
    OPERATION_KIND_VERIFY: _ClassVar[OperationKind]
    OPERATION_KIND_SNAPSHOT: _ClassVar[OperationKind]
    OPERATION_KIND_RESTORE: _ClassVar[OperationKind]

class OperationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_STATE_UNSPECIFIED: _ClassVar[OperationState]
    OPERATION_STATE_RUNNING: _ClassVar[OperationState]
    OPERATION_STATE_DONE: _ClassVar[OperationState]
    OPERATION_STATE_FAILED: _ClassVar[OperationState]
    OPERATION_STATE_CANCELLED: _ClassVar[OperationState]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_BF16: DataType
DATA_TYPE_F16: DataType
DATA_TYPE_F32: DataType
DATA_TYPE_I32: DataType
DATA_TYPE_I64: DataType
CONFLICT_UNSPECIFIED: Conflict
CONFLICT_FAIL: Conflict
CONFLICT_REPLACE: Conflict
COMPARE_UNSPECIFIED: Compare
COMPARE_EQ: Compare
COMPARE_NE: Compare
COMPARE_LT: Compare
COMPARE_LE: Compare
COMPARE_GT: Compare
COMPARE_GE: Compare
COMPARE_IN: Compare
COMPARE_EXISTS: Compare
ENGINE_UNSPECIFIED: Engine
ENGINE_AUTO: Engine
ENGINE_EXACT: Engine
ENGINE_INDEX: Engine
OPERATION_KIND_UNSPECIFIED: OperationKind
OPERATION_KIND_INDEX: OperationKind
OPERATION_KIND_COMPACT: OperationKind
OPERATION_KIND_VERIFY: OperationKind
OPERATION_KIND_SNAPSHOT: OperationKind
OPERATION_KIND_RESTORE: OperationKind
OPERATION_STATE_UNSPECIFIED: OperationState
OPERATION_STATE_RUNNING: OperationState
OPERATION_STATE_DONE: OperationState
OPERATION_STATE_FAILED: OperationState
OPERATION_STATE_CANCELLED: OperationState

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "raw")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    raw: bytes
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., raw: _Optional[bytes] = ...) -> None: ...

class Fingerprint(_message.Message):
    __slots__ = ("model", "revision", "weights", "rope")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    weights: str
    rope: str
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., weights: _Optional[str] = ..., rope: _Optional[str] = ...) -> None: ...

class IndexPolicy(_message.Message):
    __slots__ = ("factory", "min_tokens")
    FACTORY_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    factory: str
    min_tokens: int
    def __init__(self, factory: _Optional[str] = ..., min_tokens: _Optional[int] = ...) -> None: ...

class MemorySpec(_message.Message):
    __slots__ = ("fingerprint", "layers", "kv_heads", "head_dim", "dtype", "index")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    fingerprint: Fingerprint
    layers: _containers.RepeatedScalarFieldContainer[int]
    kv_heads: int
    head_dim: int
    dtype: DataType
    index: IndexPolicy
    def __init__(self, fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., layers: _Optional[_Iterable[int]] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[_Union[DataType, str]] = ..., index: _Optional[_Union[IndexPolicy, _Mapping]] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("name", "spec", "created_at", "documents", "tokens", "bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    spec: MemorySpec
    created_at: _timestamp_pb2.Timestamp
    documents: int
    tokens: int
    bytes: int
    def __init__(self, name: _Optional[str] = ..., spec: _Optional[_Union[MemorySpec, _Mapping]] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., documents: _Optional[int] = ..., tokens: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class Scalar(_message.Message):
    __slots__ = ("text", "integer", "number", "flag")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    text: str
    integer: int
    number: float
    flag: bool
    def __init__(self, text: _Optional[str] = ..., integer: _Optional[int] = ..., number: _Optional[float] = ..., flag: _Optional[bool] = ...) -> None: ...

class Document(_message.Message):
    __slots__ = ("id", "tokens", "metadata", "generation", "committed_at")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scalar
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_AT_FIELD_NUMBER: _ClassVar[int]
    id: str
    tokens: int
    metadata: _containers.MessageMap[str, Scalar]
    generation: int
    committed_at: _timestamp_pb2.Timestamp
    def __init__(self, id: _Optional[str] = ..., tokens: _Optional[int] = ..., metadata: _Optional[_Mapping[str, Scalar]] = ..., generation: _Optional[int] = ..., committed_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Deleted(_message.Message):
    __slots__ = ("id", "generation")
    ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    id: str
    generation: int
    def __init__(self, id: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class ChunkRange(_message.Message):
    __slots__ = ("part", "first", "chunks")
    PART_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    part: int
    first: int
    chunks: int
    def __init__(self, part: _Optional[int] = ..., first: _Optional[int] = ..., chunks: _Optional[int] = ...) -> None: ...

class Upload(_message.Message):
    __slots__ = ("id", "part_tokens", "parts", "chunk_bytes", "missing", "expires_at", "committed")
    ID_FIELD_NUMBER: _ClassVar[int]
    PART_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    id: str
    part_tokens: int
    parts: int
    chunk_bytes: int
    missing: _containers.RepeatedCompositeFieldContainer[ChunkRange]
    expires_at: _timestamp_pb2.Timestamp
    committed: Document
    def __init__(self, id: _Optional[str] = ..., part_tokens: _Optional[int] = ..., parts: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., missing: _Optional[_Iterable[_Union[ChunkRange, _Mapping]]] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., committed: _Optional[_Union[Document, _Mapping]] = ...) -> None: ...

class Condition(_message.Message):
    __slots__ = ("key", "compare", "values")
    KEY_FIELD_NUMBER: _ClassVar[int]
    COMPARE_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    key: str
    compare: Compare
    values: _containers.RepeatedCompositeFieldContainer[Scalar]
    def __init__(self, key: _Optional[str] = ..., compare: _Optional[_Union[Compare, str]] = ..., values: _Optional[_Iterable[_Union[Scalar, _Mapping]]] = ...) -> None: ...

class Filters(_message.Message):
    __slots__ = ("parts",)
    PARTS_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[Filter]
    def __init__(self, parts: _Optional[_Iterable[_Union[Filter, _Mapping]]] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("condition", "all_of", "any_of", "negated")
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    ALL_OF_FIELD_NUMBER: _ClassVar[int]
    ANY_OF_FIELD_NUMBER: _ClassVar[int]
    NEGATED_FIELD_NUMBER: _ClassVar[int]
    condition: Condition
    all_of: Filters
    any_of: Filters
    negated: Filter
    def __init__(self, condition: _Optional[_Union[Condition, _Mapping]] = ..., all_of: _Optional[_Union[Filters, _Mapping]] = ..., any_of: _Optional[_Union[Filters, _Mapping]] = ..., negated: _Optional[_Union[Filter, _Mapping]] = ...) -> None: ...

class DocumentIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Iterable[str]] = ...) -> None: ...

class SessionScope(_message.Message):
    __slots__ = ("id", "until", "at_least")
    ID_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    id: str
    until: int
    at_least: int
    def __init__(self, id: _Optional[str] = ..., until: _Optional[int] = ..., at_least: _Optional[int] = ...) -> None: ...

class Scope(_message.Message):
    __slots__ = ("documents", "where", "sessions")
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    documents: DocumentIds
    where: Filter
    sessions: _containers.RepeatedCompositeFieldContainer[SessionScope]
    def __init__(self, documents: _Optional[_Union[DocumentIds, _Mapping]] = ..., where: _Optional[_Union[Filter, _Mapping]] = ..., sessions: _Optional[_Iterable[_Union[SessionScope, _Mapping]]] = ...) -> None: ...

class AttendOptions(_message.Message):
    __slots__ = ("top_k", "engine", "scale", "logit_gap", "search", "tokens", "attribution", "measure", "output_dtype")
    class SearchEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    LOGIT_GAP_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    MEASURE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    top_k: int
    engine: Engine
    scale: float
    logit_gap: float
    search: _containers.ScalarMap[str, float]
    tokens: bool
    attribution: bool
    measure: bool
    output_dtype: DataType
    def __init__(self, top_k: _Optional[int] = ..., engine: _Optional[_Union[Engine, str]] = ..., scale: _Optional[float] = ..., logit_gap: _Optional[float] = ..., search: _Optional[_Mapping[str, float]] = ..., tokens: _Optional[bool] = ..., attribution: _Optional[bool] = ..., measure: _Optional[bool] = ..., output_dtype: _Optional[_Union[DataType, str]] = ...) -> None: ...

class AttendGroup(_message.Message):
    __slots__ = ("scope", "queries", "share")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    scope: Scope
    queries: Tensor
    share: GroupShare
    def __init__(self, scope: _Optional[_Union[Scope, _Mapping]] = ..., queries: _Optional[_Union[Tensor, _Mapping]] = ..., share: _Optional[_Union[GroupShare, _Mapping]] = ...) -> None: ...

class GroupShare(_message.Message):
    __slots__ = ("counts", "lse")
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    counts: Tensor
    lse: Tensor
    def __init__(self, counts: _Optional[_Union[Tensor, _Mapping]] = ..., lse: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Coverage(_message.Message):
    __slots__ = ("searched", "in_scope")
    SEARCHED_FIELD_NUMBER: _ClassVar[int]
    IN_SCOPE_FIELD_NUMBER: _ClassVar[int]
    searched: int
    in_scope: int
    def __init__(self, searched: _Optional[int] = ..., in_scope: _Optional[int] = ...) -> None: ...

class TopTokens(_message.Message):
    __slots__ = ("sources", "source", "offset", "score", "weight")
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedScalarFieldContainer[str]
    source: Tensor
    offset: Tensor
    score: Tensor
    weight: Tensor
    def __init__(self, sources: _Optional[_Iterable[str]] = ..., source: _Optional[_Union[Tensor, _Mapping]] = ..., offset: _Optional[_Union[Tensor, _Mapping]] = ..., score: _Optional[_Union[Tensor, _Mapping]] = ..., weight: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Attribution(_message.Message):
    __slots__ = ("source", "mass")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MASS_FIELD_NUMBER: _ClassVar[int]
    source: str
    mass: float
    def __init__(self, source: _Optional[str] = ..., mass: _Optional[float] = ...) -> None: ...

class Attributions(_message.Message):
    __slots__ = ("masses",)
    MASSES_FIELD_NUMBER: _ClassVar[int]
    masses: _containers.RepeatedCompositeFieldContainer[Attribution]
    def __init__(self, masses: _Optional[_Iterable[_Union[Attribution, _Mapping]]] = ...) -> None: ...

class Measured(_message.Message):
    __slots__ = ("recall", "captured_mass")
    RECALL_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_MASS_FIELD_NUMBER: _ClassVar[int]
    recall: float
    captured_mass: float
    def __init__(self, recall: _Optional[float] = ..., captured_mass: _Optional[float] = ...) -> None: ...

class Attended(_message.Message):
    __slots__ = ("output", "lse", "coverage", "engine", "tokens", "attribution", "measured")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    output: Tensor
    lse: Tensor
    coverage: Coverage
    engine: str
    tokens: TopTokens
    attribution: Attributions
    measured: Measured
    def __init__(self, output: _Optional[_Union[Tensor, _Mapping]] = ..., lse: _Optional[_Union[Tensor, _Mapping]] = ..., coverage: _Optional[_Union[Coverage, _Mapping]] = ..., engine: _Optional[str] = ..., tokens: _Optional[_Union[TopTokens, _Mapping]] = ..., attribution: _Optional[_Union[Attributions, _Mapping]] = ..., measured: _Optional[_Union[Measured, _Mapping]] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("id", "memory", "lease", "expires_at", "tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: str
    memory: str
    lease: _duration_pb2.Duration
    expires_at: _timestamp_pb2.Timestamp
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, id: _Optional[str] = ..., memory: _Optional[str] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class SessionAppend(_message.Message):
    __slots__ = ("session", "layers", "first_token", "keys", "values", "token_ids")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    session: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    first_token: int
    keys: Tensor
    values: Tensor
    token_ids: Tensor
    def __init__(self, session: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., first_token: _Optional[int] = ..., keys: _Optional[_Union[Tensor, _Mapping]] = ..., values: _Optional[_Union[Tensor, _Mapping]] = ..., token_ids: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("id", "memory", "kind", "state", "done", "total", "message", "created_at", "updated_at", "snapshot", "held_until")
    ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    HELD_UNTIL_FIELD_NUMBER: _ClassVar[int]
    id: str
    memory: str
    kind: OperationKind
    state: OperationState
    done: int
    total: int
    message: str
    created_at: _timestamp_pb2.Timestamp
    updated_at: _timestamp_pb2.Timestamp
    snapshot: str
    held_until: _timestamp_pb2.Timestamp
    def __init__(self, id: _Optional[str] = ..., memory: _Optional[str] = ..., kind: _Optional[_Union[OperationKind, str]] = ..., state: _Optional[_Union[OperationState, str]] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., message: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., updated_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., snapshot: _Optional[str] = ..., held_until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("id", "memory", "created_at", "documents", "tokens", "bytes", "shard", "shards", "missing", "problem")
    ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    id: str
    memory: str
    created_at: _timestamp_pb2.Timestamp
    documents: int
    tokens: int
    bytes: int
    shard: str
    shards: _containers.RepeatedScalarFieldContainer[str]
    missing: _containers.RepeatedScalarFieldContainer[str]
    problem: str
    def __init__(self, id: _Optional[str] = ..., memory: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., documents: _Optional[int] = ..., tokens: _Optional[int] = ..., bytes: _Optional[int] = ..., shard: _Optional[str] = ..., shards: _Optional[_Iterable[str]] = ..., missing: _Optional[_Iterable[str]] = ..., problem: _Optional[str] = ...) -> None: ...

class Stats(_message.Message):
    __slots__ = ("memory", "documents", "tokens", "bytes", "segments", "dead_bytes", "resident_bytes", "resident_tokens", "indexed_tokens", "index_bytes", "sessions", "session_bytes")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    DEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INDEXED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INDEX_BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    SESSION_BYTES_FIELD_NUMBER: _ClassVar[int]
    memory: str
    documents: int
    tokens: int
    bytes: int
    segments: int
    dead_bytes: int
    resident_bytes: int
    resident_tokens: int
    indexed_tokens: int
    index_bytes: int
    sessions: int
    session_bytes: int
    def __init__(self, memory: _Optional[str] = ..., documents: _Optional[int] = ..., tokens: _Optional[int] = ..., bytes: _Optional[int] = ..., segments: _Optional[int] = ..., dead_bytes: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., resident_tokens: _Optional[int] = ..., indexed_tokens: _Optional[int] = ..., index_bytes: _Optional[int] = ..., sessions: _Optional[int] = ..., session_bytes: _Optional[int] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("shard", "shards")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    shard: str
    shards: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, shard: _Optional[str] = ..., shards: _Optional[_Iterable[str]] = ...) -> None: ...

class CreateMemoryRequest(_message.Message):
    __slots__ = ("name", "spec", "created_at")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    name: str
    spec: MemorySpec
    created_at: _timestamp_pb2.Timestamp
    def __init__(self, name: _Optional[str] = ..., spec: _Optional[_Union[MemorySpec, _Mapping]] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class CreateMemoryResponse(_message.Message):
    __slots__ = ("memory",)
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    memory: Memory
    def __init__(self, memory: _Optional[_Union[Memory, _Mapping]] = ...) -> None: ...

class GetMemoryRequest(_message.Message):
    __slots__ = ("name", "placement")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    placement: Placement
    def __init__(self, name: _Optional[str] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...

class GetMemoryResponse(_message.Message):
    __slots__ = ("memory",)
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    memory: Memory
    def __init__(self, memory: _Optional[_Union[Memory, _Mapping]] = ...) -> None: ...

class ListMemoriesRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "placement")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    placement: Placement
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...

class ListMemoriesResponse(_message.Message):
    __slots__ = ("memories", "next_page_token")
    MEMORIES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    memories: _containers.RepeatedCompositeFieldContainer[Memory]
    next_page_token: str
    def __init__(self, memories: _Optional[_Iterable[_Union[Memory, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteMemoryRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteMemoryResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PutDocumentRequest(_message.Message):
    __slots__ = ("memory", "document", "keys", "values", "token_ids", "metadata", "fingerprint", "conflict", "request_id", "generation")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scalar
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ...) -> None: ...
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CONFLICT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    memory: str
    document: str
    keys: Tensor
    values: Tensor
    token_ids: Tensor
    metadata: _containers.MessageMap[str, Scalar]
    fingerprint: Fingerprint
    conflict: Conflict
    request_id: str
    generation: int
    def __init__(self, memory: _Optional[str] = ..., document: _Optional[str] = ..., keys: _Optional[_Union[Tensor, _Mapping]] = ..., values: _Optional[_Union[Tensor, _Mapping]] = ..., token_ids: _Optional[_Union[Tensor, _Mapping]] = ..., metadata: _Optional[_Mapping[str, Scalar]] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., conflict: _Optional[_Union[Conflict, str]] = ..., request_id: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class PutDocumentResponse(_message.Message):
    __slots__ = ("document",)
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    document: Document
    def __init__(self, document: _Optional[_Union[Document, _Mapping]] = ...) -> None: ...

class BeginUploadRequest(_message.Message):
    __slots__ = ("memory", "document", "tokens", "fingerprint", "metadata", "conflict", "request_id", "generation")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scalar
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ...) -> None: ...
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    CONFLICT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    memory: str
    document: str
    tokens: int
    fingerprint: Fingerprint
    metadata: _containers.MessageMap[str, Scalar]
    conflict: Conflict
    request_id: str
    generation: int
    def __init__(self, memory: _Optional[str] = ..., document: _Optional[str] = ..., tokens: _Optional[int] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., metadata: _Optional[_Mapping[str, Scalar]] = ..., conflict: _Optional[_Union[Conflict, str]] = ..., request_id: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class BeginUploadResponse(_message.Message):
    __slots__ = ("upload",)
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    upload: Upload
    def __init__(self, upload: _Optional[_Union[Upload, _Mapping]] = ...) -> None: ...

class UploadChunksRequest(_message.Message):
    __slots__ = ("memory", "upload", "part", "offset", "crc32", "data")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    memory: str
    upload: str
    part: int
    offset: int
    crc32: int
    data: bytes
    def __init__(self, memory: _Optional[str] = ..., upload: _Optional[str] = ..., part: _Optional[int] = ..., offset: _Optional[int] = ..., crc32: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadChunksResponse(_message.Message):
    __slots__ = ("chunks", "bytes")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    chunks: int
    bytes: int
    def __init__(self, chunks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class GetUploadRequest(_message.Message):
    __slots__ = ("memory", "upload")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    memory: str
    upload: str
    def __init__(self, memory: _Optional[str] = ..., upload: _Optional[str] = ...) -> None: ...

class GetUploadResponse(_message.Message):
    __slots__ = ("upload",)
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    upload: Upload
    def __init__(self, upload: _Optional[_Union[Upload, _Mapping]] = ...) -> None: ...

class CommitUploadRequest(_message.Message):
    __slots__ = ("memory", "upload")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    memory: str
    upload: str
    def __init__(self, memory: _Optional[str] = ..., upload: _Optional[str] = ...) -> None: ...

class CommitUploadResponse(_message.Message):
    __slots__ = ("document",)
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    document: Document
    def __init__(self, document: _Optional[_Union[Document, _Mapping]] = ...) -> None: ...

class AbortUploadRequest(_message.Message):
    __slots__ = ("memory", "upload")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    memory: str
    upload: str
    def __init__(self, memory: _Optional[str] = ..., upload: _Optional[str] = ...) -> None: ...

class AbortUploadResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetDocumentRequest(_message.Message):
    __slots__ = ("memory", "document")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    memory: str
    document: str
    def __init__(self, memory: _Optional[str] = ..., document: _Optional[str] = ...) -> None: ...

class GetDocumentResponse(_message.Message):
    __slots__ = ("document",)
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    document: Document
    def __init__(self, document: _Optional[_Union[Document, _Mapping]] = ...) -> None: ...

class ListDocumentsRequest(_message.Message):
    __slots__ = ("memory", "where", "page_size", "page_token")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    memory: str
    where: Filter
    page_size: int
    page_token: str
    def __init__(self, memory: _Optional[str] = ..., where: _Optional[_Union[Filter, _Mapping]] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListDocumentsResponse(_message.Message):
    __slots__ = ("documents", "next_page_token")
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    documents: _containers.RepeatedCompositeFieldContainer[Document]
    next_page_token: str
    def __init__(self, documents: _Optional[_Iterable[_Union[Document, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteDocumentRequest(_message.Message):
    __slots__ = ("memory", "document", "request_id", "generation")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    memory: str
    document: str
    request_id: str
    generation: int
    def __init__(self, memory: _Optional[str] = ..., document: _Optional[str] = ..., request_id: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class DeleteDocumentResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDeletedRequest(_message.Message):
    __slots__ = ("memory", "page_size", "page_token")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    memory: str
    page_size: int
    page_token: str
    def __init__(self, memory: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListDeletedResponse(_message.Message):
    __slots__ = ("deleted", "next_page_token")
    DELETED_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    deleted: _containers.RepeatedCompositeFieldContainer[Deleted]
    next_page_token: str
    def __init__(self, deleted: _Optional[_Iterable[_Union[Deleted, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("memory", "fingerprint", "lease", "session")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    memory: str
    fingerprint: Fingerprint
    lease: _duration_pb2.Duration
    session: str
    def __init__(self, memory: _Optional[str] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., session: _Optional[str] = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class AppendSessionsRequest(_message.Message):
    __slots__ = ("memory", "appends")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    APPENDS_FIELD_NUMBER: _ClassVar[int]
    memory: str
    appends: _containers.RepeatedCompositeFieldContainer[SessionAppend]
    def __init__(self, memory: _Optional[str] = ..., appends: _Optional[_Iterable[_Union[SessionAppend, _Mapping]]] = ...) -> None: ...

class AppendSessionsResponse(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    def __init__(self, sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ...) -> None: ...

class RenewSessionRequest(_message.Message):
    __slots__ = ("memory", "session")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    memory: str
    session: str
    def __init__(self, memory: _Optional[str] = ..., session: _Optional[str] = ...) -> None: ...

class RenewSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("memory", "session")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    memory: str
    session: str
    def __init__(self, memory: _Optional[str] = ..., session: _Optional[str] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AttendRequest(_message.Message):
    __slots__ = ("memory", "layer", "groups", "options", "placement")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layer: int
    groups: _containers.RepeatedCompositeFieldContainer[AttendGroup]
    options: AttendOptions
    placement: Placement
    def __init__(self, memory: _Optional[str] = ..., layer: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[AttendGroup, _Mapping]]] = ..., options: _Optional[_Union[AttendOptions, _Mapping]] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...

class AttendResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[Attended]
    def __init__(self, answers: _Optional[_Iterable[_Union[Attended, _Mapping]]] = ...) -> None: ...

class SearchRequest(_message.Message):
    __slots__ = ("memory", "layer", "groups", "options", "placement")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layer: int
    groups: _containers.RepeatedCompositeFieldContainer[AttendGroup]
    options: AttendOptions
    placement: Placement
    def __init__(self, memory: _Optional[str] = ..., layer: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[AttendGroup, _Mapping]]] = ..., options: _Optional[_Union[AttendOptions, _Mapping]] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...

class SearchResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[TopTokens]
    def __init__(self, answers: _Optional[_Iterable[_Union[TopTokens, _Mapping]]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("memory", "source", "layer", "first_token", "tokens")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    memory: str
    source: str
    layer: int
    first_token: int
    tokens: int
    def __init__(self, memory: _Optional[str] = ..., source: _Optional[str] = ..., layer: _Optional[int] = ..., first_token: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("layout", "data", "crc32")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    layout: FetchLayout
    data: bytes
    crc32: int
    def __init__(self, layout: _Optional[_Union[FetchLayout, _Mapping]] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class FetchLayout(_message.Message):
    __slots__ = ("dtype", "kv_heads", "tokens", "head_dim", "first_token")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    kv_heads: int
    tokens: int
    head_dim: int
    first_token: int
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., kv_heads: _Optional[int] = ..., tokens: _Optional[int] = ..., head_dim: _Optional[int] = ..., first_token: _Optional[int] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ("memory", "placement")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    memory: str
    placement: Placement
    def __init__(self, memory: _Optional[str] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("stats",)
    STATS_FIELD_NUMBER: _ClassVar[int]
    stats: Stats
    def __init__(self, stats: _Optional[_Union[Stats, _Mapping]] = ...) -> None: ...

class StartOperationRequest(_message.Message):
    __slots__ = ("memory", "kind", "factory")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FACTORY_FIELD_NUMBER: _ClassVar[int]
    memory: str
    kind: OperationKind
    factory: str
    def __init__(self, memory: _Optional[str] = ..., kind: _Optional[_Union[OperationKind, str]] = ..., factory: _Optional[str] = ...) -> None: ...

class StartOperationResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    def __init__(self, operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class GetOperationRequest(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: str
    def __init__(self, operation: _Optional[str] = ...) -> None: ...

class GetOperationResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    def __init__(self, operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class ListOperationsRequest(_message.Message):
    __slots__ = ("memory", "page_size", "page_token")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    memory: str
    page_size: int
    page_token: str
    def __init__(self, memory: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListOperationsResponse(_message.Message):
    __slots__ = ("operations", "next_page_token")
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    operations: _containers.RepeatedCompositeFieldContainer[Operation]
    next_page_token: str
    def __init__(self, operations: _Optional[_Iterable[_Union[Operation, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class CancelOperationRequest(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: str
    def __init__(self, operation: _Optional[str] = ...) -> None: ...

class CancelOperationResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    def __init__(self, operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class CreateSnapshotRequest(_message.Message):
    __slots__ = ("memory", "snapshot", "hold")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    memory: str
    snapshot: str
    hold: _duration_pb2.Duration
    def __init__(self, memory: _Optional[str] = ..., snapshot: _Optional[str] = ..., hold: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class CreateSnapshotResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    def __init__(self, operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class ReleaseHoldRequest(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: str
    def __init__(self, operation: _Optional[str] = ...) -> None: ...

class ReleaseHoldResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    def __init__(self, operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class GetSnapshotRequest(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: str
    def __init__(self, snapshot: _Optional[str] = ...) -> None: ...

class GetSnapshotResponse(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: Snapshot
    def __init__(self, snapshot: _Optional[_Union[Snapshot, _Mapping]] = ...) -> None: ...

class ListSnapshotsRequest(_message.Message):
    __slots__ = ("memory", "page_size", "page_token")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    memory: str
    page_size: int
    page_token: str
    def __init__(self, memory: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSnapshotsResponse(_message.Message):
    __slots__ = ("snapshots", "next_page_token")
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    snapshots: _containers.RepeatedCompositeFieldContainer[Snapshot]
    next_page_token: str
    def __init__(self, snapshots: _Optional[_Iterable[_Union[Snapshot, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteSnapshotRequest(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: str
    def __init__(self, snapshot: _Optional[str] = ...) -> None: ...

class DeleteSnapshotResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RestoreSnapshotRequest(_message.Message):
    __slots__ = ("snapshot", "memory")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    snapshot: str
    memory: str
    def __init__(self, snapshot: _Optional[str] = ..., memory: _Optional[str] = ...) -> None: ...

class RestoreSnapshotResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    def __init__(self, operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("id", "addresses")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    id: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class ShardMap(_message.Message):
    __slots__ = ("epoch", "shards", "also", "switched")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    ALSO_FIELD_NUMBER: _ClassVar[int]
    SWITCHED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    also: _containers.RepeatedCompositeFieldContainer[Shard]
    switched: bool
    def __init__(self, epoch: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., also: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., switched: _Optional[bool] = ...) -> None: ...

class GetShardMapRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetShardMapResponse(_message.Message):
    __slots__ = ("map", "shard", "behind", "whole")
    MAP_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    BEHIND_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    map: ShardMap
    shard: str
    behind: bool
    whole: int
    def __init__(self, map: _Optional[_Union[ShardMap, _Mapping]] = ..., shard: _Optional[str] = ..., behind: _Optional[bool] = ..., whole: _Optional[int] = ...) -> None: ...

class SetShardMapRequest(_message.Message):
    __slots__ = ("map", "shard", "behind", "whole")
    MAP_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    BEHIND_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    map: ShardMap
    shard: str
    behind: bool
    whole: int
    def __init__(self, map: _Optional[_Union[ShardMap, _Mapping]] = ..., shard: _Optional[str] = ..., behind: _Optional[bool] = ..., whole: _Optional[int] = ...) -> None: ...

class SetShardMapResponse(_message.Message):
    __slots__ = ("map", "shard", "behind", "whole")
    MAP_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    BEHIND_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    map: ShardMap
    shard: str
    behind: bool
    whole: int
    def __init__(self, map: _Optional[_Union[ShardMap, _Mapping]] = ..., shard: _Optional[str] = ..., behind: _Optional[bool] = ..., whole: _Optional[int] = ...) -> None: ...

class MarkBehindRequest(_message.Message):
    __slots__ = ("missed",)
    MISSED_FIELD_NUMBER: _ClassVar[int]
    missed: int
    def __init__(self, missed: _Optional[int] = ...) -> None: ...

class MarkBehindResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
