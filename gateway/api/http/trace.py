"""POST /trace?steps=N&timeout=SECONDS: records of the next steps, for `stagemesh bench trace`."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse

from stagemesh import errors
from stagemesh.gateway.telemetry.trace import Recorder

from .body import while_connected

DEFAULT_STEPS = 200
DEFAULT_TIMEOUT_S = 60.0


def trace(recorder: Recorder) -> Callable[[Request], Awaitable[JSONResponse]]:
    """The endpoint. The trace ends when the client goes away."""

    async def take(request: Request) -> JSONResponse:
        query = request.query_params
        if unknown := set(query) - {"steps", "timeout"}:
            raise errors.InvalidRequest(f"unknown parameter {min(unknown)!r}; known: steps, timeout")
        steps = _number(query.get("steps", str(DEFAULT_STEPS)), "steps")
        wait_s = _number(query.get("timeout", str(DEFAULT_TIMEOUT_S)), "timeout")
        if steps != int(steps):
            raise errors.InvalidRequest(f"steps is {steps:g}; it must be a whole number", param="steps")
        records = await while_connected(request.receive, recorder.capture(int(steps), wait_s))
        # Encoding thousands of records takes a while, and plans must not wait for it.
        return await asyncio.to_thread(JSONResponse, records)

    return take


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise errors.InvalidRequest(f"{name} is {text[:40]!r}; it must be a number", param=name)
    return value
