"""The life of one generating HTTP request: body, checks, submission, answer; or an early end when the client leaves."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from stagemesh import errors
from stagemesh.faults import point
from stagemesh.gateway.api.token_log import LoggedCall

from ..openai.call import Api, Call
from ..openai.errors import BodyTooLarge, body_of, dumps, response_of
from ..openai.run import Generation
from .body import Writer, answer_unread, read_body, while_connected

log = logging.getLogger(__name__)

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Otherwise nginx would buffer the events.
    (b"x-accel-buffering", b"no"),
]
Begin = Callable[[Api, Scope, bytes], Awaitable[Call[Any]]]
"""Makes a call from a request's body."""


def begin_new(kind: type[Call[Any]]) -> Begin:
    """Makes new calls of this kind from the bodies of requests."""

    async def begin(api: Api, scope: Scope, data: bytes) -> Call[Any]:
        call = await kind.parse(api, data)
        if api.token_log is not None and call.body.stream:
            # The gateway at which the stream is resumed must sample the same tokens.
            seeds = [request.sampling.seed for request in call.requests]
            logged = LoggedCall(call.id, scope["path"], data.decode(), call.created, seeds)
            call.log_file = api.token_log.begin(logged)
        return call

    return begin


class Endpoint:
    """The ASGI application of one generating endpoint."""

    def __init__(self, api: Api, begin: Begin) -> None:
        self._api = api
        self._begin = begin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        timing, limit_bytes = self._api.timing, int(self._api.settings.max_body_mib * 2**20)
        writer = Writer(scope, send, timing.write_s)
        try:
            data = await read_body(Request(scope, receive), limit_bytes, timing.body_s)
            response = await while_connected(receive, self._answer(scope, data, writer))
            if response is not None:
                await response(scope, receive, send)
        except BodyTooLarge as e:
            await answer_unread(response_of(e), receive, send, timing)
        except errors.StagemeshError as e:
            if not writer.started:
                raise
            # A stream ends with its error, without [DONE].
            with contextlib.suppress(ClientDisconnect):
                await writer.write(f"data: {dumps(body_of(e))}\n\n".encode(), more=False)
        except ClientDisconnect:
            return

    async def _answer(self, scope: Scope, data: bytes, writer: Writer) -> JSONResponse | None:
        """The whole answer, or None when it was streamed. Pieces are written to the log before they are sent."""
        call = await self._begin(self._api, scope, data)
        try:
            generation = call.generation = Generation(self._api.engine, call.requests)
            try:
                if not call.body.stream:
                    return JSONResponse(call.whole(await generation.whole()))
                async with contextlib.aclosing(generation.deltas()) as batches:
                    async for batch in batches:
                        # Not before the first batch: until then a failure can still have its own status.
                        await writer.start(EVENT_STREAM)
                        if call.log_file is not None:
                            for index, delta in batch:
                                point("gateway.before_log")
                                call.log_file.add(index, delta)
                                point("gateway.after_log")
                        await writer.write(call.events(batch))
                await writer.start(EVENT_STREAM)  # A client that resumes may have all of it already.
                await writer.write(call.last_event(), more=False)
                return None
            finally:
                generation.cancel()
        except (errors.StagemeshError, ClientDisconnect):
            raise
        except Exception as e:
            log.exception("request %s failed", call.id)
            raise errors.InternalError(f"{type(e).__name__}: {e}") from e
        finally:
            if call.log_file is not None:
                call.log_file.close()
