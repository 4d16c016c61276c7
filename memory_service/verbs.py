"""What can be asked of a memory service: one frozen dataclass a verb, typed by its answer.

The store runs them, the codec writes them as protobuf, the client sends them: the same objects everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from memory_service.shards import Member, Placement, ShardMap
from memory_service.types.answers import Attended, Fetched, TopTokens
from memory_service.types.callers import Role
from memory_service.types.conditions import Filter, Scalar
from memory_service.types.documents import Conflict, Deleted, Document, DocumentInfo
from memory_service.types.listings import Page
from memory_service.types.memories import MemoryInfo, Stats
from memory_service.types.operations import Operation, OperationKind
from memory_service.types.questions import AttendGroup, AttendOptions
from memory_service.types.sessions import SessionAppend, SessionInfo
from memory_service.types.snapshots import Snapshot
from memory_service.types.specs import Fingerprint, MemorySpec
from memory_service.types.uploads import Upload

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Verb(Generic[Answer]):
    """Base of all verbs. `role` is the least role that may use it; `repeatable` means a retry cannot do harm."""

    role: ClassVar[Role] = Role.READ
    repeatable: ClassVar[bool] = True


# --- Memories -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CreateMemory(Verb[MemoryInfo]):
    """Create a memory. The same name with an equal spec returns the existing one; another spec is ALREADY_EXISTS."""

    role = Role.ADMIN
    name: str
    spec: MemorySpec
    created_at: float = 0.0  # Of a memory that lives in several processes, which must agree on it; 0: now.


@dataclass(frozen=True, slots=True)
class GetMemory(Verb[MemoryInfo]):
    name: str
    placement: Placement | None = None  # Count only what this shard owns.


@dataclass(frozen=True, slots=True)
class ListMemories(Verb[Page[MemoryInfo]]):
    page_size: int = 100
    page_token: str = ""
    placement: Placement | None = None  # Count only what this shard owns.


@dataclass(frozen=True, slots=True)
class DeleteMemory(Verb[None]):
    """Delete a memory with its documents and sessions. NOT_FOUND if there is none."""

    role = Role.ADMIN
    repeatable = False
    name: str


# --- Documents ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class PutDocument(Verb[DocumentInfo]):
    """Store a document, durably, all at once. Over gRPC: begin, upload, commit. The same request id commits once.

    With a `generation` the document gets that one; Superseded if the memory knows a newer state of the document.
    """

    role = Role.WRITE
    memory: str
    document: Document
    fingerprint: Fingerprint
    conflict: Conflict = Conflict.FAIL
    request_id: str = ""
    generation: int = 0


@dataclass(frozen=True, slots=True)
class BeginUpload(Verb[Upload]):
    """Reserve room for a document. The same request id returns the same upload, or what it was committed as."""

    role = Role.WRITE
    memory: str
    document: str
    tokens: int
    fingerprint: Fingerprint
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    conflict: Conflict = Conflict.FAIL
    request_id: str = ""
    generation: int = 0  # As in PutDocument.


@dataclass(frozen=True, slots=True)
class GetUpload(Verb[Upload]):
    role = Role.WRITE
    memory: str
    upload: str


@dataclass(frozen=True, slots=True)
class CommitUpload(Verb[DocumentInfo]):
    """Make an upload durable, then visible. Committing twice returns the same document."""

    role = Role.WRITE
    memory: str
    upload: str


@dataclass(frozen=True, slots=True)
class AbortUpload(Verb[None]):
    role = Role.WRITE
    memory: str
    upload: str


@dataclass(frozen=True, slots=True)
class GetDocument(Verb[DocumentInfo]):
    memory: str
    document: str


@dataclass(frozen=True, slots=True)
class ListDocuments(Verb[Page[DocumentInfo]]):
    """Documents by id, ascending."""

    memory: str
    where: Filter | None = None
    page_size: int = 100
    page_token: str = ""


@dataclass(frozen=True, slots=True)
class DeleteDocument(Verb[None]):
    """Delete a document; durable on return. The same request id may be repeated; else NOT_FOUND if there is none.

    With a `generation` every state of the document up to that one is deleted, now and whenever it should come (even if
    the answer is NOT_FOUND); Superseded if the memory holds a newer one.
    """

    role = Role.WRITE
    memory: str
    document: str
    request_id: str = ""
    generation: int = 0


@dataclass(frozen=True, slots=True)
class ListDeleted(Verb[Page[Deleted]]):
    """Deletions the memory remembers, by document id, ascending."""

    role = Role.WRITE
    memory: str
    page_size: int = 100
    page_token: str = ""


# --- Sessions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenSession(Verb[SessionInfo]):
    """Open a session. A repeated call may leave one behind that nobody knows: its lease ends it."""

    memory: str
    fingerprint: Fingerprint
    lease_s: float = 600.0
    session: str = ""  # An unguessable id of the caller's own; the same one opens one session. Empty: a new one.


@dataclass(frozen=True, slots=True, eq=False)
class AppendSessions(Verb[tuple[SessionInfo, ...]]):
    """Append to several sessions of one memory in one call; visible at once, all or nothing for each session."""

    memory: str
    appends: tuple[SessionAppend, ...]


@dataclass(frozen=True, slots=True)
class RenewSession(Verb[SessionInfo]):
    """Start the lease anew. Every use of a session does so too."""

    memory: str
    session: str


@dataclass(frozen=True, slots=True)
class CloseSession(Verb[None]):
    """Forget a session and free its bytes. Closing twice is harmless."""

    memory: str
    session: str


# --- Attention ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Attend(Verb[tuple[Attended, ...]]):
    """Attention of several groups of queries over their scopes, one layer; one answer a group, in order."""

    memory: str
    layer: int
    groups: tuple[AttendGroup, ...]
    options: AttendOptions = field(default_factory=AttendOptions)
    placement: Placement | None = None  # See only documents this shard owns, of those a scope does not name.


@dataclass(frozen=True, slots=True, eq=False)
class Search(Verb[tuple[TopTokens, ...]]):
    """The highest-scoring tokens of each group, without their values. `options.top_k` must be ≥ 1."""

    memory: str
    layer: int
    groups: tuple[AttendGroup, ...]
    options: AttendOptions
    placement: Placement | None = None  # As in Attend.


@dataclass(frozen=True, slots=True)
class Fetch(Verb[Fetched]):
    """Raw keys and values of consecutive tokens of a document, or of a session written "session:<id>"."""

    memory: str
    source: str
    layer: int
    first_token: int = 0
    tokens: int = 1


# --- Administration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GetStats(Verb[Stats]):
    memory: str = ""  # Empty: all the caller's memories together.
    placement: Placement | None = None  # Count only documents this shard owns.


@dataclass(frozen=True, slots=True)
class StartOperation(Verb[Operation]):
    """Start work in the background. If the same kind already runs on the memory, that one is returned."""

    role = Role.ADMIN
    memory: str
    kind: OperationKind
    factory: str = ""  # Of INDEX: everything anew with this one; empty: what is not indexed yet, with the policy's.


@dataclass(frozen=True, slots=True)
class GetOperation(Verb[Operation]):
    operation: str


@dataclass(frozen=True, slots=True)
class ListOperations(Verb[Page[Operation]]):
    memory: str = ""
    page_size: int = 100
    page_token: str = ""


@dataclass(frozen=True, slots=True)
class CancelOperation(Verb[Operation]):
    role = Role.ADMIN
    operation: str


# --- Snapshots ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CreateSnapshot(Verb[Operation]):
    """Keep the memory as it is at this moment. The same id again returns the operation that makes or made it.

    AlreadyExists if the id names another snapshot. Without an id every call makes one, named by the time.
    With `hold_s` nothing is written to the memory from that moment on until `ReleaseHold`, or so long: without that in
    time the operation fails.
    """

    role = Role.ADMIN
    memory: str
    snapshot: str = ""
    hold_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ReleaseHold(Verb[Operation]):
    """Let the writers go that a snapshot's operation holds. FailedPrecondition if it was too late."""

    role = Role.ADMIN
    operation: str


