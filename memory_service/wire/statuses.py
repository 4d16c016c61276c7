"""Errors as gRPC statuses with details, and back; the client reads the same table the server writes by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

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
    StaleMap,
    Superseded,
    Unauthenticated,
    Unavailable,
    WrongModel,
)

DOMAIN = "fot.memory"
_DETAILS = "grpc-status-details-bin"
# Trailers share one 8 KiB block, and a message travels in it twice.
_MESSAGE_CHARACTERS = 1000
_METADATA_CHARACTERS = 200

# The only place an error meets gRPC. Of the errors that share a code the most general comes first.
STATUS: dict[type[FotError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    SessionExpired: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    WrongModel: grpc.StatusCode.FAILED_PRECONDITION,
    Superseded: grpc.StatusCode.FAILED_PRECONDITION,
    StaleMap: grpc.StatusCode.FAILED_PRECONDITION,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    DataLoss: grpc.StatusCode.DATA_LOSS,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    Internal: grpc.StatusCode.INTERNAL,
}
_BY_KIND = {kind.reason: kind for kind in STATUS}
_BY_CODE = {code: kind for kind, code in reversed(STATUS.items())}
_KIND = "kind"  # ErrorInfo metadata: the class, where the reason is a finer one.
_FIELD = "field"  # Error metadata: the field of the request that is wrong.


class WireStatus(NamedTuple):
    """How an error ends a call."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, bytes], ...]


def write_error(error: FotError) -> WireStatus:
    """An error as a status with google.rpc details."""
    kind = next(kind for kind in (*type(error).__mro__, Internal) if kind in STATUS)
    code, message = STATUS[kind], error.message[:_MESSAGE_CHARACTERS]
    metadata = {key: value[:_METADATA_CHARACTERS] for key, value in list(error.metadata.items())[:8]}
    field = metadata.pop(_FIELD, None)
    if error.code != kind.reason:
        metadata[_KIND] = kind.reason
    status = Status(code=code.value[0], message=message)
    status.details.add().Pack(ErrorInfo(reason=error.code, domain=DOMAIN, metadata=metadata))
    if error.retry_after_s is not None:
        status.details.add().Pack(RetryInfo(retry_delay=_duration(error.retry_after_s)))
    if isinstance(error, QuotaExceeded):
        violation = QuotaFailure.Violation(subject="tenant", description=message)
        status.details.add().Pack(QuotaFailure(violations=[violation]))
    if field is not None:
        wrong = BadRequest.FieldViolation(field=field, description=message)
        status.details.add().Pack(BadRequest(field_violations=[wrong]))
    return WireStatus(code, message, ((_DETAILS, status.SerializeToString()),))


def read_error(error: grpc.RpcError) -> FotError:
    """The error that ended a call, as the store raised it; without our details, the nearest by code."""
    call = cast(Any, error)  # Every RpcError that ends a call is the call as well, which its type does not say.
    code: grpc.StatusCode = call.code()
    message: str = call.details() or ""
    trailers: Iterable[tuple[str, str | bytes]] = call.trailing_metadata() or ()
    for key, value in trailers:
        if key == _DETAILS and isinstance(value, bytes) and (found := _read_details(value)) is not None:
            return found
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"the service cannot be reached: {message}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return FailedPrecondition(f"the service is older than this client: {message}", reason="UNIMPLEMENTED")
    return _BY_CODE.get(code, Internal)(message or code.name.replace("_", " ").lower())


def _read_details(value: bytes) -> FotError | None:
    try:
        status = Status.FromString(value)
    except DecodeError:
        return None
    info, retry, bad = ErrorInfo(), RetryInfo(), BadRequest()
    found = retry_found = False
    for detail in status.details:
        found = detail.Unpack(info) or found
        retry_found = detail.Unpack(retry) or retry_found
        detail.Unpack(bad)
    if not found or info.domain != DOMAIN:
        return None
    metadata = dict(info.metadata)
    by_code = next((kind for code, kind in _BY_CODE.items() if code.value[0] == status.code), Internal)
    kind = _BY_KIND.get(metadata.pop(_KIND, info.reason), by_code)
    if bad.field_violations:
        metadata[_FIELD] = bad.field_violations[0].field
    error = kind(status.message, reason=info.reason)
    error.metadata = metadata
    error.retry_after_s = retry.retry_delay.ToNanoseconds() / 10**9 if retry_found else None
    return error


def _duration(seconds: float) -> Duration:
    whole = math.floor(seconds)
    return Duration(seconds=whole, nanos=min(round((seconds - whole) * 1e9), 999_999_999))
