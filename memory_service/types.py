"""The nouns that travel between client, server and store.

L memory layers, H key/value heads, G query heads (a multiple of H), T tokens, Q queries, D head_dim, K top_k.
"""

from __future__ import annotations

import math
import re
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from memory_service.errors import Cancelled, DeadlineExceeded, InvalidArgument, WrongModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
Scalar = str | int | float | bool

MAX_LAYERS = 256
MAX_KV_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_TOP_K = 4096
MAX_QUERIES = 65_536  # query rows (query heads times queries) of one group
MAX_GROUPS = 4096
MAX_DOCUMENT_TOKENS = 1 << 31
MAX_METADATA_KEYS = 64
MAX_METADATA_BYTES = 16_384
MAX_PAGE_SIZE = 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class DType(StrEnum):
    """How keys and values are stored."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"

    @property
    def torch(self) -> torch.dtype:
        return _torch_of(self)

    @property
    def itemsize(self) -> int:
        return self.torch.itemsize


@cache
def _torch_of(dtype: DType) -> torch.dtype:
    import torch  # It takes seconds, which a command that computes nothing should not.

    return {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}[dtype]


def _brief(self: object) -> str:
    """A repr that tells tensors by shape and dtype: their numbers would fill the screen."""
    told = []
    for one in fields(self):  # type: ignore[arg-type]  # only dataclasses use it
        value = getattr(self, one.name)
        text = f"{list(value.shape)} {value.dtype}" if hasattr(value, "numel") else repr(value)
        told.append(f"{one.name}={text}")
    return f"{type(self).__name__}({', '.join(told)})"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Which model made the keys and values. Two fingerprints match only if all four fields are equal."""

    model: str
    revision: str = ""
    weights: str = ""  # Hex digest of the weights that make keys and values.
    rope: str = ""  # Canonical JSON of the RoPE parameters.


@dataclass(frozen=True, slots=True)
class IndexPolicy:
    """When and how a memory is indexed. Quality of the index is never part of durability."""

    factory: str = "auto"  # A Faiss index_factory string, "auto" (chosen by size) or "none" (always exact).
    min_tokens: int = 65_536  # Unindexed tokens that start a background build.


@dataclass(frozen=True, slots=True)
class MemorySpec:
    """What every document and session of a memory has in common."""

    fingerprint: Fingerprint
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: DType = DType.BF16
    index: IndexPolicy = field(default_factory=IndexPolicy)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, all layers and heads."""
        return len(self.layers) * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def check(self) -> None:
        """Raise InvalidArgument unless every field is within its limits."""
        if not self.layers or len(self.layers) > MAX_LAYERS:
            raise InvalidArgument(f"a memory needs 1 to {MAX_LAYERS} memory layers, got {len(self.layers)}")
        if any(layer < 0 for layer in self.layers) or list(self.layers) != sorted(set(self.layers)):
            raise InvalidArgument(f"layers must be distinct, ascending and ≥ 0, got {list(self.layers)[:8]}")
        if not 1 <= self.kv_heads <= MAX_KV_HEADS:
            raise InvalidArgument(f"kv_heads must be 1 to {MAX_KV_HEADS}, got {self.kv_heads}")
        if not 1 <= self.head_dim <= MAX_HEAD_DIM:
            raise InvalidArgument(f"head_dim must be 1 to {MAX_HEAD_DIM}, got {self.head_dim}")
        if not self.fingerprint.model or len(self.fingerprint.model) > 256:
            raise InvalidArgument("fingerprint.model must name the model in 1 to 256 characters")
        if self.index.min_tokens < 1:
            raise InvalidArgument(f"index.min_tokens must be ≥ 1, got {self.index.min_tokens}")

    def check_model(self, fingerprint: Fingerprint) -> None:
        """Raise WrongModel unless `fingerprint` is the memory's own."""
        if fingerprint != self.fingerprint:
            raise WrongModel(
                f"this memory holds keys and values of {self.fingerprint}, the call carries {fingerprint}; "
                "encode the documents again with the memory's model, or create another memory"
            )

    def layer_index(self, layer: int) -> int:
        """Where `layer` stands in the stored tensors."""
        try:
            return self.layers.index(layer)
        except ValueError:
            raise InvalidArgument(f"layer {layer} is not kept by this memory; it keeps {list(self.layers)}") from None


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """One memory as its owner sees it."""

    name: str
    spec: MemorySpec
    created_at: float  # Seconds since the epoch.
    documents: int = 0
    tokens: int = 0
    bytes: int = 0  # Of committed keys, values and token ids.


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A document to store: all its tokens' keys and values. Keys are not rotated."""

    id: str
    keys: Tensor  # [L, H, T, D] in the memory's dtype
    values: Tensor  # [L, H, T, D]
    token_ids: Tensor | None = None  # [T] int64/int32, ≥ 0; None stores zeros
    metadata: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    __repr__ = _brief


