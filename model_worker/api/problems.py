"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}, with the status its clients act upon."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi.responses import JSONResponse

from memory_service.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FotError,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    QuotaExceeded,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from memory_service.process.logs import event

_INVALID = "invalid_request_error"
_SERVER = "server_error"
# Of errors that are one another's kinds, the finer comes first. OpenAI's clients try 408, 409, 429 and 5xx again, so
# that what cannot get better is none of these.
_STATUS: tuple[tuple[type[FotError], int, str, str | None], ...] = (
    (Unauthenticated, 401, _INVALID, "invalid_api_key"),
    (PermissionDenied, 403, _INVALID, "insufficient_permissions"),
    (NotFound, 404, _INVALID, None),
    (InvalidArgument, 400, _INVALID, None),
    (AlreadyExists, 400, _INVALID, None),
    (FailedPrecondition, 400, _INVALID, None),
    (QuotaExceeded, 429, "insufficient_quota", "insufficient_quota"),
    (ResourceExhausted, 429, "rate_limit_error", "rate_limit_exceeded"),
    (Cancelled, 499, _INVALID, None),
    (DeadlineExceeded, 504, _SERVER, None),
    (Unavailable, 503, _SERVER, None),
)
_TOO_LARGE = 413


def problem(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and body that tell of an error. What is not ours is logged, and told as internal."""
    if not isinstance(error, FotError):
        event(logging.ERROR, "a request failed", error)
        error = Internal("internal error; the worker's log says more")
    found = (told for told in _STATUS if isinstance(error, told[0]))
    _, status, type_, code = next(found, (FotError, 500, _SERVER, None))
    if type(error) is ResourceExhausted and error.retry_after_s is None:
        status, type_, code = _TOO_LARGE, _INVALID, "request_too_large"
    told = {
        "message": error.message,
        "type": type_,
        "param": error.metadata.get("field"),
        "code": code or error.code.lower(),
    }
    return status, {"error": told}


def problem_response(error: Exception) -> JSONResponse:
    """An error as an answer; it says when to try again if that is known."""
    status, body = problem(error)
    retry_after_s = error.retry_after_s if isinstance(error, FotError) else None
    headers = {} if retry_after_s is None else {"retry-after": str(math.ceil(retry_after_s))}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body, status, headers)
