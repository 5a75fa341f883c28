"""Errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}` with the right status and
Retry-After."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import JSONResponse

from stagemesh import errors

TYPES = {
    429: "rate_limit_error",
    499: "cancelled",
    503: "service_unavailable_error",
    504: "timeout_error",
}
"""Status -> `error.type`. Other statuses have invalid_request_error below 500, and server_error from 500 on."""
CODES: dict[type[errors.StagemeshError], str] = {
    errors.Unauthenticated: "invalid_api_key",
    errors.QueueFull: "rate_limit_exceeded",
}
"""`error.code` if OpenAI has a code of its own; otherwise it is the error's reason in lower case."""


class BodyTooLarge(errors.InvalidRequest, reason="BODY_TOO_LARGE", http_status=413):
    """The body exceeds --max-body-mib."""


class BodyTooSlow(errors.InvalidRequest, reason="BODY_TIMEOUT", http_status=408):
    """The body did not arrive in time."""


def shape(message: str, status: int, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: errors.StagemeshError) -> dict[str, Any]:
    """`error` as OpenAI's error object."""
    code = CODES.get(type(error), error.reason.lower())
    if isinstance(error, errors.NotFound) and error.param == "model":
        code = "model_not_found"
    return shape(error.message, error.http_status, error.param, code)


def response_of(error: errors.StagemeshError) -> JSONResponse:
    """The HTTP response for `error`."""
    status = error.http_status
    headers: dict[str, str] = {}
    if error.retry_after_s is not None or status in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1.0)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status in (408, 413):
        # The rest of the body is not read, so the connection cannot be used again.
        headers["connection"] = "close"
    return JSONResponse(body_of(error), status, headers)


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dumps(value: Any) -> str:
    """`value` as compact JSON. Raises ValueError for NaN, which is not JSON."""
    # json.dumps with options makes an encoder at each call, which costs more than encoding a small value.
    return _ENCODER.encode(value)