@dataclass(frozen=True, slots=True)
class DocumentInfo:
    """A committed document."""

    id: str
    tokens: int
    metadata: Mapping[str, Scalar]
    generation: int  # Grows with every commit of the memory; a replaced document gets a new one.
    committed_at: float


@dataclass(frozen=True, slots=True)
class Deleted:
    """A deletion: of every state of a document up to this generation."""

    id: str
    generation: int


class Conflict(StrEnum):
    """What a commit does if the document id is taken."""

    FAIL = "fail"
    REPLACE = "replace"


@dataclass(frozen=True, slots=True)
class Upload:
    """A document on its way in: which bytes the service still misses."""

    id: str
    part_tokens: int  # Tokens of every part but the last.
    parts: int
    chunk_bytes: int  # Chunks start at multiples of this within a part and have this length, but for a part's last.
    missing: tuple[tuple[int, int, int], ...]  # (part, first chunk, chunks) still to send.
    expires_at: float
    committed: DocumentInfo | None = None  # Set when the request id was committed before.


class Chunk(NamedTuple):
    """A piece of a document part's payload."""

    part: int
    offset: int  # Bytes from the start of the part's payload.
    crc32: int
    data: bytes | memoryview


# --- Metadata filters -----------------------------------------------------------------------------------------------


