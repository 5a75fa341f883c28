"""Gives every HTTP request an id (x-request-id), checks its API key, and counts its response."""

from __future__ import annotations

import hmac
import re
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stagemesh.errors import Unauthenticated
from stagemesh.gateway.telemetry.metrics import Metrics

from ..openai.errors import response_of
from .body import ABORT, abort_of

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}\Z")
KEYED = ("/v1/", "/trace")
"""Prefixes of the paths that need the API key, if there is one."""


def check_key(authorization: bytes, api_key: str) -> None:
    """Raises Unauthenticated, unless an `authorization` header is `Bearer` and the key. It takes equally long for any
    wrong key."""
    scheme, _, given = authorization.partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), api_key.encode()):
        raise Unauthenticated(
            "the API key is not right"
            if authorization
            else "this server needs an API key: send it as 'Authorization: Bearer KEY'"
        )


class RequestMiddleware:
    """The outermost middleware: it gets the server's own `send`, which no other layer has wrapped yet."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None) -> None:
        self._app = app
        self._metrics = metrics
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if REQUEST_ID.match(given) else uuid.uuid4().hex
        scope[ABORT] = abort_of(send)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
                route = scope.get("route")
                self._metrics.http.labels(
                    scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other",
                    getattr(route, "path", "unknown"),
                    message["status"],
                ).inc()
            await send(message)

        try:
            if self._api_key is not None and scope["path"].startswith(KEYED):
                check_key(headers.get("authorization", "").encode("latin-1"), self._api_key)
        except Unauthenticated as e:
            await response_of(e)(scope, receive, named)
        else:
            await self._app(scope, receive, named)
