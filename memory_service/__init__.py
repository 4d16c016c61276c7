"""A durable memory of attention keys and values that answers attention, in process or over gRPC.

with Memory.open(":memory:", spec=spec) as memory:
    memory.put("doc-1", keys, values, token_ids=token_ids, metadata={"lang": "py"})
    answer = memory.attend(layer, queries, top_k=32, where="lang = py")
    whole = merge([answer.partial, partial_of_the_window])
"""

from typing import TYPE_CHECKING

from memory_service.lazy import finder

if TYPE_CHECKING:
    from memory_service.attention.exact import merge
    from memory_service.client import (
        ALL_DOCUMENTS,
        AsyncClient,
        AsyncMemory,
        AsyncSession,
        Client,
        Memory,
        ScopeLike,
        Session,
        Tls,
        scope_of,
    )
    from memory_service.errors import (
        AlreadyExists,
        Cancelled,
        DataLoss,
        DeadlineExceeded,
        FailedPrecondition,
        FotError,
        Internal,
        InvalidArgument,
        NotFound,
        PermissionDenied,
        QuotaExceeded,
        ResourceExhausted,
        SessionExpired,
        Unauthenticated,
        Unavailable,
        WrongModel,
    )
    from memory_service.filters import Where
    from memory_service.settings import StoreOptions
    from memory_service.types.answers import Attended, Attribution, Coverage, Fetched, Measured, Partial, TopTokens
    from memory_service.types.conditions import AllOf, AnyOf, Compare, Condition, Not
    from memory_service.types.documents import DocumentInfo
    from memory_service.types.memories import MemoryInfo, Stats
    from memory_service.types.operations import Operation, OperationKind, OperationState
    from memory_service.types.questions import AttendGroup, AttendOptions, Engine
    from memory_service.types.scopes import Scope, SessionScope
    from memory_service.types.snapshots import Snapshot
    from memory_service.types.specs import DType, Fingerprint, IndexPolicy, MemorySpec

__all__ = [
    "ALL_DOCUMENTS",
    "AllOf",
    "AlreadyExists",
    "AnyOf",
    "AsyncClient",
    "AsyncMemory",
    "AsyncSession",
    "AttendGroup",
    "AttendOptions",
    "Attended",
    "Attribution",
    "Cancelled",
    "Client",
    "Compare",
    "Condition",
    "Coverage",
    "DType",
    "DataLoss",
    "DeadlineExceeded",
    "DocumentInfo",
    "Engine",
    "FailedPrecondition",
    "Fetched",
    "Fingerprint",
    "FotError",
    "IndexPolicy",
    "Internal",
    "InvalidArgument",
    "Measured",
    "Memory",
    "MemoryInfo",
    "MemorySpec",
    "Not",
    "NotFound",
    "Operation",
    "OperationKind",
    "OperationState",
    "Partial",
    "PermissionDenied",
    "QuotaExceeded",
    "ResourceExhausted",
    "Scope",
    "ScopeLike",
    "Session",
    "SessionExpired",
    "SessionScope",
    "Snapshot",
    "Stats",
    "StoreOptions",
    "Tls",
    "TopTokens",
    "Unauthenticated",
    "Unavailable",
    "Where",
    "WrongModel",
    "merge",
    "scope_of",
]

if not TYPE_CHECKING:
    _TYPES = (
        "conditions",
        "documents",
        "memories",
        "operations",
        "questions",
        "answers",
        "scopes",
        "snapshots",
        "specs",
    )
    _HOMES = ("errors", *(f"types.{one}" for one in _TYPES), "filters", "settings", "client", "attention.exact")
    __getattr__ = finder(__name__, __all__, [f"{__name__}.{home}" for home in _HOMES])
