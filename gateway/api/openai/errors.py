"""Errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}` with the right status and
Retry-After."""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from stagemesh import errors

TYPES = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "cancelled",
    503: "service_unavailable_error",
    504: "timeout_error",
}
"""`error.type` by status; server_error for other statuses."""
CODES: dict[type[errors.StagemeshError], str] = {
    errors.Unauthenticated: "invalid_api_key",
    errors.QueueFull: "rate_limit_exceeded",
}
"""`error.code` if OpenAI has a code of its own; otherwise it is the error's reason in lower case."""


class BodyTooLarge(errors.InvalidRequest):
    """The body exceeds --max-body-mib: 413."""

    reason = "BODY_TOO_LARGE"


class BodyTooSlow(errors.InvalidRequest):
    """The body did not arrive in time: 408."""

    reason = "BODY_TIMEOUT"


def status_of(error: errors.StagemeshError) -> int:
    """The HTTP status of `error`."""
    return (
        413 if isinstance(error, BodyTooLarge) else 408 if isinstance(error, BodyTooSlow) else errors.http_status(error)
    )


def shape(message: str, status: int, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {
        "error": {"message": message, "type": TYPES.get(status, "server_error"), "param": param, "code": code},
    }


def body_of(error: errors.StagemeshError) -> dict[str, Any]:
    """`error` as OpenAI's error object."""
    code = CODES.get(type(error), error.reason.lower())
    if isinstance(error, errors.NotFound) and error.param == "model":
        code = "model_not_found"
    return shape(error.message, status_of(error), error.param, code)


def response_of(error: errors.StagemeshError) -> Response:
    """The HTTP response for `error`."""
    status = status_of(error)
    headers: dict[str, str] = {}
    if error.retry_after_s is not None or status in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1.0)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status in (408, 413):
        # The rest of the body is not read, so the connection cannot be used again.
        headers["connection"] = "close"
    return json_response(body_of(error), status, headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A compact JSON response in UTF-8."""
    return Response(dumps(value).encode(), status, headers, media_type="application/json")


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dumps(value: Any) -> str:
    """`value` as compact JSON. Raises ValueError for NaN, which is not JSON."""
    # json.dumps with options makes an encoder at each call, which costs more than encoding a small value.
    return _ENCODER.encode(value)


def from_validation(error: ValidationError) -> errors.InvalidRequest:
    """The first of pydantic's errors, in words for the client."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return errors.InvalidRequest(f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    name = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        return errors.InvalidRequest(f"'{name}' is required", param=name)
    if not name:
        return errors.InvalidRequest(f"the body must be a JSON object: {first['msg']}")
    given = first.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool) and len(repr(given)) <= 60 else ""
    return errors.InvalidRequest(f"'{name}': {first['msg'][:1].lower()}{first['msg'][1:]}{shown}", param=name)
