"""Every error a caller can meet, in process or over gRPC.

FotError
├── InvalidArgument      the call contradicts itself or the memory's spec
├── NotFound             no such name for this caller (a foreign tenant's name is simply not found)
│   └── SessionExpired   the session's lease ran out, or the service restarted
├── AlreadyExists
├── FailedPrecondition   the call is well formed but the memory's state refuses it
│   ├── WrongModel       keys and values of another model
│   ├── Superseded       the memory knows a newer state of the document
│   └── StaleMap         the cluster's shard map has changed; clients of clusters fetch the new one by themselves
├── ResourceExhausted    try again later, or make the request smaller; `retry_after_s` says when
│   └── QuotaExceeded    a limit of the tenant; waiting does not help
├── Unauthenticated
├── PermissionDenied
├── DataLoss             a stored byte does not match its checksum; it was not served
├── Unavailable          the service cannot be reached, is draining, or is read-only after an I/O error
├── DeadlineExceeded
├── Cancelled
└── Internal             a defect; details are in the service's log only
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class FotError(Exception):
    """Base of all errors; `reason` is a stable UPPER_SNAKE word for programs, the message is for people."""

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, reason: str | None = None, retry_after_s: float | None = None, **metadata: str):
        super().__init__(message)
        self.message = message
        self.code = reason or self.reason
        self.retry_after_s = retry_after_s
        self.metadata: Mapping[str, str] = metadata


class InvalidArgument(FotError):
    """The call contradicts itself or the memory's spec; sending it again cannot help."""

    reason = "INVALID_ARGUMENT"


class NotFound(FotError):
    """No such thing for this caller."""

    reason = "NOT_FOUND"


class SessionExpired(NotFound):
    """The session's lease ran out or the service restarted; its keys and values are gone."""

    reason = "SESSION_EXPIRED"


class AlreadyExists(FotError):
    """The name is taken."""

    reason = "ALREADY_EXISTS"


class FailedPrecondition(FotError):
    """Well formed, but the memory's state refuses it."""

    reason = "FAILED_PRECONDITION"


class WrongModel(FailedPrecondition):
    """Keys and values of another model than the memory's."""

    reason = "WRONG_MODEL"


class Superseded(FailedPrecondition):
    """The memory knows a newer state of the document than the call carries; `metadata["generation"]` says which."""

    reason = "SUPERSEDED"


class StaleMap(FailedPrecondition):
    """The call was routed by an old shard map; `metadata["epoch"]` says which one holds."""

    reason = "STALE_MAP"


class ResourceExhausted(FotError):
    """The service is full for now (`retry_after_s`) or the request is larger than a limit."""

    reason = "RESOURCE_EXHAUSTED"


class QuotaExceeded(ResourceExhausted):
    """A limit of the tenant was reached; delete something or ask for more."""

    reason = "QUOTA_EXCEEDED"


class Unauthenticated(FotError):
    """No token, or an unknown or expired one."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(FotError):
    """The token's role does not allow this verb."""

    reason = "PERMISSION_DENIED"


class DataLoss(FotError):
    """A stored byte does not match its checksum; nothing of it was served."""

    reason = "DATA_LOSS"


class Unavailable(FotError):
    """The service cannot be reached, is draining, or went read-only after an I/O error."""

    reason = "UNAVAILABLE"


class DeadlineExceeded(FotError):
    """The time the caller gave ran out; work stopped."""

    reason = "DEADLINE_EXCEEDED"


class Cancelled(FotError):
    """The caller went away; work stopped."""

    reason = "CANCELLED"


class Internal(FotError):
    """A defect of the service; the log has the details."""

    reason = "INTERNAL"