@dataclass(frozen=True, slots=True)
class GetSnapshot(Verb[Snapshot]):
    snapshot: str


@dataclass(frozen=True, slots=True)
class ListSnapshots(Verb[Page[Snapshot]]):
    """Snapshots by id, ascending; of one memory (of the name it had), or of all."""

    memory: str = ""
    page_size: int = 100
    page_token: str = ""


@dataclass(frozen=True, slots=True)
class DeleteSnapshot(Verb[None]):
    """Delete a snapshot; durable on return. NotFound if there is none."""

    role = Role.ADMIN
    repeatable = False
    snapshot: str


@dataclass(frozen=True, slots=True)
class RestoreSnapshot(Verb[Operation]):
    """Make a new memory of a snapshot, once every byte was checked. AlreadyExists if the name is taken."""

    role = Role.ADMIN
    repeatable = False
    snapshot: str
    memory: str = ""  # The new memory's name; empty: the one it had.


# --- Clusters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GetShardMap(Verb[Member]):
    """What the process knows of the cluster it belongs to."""


@dataclass(frozen=True, slots=True)
class SetShardMap(Verb[Member]):
    """Tell a process the map and its place in it; durable on return, and then no write by an older map is under way.

    StaleMap unless the epoch is above the known one, or the map is the known one.
    """

    role = Role.ADMIN
    map: ShardMap
    shard: str  # Which shard this process is a replica of; empty: none any more.
    behind: bool | None = None  # Whether it may lack writes; None: as it was.
    whole: int = 0  # With `behind` false: it has all writes stamped before. It stays behind if it missed a later one.


@dataclass(frozen=True, slots=True)
class MarkBehind(Verb[None]):
    """Tell a process that it missed a write: it answers no reads by shard map until it is healed."""

    role = Role.WRITE
    missed: int  # The write's generation; nothing happens if it was healed since.
