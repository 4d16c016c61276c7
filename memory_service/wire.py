"""Tensors and errors as they cross the wire, and back; the client reads the same tables the server writes by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import grpc
import numpy as np
import torch
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status
from torch import Tensor

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
from memory_service.v1 import memory_pb2 as pb

DOMAIN = "fot.memory"
MAX_DIMENSIONS = 8
_DETAILS = "grpc-status-details-bin"
# Trailers share one 8 KiB block, and a message travels in it twice.
_MESSAGE_CHARACTERS = 1000
_METADATA_CHARACTERS = 200


def parse(kind: type[Message], raw: bytes) -> Any:
    """A message from its bytes. Raises InvalidArgument if they are none of this kind."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidArgument(f"these bytes are no {kind.DESCRIPTOR.name}") from error


# --- Tensors --------------------------------------------------------------------------------------------------------

_TORCH = {
    pb.DATA_TYPE_BF16: torch.bfloat16,
    pb.DATA_TYPE_F16: torch.float16,
    pb.DATA_TYPE_F32: torch.float32,
    pb.DATA_TYPE_I32: torch.int32,
    pb.DATA_TYPE_I64: torch.int64,
}
_PB = {dtype: number for number, dtype in _TORCH.items()}
_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.bfloat16: np.dtype("<i2"),
    torch.float16: np.dtype("<f2"),
    torch.float32: np.dtype("<f4"),
    torch.int32: np.dtype("<i4"),
    torch.int64: np.dtype("<i8"),
    torch.uint8: np.dtype("u1"),
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = (torch.int32, torch.int64)


def write_tensor(tensor: Tensor, message: pb.Tensor | None = None) -> pb.Tensor:
    """A tensor as a message, or written into a part of one, which spares copying it there.

    Raises InvalidArgument for a dtype the wire does not carry.
    """
    if tensor.dtype not in _PB:
        raise InvalidArgument(f"a tensor must be bf16, f16, f32, i32 or i64, got {tensor.dtype}")
    message = pb.Tensor() if message is None else message
    message.dtype = _PB[tensor.dtype]
    message.shape.extend(tensor.shape)
    message.raw = tensor_bytes(tensor)
    return message


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's values, row-major and little-endian."""
    # numpy has no bfloat16.
    plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return plain.numpy(force=True).tobytes()


def read_tensor(message: pb.Tensor, field: str, dimensions: str, dtypes: Iterable[torch.dtype] = FLOATS) -> Tensor:
    """The tensor of a message, in memory of its own; `dimensions` names its sizes, as in "[G, Q, D]".

    Raises InvalidArgument naming `field`, before anything is allocated, unless dtype, shape and length agree. NaN and
    infinity are the store's to refuse: it also meets tensors that crossed no wire.
    """
    dtype = _TORCH.get(message.dtype)
    if dtype is None or dtype not in dtypes:
        names = ", ".join(map(_name, dtypes))
        raise InvalidArgument(f"{field} must have dtype {names}; got {_data_type_name(message.dtype)}", field=field)
    shape = tuple(message.shape)
    if len(shape) != dimensions.count(",") + 1 or min(shape) < 0:
        raise InvalidArgument(f"{field} must be {dimensions}; got shape {list(shape[:MAX_DIMENSIONS])}", field=field)
    raw = message.raw  # Every read of a bytes field copies it.
    expected = math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        raise InvalidArgument(
            f"{field} of shape {list(shape)} and {_name(dtype)} takes {expected} bytes; raw has {len(raw)}", field=field
        )
    return from_bytes(raw, dtype, shape)


def from_bytes(raw: bytes | bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of little-endian values; of a bytearray it shares the memory."""
    if not raw:
        return torch.empty(shape, dtype=dtype)
    # torch warns about memory it may not write to. By way of numpy is twice as fast as torch.frombuffer.
    writable = raw if isinstance(raw, bytearray) else bytearray(raw)
    tensor = torch.from_numpy(np.frombuffer(writable, _NUMPY[dtype]).reshape(shape))
    return tensor.view(dtype) if dtype is torch.bfloat16 else tensor


def _name(dtype: torch.dtype) -> str:
    return pb.DataType.Name(_PB[dtype]).removeprefix("DATA_TYPE_")


def _data_type_name(number: int) -> str:
    return pb.DataType.Name(number) if number in pb.DataType.values() else f"unknown number {number}"


# --- Errors ---------------------------------------------------------------------------------------------------------

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