class Compare(StrEnum):
    EQ = "="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="
    IN = "in"
    EXISTS = "exists"


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison with a metadata field. A missing field matches only NE."""

    key: str
    compare: Compare
    values: tuple[Scalar, ...] = ()

    def matches(self, metadata: Mapping[str, Scalar]) -> bool:
        if self.compare is Compare.EXISTS:
            return self.key in metadata
        if self.key not in metadata:
            return self.compare is Compare.NE
        have = metadata[self.key]
        if self.compare is Compare.IN:
            return any(_same(have, value) for value in self.values)
        want = self.values[0]
        if self.compare in (Compare.EQ, Compare.NE):
            return _same(have, want) == (self.compare is Compare.EQ)
        if isinstance(have, str) != isinstance(want, str) or isinstance(have, bool) or isinstance(want, bool):
            return False
        below, equal = have < want, have == want  # type: ignore[operator]  # both str or both numbers, checked above
        return {
            Compare.LT: below,
            Compare.LE: below or equal,
            Compare.GT: not below and not equal,
            Compare.GE: not below,
        }[self.compare]


def _same(a: Scalar, b: Scalar) -> bool:
    # In Python True == 1; in metadata a flag is not a number.
    return isinstance(a, bool) == isinstance(b, bool) and a == b


@dataclass(frozen=True, slots=True)
class AllOf:
    """Every part matches; an empty one matches everything."""

    parts: tuple[Filter, ...]

    def matches(self, metadata: Mapping[str, Scalar]) -> bool:
        return all(part.matches(metadata) for part in self.parts)


@dataclass(frozen=True, slots=True)
class AnyOf:
    """At least one part matches."""

    parts: tuple[Filter, ...]

    def matches(self, metadata: Mapping[str, Scalar]) -> bool:
        return any(part.matches(metadata) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Not:
    """The part does not match."""

    part: Filter

    def matches(self, metadata: Mapping[str, Scalar]) -> bool:
        return not self.part.matches(metadata)


Filter = Condition | AllOf | AnyOf | Not

# --- Attention ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionScope:
    """A session a query may see; `until` hides tokens at or after that offset."""

    id: str
    until: int | None = None
    at_least: int = 0  # SessionExpired if the layer holds fewer tokens: the process missed an append.


@dataclass(frozen=True, slots=True)
class Scope:
    """Which tokens of a memory a query may see: documents (by id, by filter, or all) and sessions."""

    documents: tuple[str, ...] | None = None  # None: all documents; (): none.
    where: Filter | None = None  # Narrows `documents`.
    sessions: tuple[SessionScope, ...] = ()

    @staticmethod
    def session(*ids: str) -> Scope:
        """Only these sessions, no documents."""
        return Scope(documents=(), sessions=tuple(SessionScope(one) for one in ids))


class Engine(StrEnum):
    """Who picks the keys of the top k. `AUTO` lets the service choose by size and scope."""

    AUTO = "auto"
    EXACT = "exact"
    INDEX = "index"


@dataclass(frozen=True, slots=True)
class AttendOptions:
    """How to attend; the same for all groups of a call."""

    top_k: int = 0  # 0: dense, softmax over every key in scope; else over the k highest-scoring keys.
    engine: Engine = Engine.AUTO  # Dense is always exact.
    scale: float | None = None  # score = q·k·scale; None: head_dim ** -0.5.
    logit_gap: float | None = None  # With top_k: drop keys whose score is more than this below the best one.
    search: Mapping[str, float] = field(default_factory=dict)  # Of the index: nprobe, efSearch, candidates.
    tokens: bool = False  # Also return the top tokens with their weights (needs top_k).
    attribution: bool = False  # Also return the softmax mass per document and session.
    measure: bool = False  # Also run exact and report the index's recall and captured mass.
    output_dtype: DType = DType.F32

    def check(self) -> None:
        """Raise InvalidArgument unless every field is within its limits."""
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise InvalidArgument(f"top_k must be 0 (dense) to {MAX_TOP_K}, got {self.top_k}")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise InvalidArgument(f"scale must be finite and > 0, got {self.scale}")
        if self.logit_gap is not None and not (self.logit_gap >= 0 and self.top_k):
            raise InvalidArgument("logit_gap must be ≥ 0 and needs top_k ≥ 1")
        if self.tokens and not self.top_k:
            raise InvalidArgument("tokens needs top_k ≥ 1: dense attention has no top tokens")
        if self.engine is Engine.INDEX and not self.top_k:
            raise InvalidArgument("engine INDEX needs top_k ≥ 1: dense attention reads every key")


@dataclass(frozen=True, slots=True, eq=False)
class AttendGroup:
    """Queries that share a scope, rotated to their place by the caller.

    `counts` and `lse` are for who joins the answers of several memories: how many of the top k the others leave to this
    one, and the denominator of the whole, against which attribution is then measured instead of against this part's.
    """

    scope: Scope
    queries: Tensor  # [G, Q, D] float32 (bf16/f16 are converted)
    counts: Tensor | None = None  # [G, Q] int32, 0 to top_k: only so many of the best take part.
    lse: Tensor | None = None  # [G, Q] float32: no output, only attribution, and its masses are not scaled to 1.

    __repr__ = _brief


class Partial(NamedTuple):
    """Attention over some of the keys a query may see."""

    output: Tensor  # [G, Q, D] float32, normalised over these keys alone; 0 if no key was visible
    lse: Tensor  # [G, Q] float32, log of the softmax denominator; -inf if no key was visible


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the scope was looked at."""

    searched: int
    in_scope: int
    missing: tuple[str, ...] = ()  # Shards of a cluster that could not be asked.

    @property
    def fraction(self) -> float:
        return self.searched / self.in_scope if self.in_scope else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class TopTokens:
    """The tokens that took part, best first; padding has source -1, offset -1 and weight 0."""

    sources: tuple[str, ...]  # Document ids, or session ids written "session:<id>".
    source: Tensor  # [G, Q, K] int32, index into `sources`
    offset: Tensor  # [G, Q, K] int64, token offset in its document or session
    score: Tensor  # [G, Q, K] float32, scaled logit; -inf for padding
    weight: Tensor  # [G, Q, K] float32, softmax weight over the keys that took part

    __repr__ = _brief


