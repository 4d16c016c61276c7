"""Tensors as they cross the wire, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memory_service.errors import InvalidArgument
from memory_service.v1 import memory_pb2 as pb

MAX_DIMENSIONS = 8
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
