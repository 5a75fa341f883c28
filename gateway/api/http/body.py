"""Request bodies and response streams, with clients that are slow or go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stagemesh.errors import InvalidRequest

from ...timing import GatewayTiming
from ..openai.errors import BodyTooLarge, BodyTooSlow

ABORT = "stagemesh.abort"
"""Key of the ASGI scope for a function that drops the connection with its unsent bytes."""

T = TypeVar("T")


async def read_body(request: Request, limit_bytes: int, within_s: float) -> bytes:
    """The request's body. Raises BodyTooLarge (and reads no further), BodyTooSlow, InvalidRequest, ClientDisconnect."""
    too_large = BodyTooLarge(
        f"the body is larger than {limit_bytes / 2**20:g} MiB, this server's bound (--max-body-mib)"
    )
    told = request.headers.get("content-length", "0")
    if not (told.isascii() and told.isdigit()):
        raise InvalidRequest("content-length must be a number")
    if int(told) > limit_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(within_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit_bytes:
                    raise too_large
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {within_s:g} s") from None
    return bytes(body)


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
    """The result of `work`. When the client goes away first, cancels `work` and raises ClientDisconnect."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientDisconnect
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
        """Sends status 200 and `headers`, unless that was done."""
        if not self.started:
            self.started = True
            await self._within({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Sends a piece of the body. Raises ClientDisconnect when the client has read nothing for too long."""
        await self._within({"type": "http.response.body", "body": data, "more_body": more})

    async def _within(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except TimeoutError:
            self._scope[ABORT]()
            raise ClientDisconnect from None
        except OSError as e:
            raise ClientDisconnect from e


def abort_of(send: Send) -> Any:
    """The function that drops the connection of `send` at once. It does nothing if the server has none.

    ASGI has no call for this, and a close waits until the client has read the buffer, which it may never do. uvicorn's
    `send` is a method of an object that holds the transport.
    """
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    return getattr(transport, "abort", lambda: None)
