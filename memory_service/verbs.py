"""What can be asked of a memory service: one frozen dataclass a verb, typed by its answer.

The store runs them, the codec writes them as protobuf, the client sends them: the same objects everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from memory_service.types import (
    Attended,
    AttendGroup,
    AttendOptions,
    Conflict,
    Document,
    DocumentInfo,
    Fetched,
    Filter,
    Fingerprint,
    MemoryInfo,
    MemorySpec,
    Operation,
    OperationKind,
    Page,
    Role,
    Scalar,
    SessionAppend,
    SessionInfo,
    Stats,
    TopTokens,
    Upload,
)

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


@dataclass(frozen=True, slots=True)
class GetMemory(Verb[MemoryInfo]):
    name: str


@dataclass(frozen=True, slots=True)
class ListMemories(Verb[Page[MemoryInfo]]):
    page_size: int = 100
    page_token: str = ""


@dataclass(frozen=True, slots=True)
class DeleteMemory(Verb[None]):
    """Delete a memory with its documents and sessions. NOT_FOUND if there is none."""

    role = Role.ADMIN
    repeatable = False
    name: str


# --- Documents ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class PutDocument(Verb[DocumentInfo]):
    """Store a document, durably, all at once. Over gRPC: begin, upload, commit. The same request id commits once."""

    role = Role.WRITE
    memory: str
    document: Document
    fingerprint: Fingerprint
    conflict: Conflict = Conflict.FAIL
    request_id: str = ""


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
    """Delete a document; durable on return. The same request id may be repeated; else NOT_FOUND if there is none."""

    role = Role.WRITE
    memory: str
    document: str
    request_id: str = ""


# --- Sessions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenSession(Verb[SessionInfo]):
    """Open a session. A repeated call may leave one behind that nobody knows: its lease ends it."""

    memory: str
    fingerprint: Fingerprint
    lease_s: float = 600.0


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


@dataclass(frozen=True, slots=True, eq=False)
class Search(Verb[tuple[TopTokens, ...]]):
    """The highest-scoring tokens of each group, without their values. `options.top_k` must be ≥ 1."""

    memory: str
    layer: int
    groups: tuple[AttendGroup, ...]
    options: AttendOptions


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
