"""The life of one generating HTTP request: body, checks, submission, answer; and its end when the client goes away."""

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
from stagemesh.gateway.api.token_log import Call as Recorded
from stagemesh.gateway.api.token_log import Writing

from ..openai.call import Api, Call
from ..openai.errors import BodyTooLarge, body_of, dumps, json_response, response_of
from ..openai.run import Run
from .body import ClientGone, Writer, answer_unread, read_body, while_connected

log = logging.getLogger(__name__)

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would gather the events into blocks.
    (b"x-accel-buffering", b"no"),
]


class Endpoint:
    """An ASGI application that answers one kind of call."""

    def __init__(self, api: Api, parse: Callable[[Api, bytes], Awaitable[Call]], path: str = "") -> None:
        """`path`: how a stream that can be resumed names it."""
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
        writing = None
        if call.stream and self._api.token_log is not None:
            # Whoever goes on with it must draw the same.
            call.requests = [_with_seed(request) for request in call.requests]
            call.number()
            seeds = tuple(request.sampling.seed or 0 for request in call.requests)
            writing = self._api.token_log.begin(Recorded(call.id, self._path, data, call.created, seeds))
        return await answer(self._api, call, writer, writing)


def _with_seed(request: GenerationRequest) -> GenerationRequest:
    if request.sampling.seed is not None:
        return request
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=secrets.randbits(32)))


async def answer(api: Api, call: Call, writer: Writer, writing: Writing | None) -> Response | None:
    """The whole answer, or None when it was streamed; written down before it is sent, where it can be resumed."""
    try:
        run = call.run = Run(api.engine, call.requests)
        try:
            if not call.stream:
                return json_response(call.whole(await run.whole()))
            async with contextlib.aclosing(run.deltas()) as batches:
                async for batch in batches:
                    # Not before the first batch: until then a failure still has its own status.
                    if not writer.started:
                        await writer.start(EVENT_STREAM)
                    if writing is not None:
                        for index, delta in batch:
                            point("gateway.before_log")
                            writing.add(index, delta)
                            point("gateway.after_log")
                    await writer.write(call.events(batch))
            if not writer.started:
                await writer.start(EVENT_STREAM)  # All of it was told before.
            await writer.write(call.last_event(), more=False)
            return None
        except (errors.StagemeshError, ClientGone):
            raise
        except Exception as e:
            log.exception("request %s failed", call.id)
            raise errors.InternalError(f"{type(e).__name__}: {e}") from e
        finally:
            run.cancel()
    finally:
        if writing is not None:
            writing.close()


async def end_with(error: errors.StagemeshError, writer: Writer) -> None:
    """Ends a stream with its error; without [DONE], since it is not done."""
    try:
        await writer.write(f"data: {dumps(body_of(error))}\n\n".encode(), more=False)
    except ClientGone:
        return
