"""The life of one generating HTTP request: body, checks, submission, answer; or an early end when the client leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stagemesh import errors
from stagemesh.faults import point
from stagemesh.gateway.api.request import GenerationRequest
from stagemesh.gateway.api.token_log import LoggedCall, StreamWriter

from ..openai.call import Api, Call
from ..openai.errors import BodyTooLarge, body_of, dumps, json_response, response_of
from ..openai.run import Generation
from .body import ClientGone, Writer, answer_unread, read_body, while_connected

log = logging.getLogger(__name__)

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Otherwise nginx would buffer the events.
    (b"x-accel-buffering", b"no"),
]


class Endpoint:
    """The ASGI application of one endpoint."""

    def __init__(self, api: Api, parse: Callable[[Api, bytes], Awaitable[Call]], path: str = "") -> None:
        """`path`: written into the token log, so that the stream is resumed by the same endpoint."""
        self._api = api
        self._parse = parse
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        timing = self._api.timing
        writer = Writer(scope, send, timing.write_s)
        try:
            data = await read_body(scope, receive, int(self._api.settings.max_body_mib * 2**20), timing.body_s)
            response = await while_connected(receive, self._answer(scope, data, writer))
        except ClientGone:
            return
        except BodyTooLarge as e:
            await answer_unread(response_of(e), receive, send, timing)
            return
        except errors.StagemeshError as e:
            if not writer.started:
                response = response_of(e)
            else:
                response = None
                await end_with(e, writer)
        if response is not None:
            await response(scope, receive, send)

    async def _answer(self, scope: Scope, data: bytes, writer: Writer) -> Response | None:
        """The whole answer, or None when it was streamed."""
        call = await self._parse(self._api, data)
        log_file = None
        if call.stream and self._api.token_log is not None:
            # The gateway at which the stream is resumed must sample the same tokens.
            call.requests = [_with_seed(request) for request in call.requests]
            call.number_events()
            seeds = tuple(request.sampling.seed or 0 for request in call.requests)
            log_file = self._api.token_log.begin(LoggedCall(call.id, self._path, data, call.created, seeds))
        return await answer(self._api, call, writer, log_file)


def _with_seed(request: GenerationRequest) -> GenerationRequest:
    if request.sampling.seed is not None:
        return request
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=secrets.randbits(32)))


async def answer(api: Api, call: Call, writer: Writer, log_file: StreamWriter | None) -> Response | None:
    """The whole answer, or None when it was streamed. Pieces are written to `log_file` before they are sent."""
    try:
        generation = call.generation = Generation(api.engine, call.requests)
        try:
            if not call.stream:
                return json_response(call.whole(await generation.whole()))
            async with contextlib.aclosing(generation.deltas()) as batches:
                async for batch in batches:
                    # Not before the first batch: until then a failure can still have its own status.
                    if not writer.started:
                        await writer.start(EVENT_STREAM)
                    if log_file is not None:
                        for index, delta in batch:
                            point("gateway.before_log")
                            log_file.add(index, delta)
                            point("gateway.after_log")
                    await writer.write(call.events(batch))
            if not writer.started:
                await writer.start(EVENT_STREAM)  # The client has all of it already.
            await writer.write(call.last_event(), more=False)
            return None
        except (errors.StagemeshError, ClientGone):
            raise
        except Exception as e:
            log.exception("request %s failed", call.id)
            raise errors.InternalError(f"{type(e).__name__}: {e}") from e
        finally:
            generation.cancel()
    finally:
        if log_file is not None:
            log_file.close()


async def end_with(error: errors.StagemeshError, writer: Writer) -> None:
    """Ends a stream with its error, without [DONE]."""
    try:
        await writer.write(f"data: {dumps(body_of(error))}\n\n".encode(), more=False)
    except ClientGone:
        return