@dataclass(frozen=True, slots=True)
class Attribution:
    """Softmax mass of one document or session, mean over query heads and queries; all masses sum to 1."""

    source: str
    mass: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What approximation cost in this call, against the exact top k; means over query heads and queries."""

    recall: float
    captured_mass: float  # Softmax mass of the retrieved keys over the mass of the exact top k.


@dataclass(frozen=True, slots=True, eq=False)
class Attended:
    """The answer to one group."""

    output: Tensor  # [G, Q, D]
    lse: Tensor  # [G, Q] float32
    coverage: Coverage
    engine: str  # "dense", "exact", or "index:<factory>" with "+exact" for the scanned tail.
    tokens: TopTokens | None = None
    attribution: tuple[Attribution, ...] | None = None
    measured: Measured | None = None

    __repr__ = _brief

    @property
    def partial(self) -> Partial:
        return Partial(self.output, self.lse)


@dataclass(frozen=True, slots=True, eq=False)
class Fetched:
    """Raw keys and values of consecutive tokens of a document or session, one layer."""

    keys: Tensor  # [H, T, D] in the memory's dtype
    values: Tensor  # [H, T, D]
    token_ids: Tensor  # [T] int64
    first_token: int

    __repr__ = _brief


# --- Sessions, operations, pages ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """The private, ephemeral memory of one prompt or conversation."""

    id: str
    memory: str
    lease_s: float
    expires_at: float
    tokens: tuple[int, ...]  # Per memory layer, in the spec's order.


@dataclass(frozen=True, slots=True, eq=False)
class SessionAppend:
    """Tokens for a session. `first_token` must be the layers' present length; repeating an append is harmless."""

    session: str
    layers: tuple[int, ...]
    first_token: int
    keys: Tensor  # [len(layers), H, T, D]
    values: Tensor  # [len(layers), H, T, D]
    token_ids: Tensor | None = None  # [T]

    __repr__ = _brief


class OperationKind(StrEnum):
    INDEX = "index"
    COMPACT = "compact"
    VERIFY = "verify"
    SNAPSHOT = "snapshot"
    RESTORE = "restore"


class OperationState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Operation:
    """Long-running work on a memory."""

    id: str
    memory: str
    kind: OperationKind
    state: OperationState
    done: int  # Units of work finished (tokens or bytes) of `total`.
    total: int
    message: str  # A sentence on the outcome or the error.
    created_at: float
    updated_at: float
    snapshot: str = ""  # Of SNAPSHOT and RESTORE: the snapshot's id.


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A memory as it was at one moment, in files of its own."""

    id: str
    memory: str  # The memory's name then; empty if `problem` keeps it from being known.
    created_at: float  # Seconds since the epoch.
    documents: int = 0
    tokens: int = 0
    bytes: int = 0  # Of its files; those it shares with the memory or with other snapshots are counted too.
    shard: str = ""  # Of a cluster's memory: the shard it was taken of; empty where all its shards are told together.
    shards: tuple[str, ...] = ()  # The shards of the map then, by id; none if the process belonged to no cluster.
    missing: tuple[str, ...] = ()  # Of `shards`, those whose part of the snapshot was not found.
    problem: str = ""  # Why it cannot be restored, as far as its description tells.


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of one memory (or, with an empty name, of all the caller's memories)."""

    memory: str
    documents: int
    tokens: int
    bytes: int
    segments: int
    dead_bytes: int  # Of deleted documents, until compaction.
    resident_bytes: int
    resident_tokens: int
    indexed_tokens: int
    index_bytes: int
    sessions: int
    session_bytes: int


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a listing; an empty `next` means the end."""

    items: tuple[T, ...]
    next: str = ""


class Role(StrEnum):
    READ = "read"  # Look, attend, search, fetch; hold sessions.
    WRITE = "write"  # And store and delete documents.
    ADMIN = "admin"  # And create and delete memories; start operations.

    @property
    def rank(self) -> int:
        return ("read", "write", "admin").index(self.value)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls: from the credential only, never from the request."""

    tenant: str
    role: Role


class Cancel:
    """Asks long work to stop: by deadline, by the caller's leaving, or both. Checked between blocks."""

    def __init__(self, timeout_s: float | None = None):
        self.deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded if the work is no longer wanted."""
        if self._event.is_set():
            raise Cancelled("the caller cancelled")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineExceeded("the deadline passed before the work was done; give more time or a smaller scope")


def check_name(name: str, what: str) -> None:
    """Raise InvalidArgument unless `name` is 1-63 letters, digits, '.', '_' or '-' and starts with one of the first."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"{what} must be 1-63 letters, digits, '.', '_' or '-', starting with a letter or digit")


def check_snapshot_id(snapshot: str) -> None:
    """Raise InvalidArgument unless it can be a snapshot's id."""
    check_name(snapshot, "a snapshot's id")


def fresh_snapshot_id() -> str:
    """A fresh id of a snapshot; ids sort by the time they were made."""
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(4)


def check_document_id(document: str) -> None:
    """Raise InvalidArgument unless `document` is 1-512 bytes of UTF-8 without control characters."""
    if not 1 <= len(document.encode("utf-8", "surrogatepass")) <= 512:
        raise InvalidArgument("a document id must be 1 to 512 bytes of UTF-8")
    if not document.isprintable():
        raise InvalidArgument("a document id must not contain control characters")
