"""Tensors and errors cross the wire whole; what is not a tensor is refused before it costs anything."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
import torch

from memory_service import errors
from memory_service.errors import FotError, InvalidArgument
from memory_service.storage.vfs import StorageFailed
from memory_service.v1 import memory_pb2 as pb
from memory_service.wire.statuses import DOMAIN, STATUS, WireStatus, read_error, write_error
from memory_service.wire.tensors import INTEGERS, read_tensor, write_tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64)
TERABYTE = 1 << 40


class Ended(grpc.RpcError):
    """A call that ended with a status, as a client meets it."""

    def __init__(self, code: grpc.StatusCode, details: str | None, trailers: tuple[tuple[str, Any], ...] = ()):
        self._status = (code, details, trailers)

    def code(self) -> grpc.StatusCode:
        return self._status[0]

    def details(self) -> str | None:
        return self._status[1]

    def trailing_metadata(self) -> tuple[tuple[str, Any], ...]:
        return self._status[2]


def returned(error: FotError) -> FotError:
    """The error as the client sees it."""
    status = write_error(error)
    return read_error(Ended(status.code, status.message, (("content-type", "x"), *status.trailers)))


# --- Tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_survives_bit_by_bit(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5, 2).mul(1000).to(dtype)
    for one in (tensor, tensor.transpose(0, 2), tensor[:, ::2], tensor[:0]):
        found = read_tensor(write_tensor(one), "x", "[A, B, C]", DTYPES)
        assert found.dtype == dtype
        assert torch.equal(found, one)


def test_special_values_survive() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    found = read_tensor(write_tensor(tensor), "x", "[A]")
    assert torch.equal(found.view(torch.int32), tensor.view(torch.int32))


def test_a_tensor_that_needs_grad_is_sent_as_its_values() -> None:
    assert read_tensor(write_tensor(torch.ones(2, requires_grad=True)), "x", "[A]").tolist() == [1, 1]


def test_a_tensor_read_is_its_own_and_may_be_written_to() -> None:
    message = write_tensor(torch.zeros(4))
    read_tensor(message, "x", "[A]").fill_(7)
    assert read_tensor(message, "x", "[A]").tolist() == [0, 0, 0, 0]


def test_a_dtype_the_wire_does_not_carry_is_an_invalid_argument() -> None:
    with pytest.raises(InvalidArgument, match="float64"):
        write_tensor(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (pb.Tensor(), "dtype"),
        (pb.Tensor(dtype=pb.DATA_TYPE_I32, shape=[1, 1], raw=bytes(4)), "got DATA_TYPE_I32"),
        (pb.Tensor(dtype=99, shape=[1, 1], raw=bytes(4)), "99"),  # type: ignore[arg-type]
        (pb.Tensor(dtype=pb.DATA_TYPE_F32, shape=[1], raw=bytes(4)), r"\[Q, D\]"),
        (pb.Tensor(dtype=pb.DATA_TYPE_F32, shape=[1] * 100, raw=bytes(4)), r"\[Q, D\]"),
        (pb.Tensor(dtype=pb.DATA_TYPE_F32, shape=[-1, -1], raw=bytes(4)), "shape"),
        (pb.Tensor(dtype=pb.DATA_TYPE_F32, shape=[1, 2], raw=bytes(4)), "takes 8 bytes"),
        (pb.Tensor(dtype=pb.DATA_TYPE_F32, shape=[1, 2], raw=bytes(9)), "raw has 9"),
        (pb.Tensor(dtype=pb.DATA_TYPE_F32, shape=[TERABYTE, TERABYTE], raw=bytes(4)), "takes"),
        (pb.Tensor(dtype=pb.DATA_TYPE_F32, shape=[2**62, 4], raw=b""), "takes"),
        (pb.Tensor(dtype=pb.DATA_TYPE_F32, shape=[2**63 - 1, 2**63 - 1], raw=bytes(4)), "takes"),
    ],
)
def test_what_contradicts_itself_is_an_invalid_argument_that_names_the_field(message: pb.Tensor, told: str) -> None:
    with pytest.raises(InvalidArgument, match=told) as raised:
        read_tensor(message, "queries", "[Q, D]")
    assert raised.value.metadata == {"field": "queries"}


def test_an_empty_tensor_with_a_vast_size_allocates_nothing() -> None:
    message = pb.Tensor(dtype=pb.DATA_TYPE_I64, shape=[0, TERABYTE], raw=b"")
    assert read_tensor(message, "x", "[A, B]", INTEGERS).numel() == 0


# --- Errors ---------------------------------------------------------------------------------------------------------


def test_every_error_has_a_status() -> None:
    every = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FotError)}
    assert set(STATUS) == every - {FotError}


@pytest.mark.parametrize("kind", STATUS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("reason", [None, "FINER"])
def test_an_error_survives_the_wire(kind: type[FotError], reason: str | None) -> None:
    error = kind("Ünïcode: say what to do", reason=reason, retry_after_s=1.25, field="groups[0].queries", memory="m")
    found = returned(error)
    assert type(found) is kind
    assert (found.message, found.code, found.retry_after_s) == (error.message, error.code, 1.25)
    assert found.metadata == {"field": "groups[0].queries", "memory": "m"}


def test_an_error_without_a_hint_comes_back_without_one() -> None:
    assert returned(errors.ResourceExhausted("full")).retry_after_s is None


def test_an_error_of_a_lower_floor_travels_as_its_nearest_kind() -> None:
    found = returned(StorageFailed("the disk failed"))
    assert type(found) is errors.Unavailable
    assert found.code == StorageFailed("").code


def test_a_long_error_fits_the_trailers() -> None:
    error = InvalidArgument("é" * 100_000, **{f"key{n}": "v" * 100_000 for n in range(100)})
    status = write_error(error)
    assert len(status.message) == 1000
    assert sum(len(key) + len(value) for key, value in status.trailers) < 6000


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ResourceExhausted),
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.FailedPrecondition),
        (grpc.StatusCode.UNIMPLEMENTED, errors.FailedPrecondition),
        (grpc.StatusCode.UNKNOWN, errors.Internal),
        (grpc.StatusCode.ABORTED, errors.Internal),
    ],
)
@pytest.mark.parametrize("details", ["told by a proxy", "", None])
def test_a_status_of_somebody_else_is_read_by_its_code(
    code: grpc.StatusCode, kind: type[FotError], details: str | None
) -> None:
    found = read_error(Ended(code, details))
    assert type(found) is kind
    assert (details or "") in found.message
    assert found.message


def test_details_that_are_damaged_or_of_another_domain_are_not_believed() -> None:
    def ended(value: bytes) -> FotError:
        return read_error(Ended(grpc.StatusCode.NOT_FOUND, "gone", (("grpc-status-details-bin", value),)))

    status: WireStatus = write_error(errors.QuotaExceeded("full"))
    foreign = status.trailers[0][1].replace(DOMAIN.encode(), b"fot.elsewh")
    for value in (b"\xff\xff", b"", foreign):
        assert type(ended(value)) is errors.NotFound
