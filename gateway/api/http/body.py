"""Request bodies and response streams, with clients that are slow or go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stagemesh.errors import InvalidRequest

from ...timing import GatewayTiming
from ..openai.errors import BodyTooLarge, BodyTooSlow

ABORT = "stagemesh.abort"
"""Key of the scope under which a function drops the connection, with what is in its buffer."""

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection, or stopped reading."""


async def read_body(scope: Scope, receive: Receive, limit_bytes: int, within_s: float) -> bytes:
    """The request's body. Raises BodyTooLarge (and reads no further), BodyTooSlow, InvalidRequest, ClientGone."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            if not value.isdigit():
                raise InvalidRequest("content-length must be a number")
            if int(value) > limit_bytes:
                raise _too_large(limit_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(within_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit_bytes:
                    raise _too_large(limit_bytes)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {within_s:g} s") from None


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit_bytes / 2**20:g} MiB, this server's bound (--max-body-mib)")


async def answer_unread(response: Response, receive: Receive, send: Send, timing: GatewayTiming) -> None:
    """Sends `response` to a client that is still sending its body, and drops some more of that body.

    This is nginx's lingering close. If the connection were closed at once it would be reset, and most clients would
    report the reset and not the response. A body that does not end within the bounds is cut off.
    """
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timing.linger_s):
            more = True
            while more and dropped < timing.linger_bytes:
                message = await receive()
                dropped += len(message.get("body", b""))
                more = message.get("more_body", False)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. When the client goes away first, cancels `work` and raises ClientGone."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGone
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Writer:
    """Writes one response. The connection of a client that reads nothing for `timeout_s` is dropped."""

    def __init__(self, scope: Scope, send: Send, timeout_s: float) -> None:
        self._scope = scope
        self._send = send
        self._timeout_s = timeout_s
        self.started = False

    async def start(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Sends status 200 and `headers`."""
        self.started = True
        await self._within({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Sends a piece of the body. Raises ClientGone when the client has read nothing for too long."""
        await self._within({"type": "http.response.body", "body": data, "more_body": more})

    async def _within(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except TimeoutError:
            abort = self._scope.get(ABORT)
            if abort is not None:
                abort()
            raise ClientGone from None
        except OSError as e:
            raise ClientGone from e


def abort_of(send: Send) -> Any:
    """The function that drops the connection behind `send` at once; None if the server has none.

    ASGI has no call for this, and a close waits until the client has read the buffer, which it may never do. uvicorn's
    `send` is a method of an object that holds the transport.
    """
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    return getattr(transport, "abort", None)
