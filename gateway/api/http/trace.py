"""POST /trace: records of the next steps, for `stagemesh bench trace`."""

from __future__ import annotations

import asyncio
import math

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from stagemesh import errors
from stagemesh.gateway.telemetry.trace import Recorder

from ..openai.errors import json_response, response_of
from .body import ClientGone, while_connected

DEFAULT_STEPS = 200
DEFAULT_TIMEOUT_S = 60.0


class TraceEndpoint:
    """The ASGI application of `?steps=N&timeout=SECONDS`. The trace ends when the client goes away."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        query = Request(scope).query_params
        try:
            unknown = set(query) - {"steps", "timeout"}
            if unknown:
                raise errors.InvalidRequest(f"unknown parameter {min(unknown)!r}; known: steps, timeout")
            steps = _number(query.get("steps", str(DEFAULT_STEPS)), "steps")
            wait_s = _number(query.get("timeout", str(DEFAULT_TIMEOUT_S)), "timeout")
            if steps != int(steps):
                raise errors.InvalidRequest(f"steps is {steps:g}; it must be a whole number", param="steps")
            records = await while_connected(receive, self._recorder.capture(int(steps), wait_s))
            # Thousands of records take a while to encode, and plans must not wait for that.
            response = await asyncio.to_thread(json_response, records)
        except ClientGone:
            return
        except errors.StagemeshError as e:
            response = response_of(e)
        await response(scope, receive, send)


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise errors.InvalidRequest(f"{name} is {text[:40]!r}; it must be a number", param=name)
    return value
