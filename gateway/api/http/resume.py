"""GET /v1/streams/{id}: the rest of a stream that broke, at whichever gateway shares the token log.

The id is that of the answer's chunks; `Last-Event-ID` says behind which of its events the client goes on, as an
EventSource sends it by itself. What was promised is told as it was; what was not yet drawn is drawn as it would have
been.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping

from starlette.responses import Response
from starlette.types import Scope

from stagemesh.errors import InvalidRequest

from ..openai.call import Api, Call
from .body import Writer
from .endpoint import Endpoint, answer

Parse = Callable[[Api, bytes], Awaitable[Call]]


class ResumeEndpoint(Endpoint):
    """Goes on with streams of other endpoints, given by their paths."""

    def __init__(self, api: Api, parsers: Mapping[str, Parse]) -> None:
        self._api = api
        self._parsers = parsers

    async def _answer(self, scope: Scope, data: bytes, writer: Writer) -> Response | None:
        assert self._api.token_log is not None
        recorded, writing = self._api.token_log.resume(scope["path_params"]["id"])
        call = await self._parsers[recorded.call.path](self._api, recorded.call.body)
        n, count = call.requests[0].n, sum(request.n for request in call.requests)
        told = [tuple(recorded.choices.get(index, ())) for index in range(count)]
        seen = _seen(dict(scope["headers"]).get(b"last-event-id", b"").decode("latin-1"), list(map(len, told)))
        call.requests = [
            dataclasses.replace(
                request,
                sampling=dataclasses.replace(request.sampling, seed=seed),
                log=tuple(told[p * n : (p + 1) * n]),
                seen=tuple(seen[p * n : (p + 1) * n]),
            )
            for p, (request, seed) in enumerate(zip(call.requests, recorded.call.seeds, strict=True))
        ]
        call.take_up(recorded.call.call_id, recorded.call.created, seen)
        writing.go_on_behind(seen)
        return await answer(self._api, call, writer, writing)


def _seen(last: str, lengths: list[int]) -> list[int]:
    """Tokens of each choice that the client has. Raises InvalidRequest for an id that is not of this stream."""
    if not last:
        return [0] * len(lengths)
    parts = last.split(",")
    counts = [int(part) for part in parts if part.isascii() and part.isdigit()]
    if len(counts) != len(parts) or len(counts) != len(lengths):
        raise InvalidRequest(f"Last-Event-ID {last!r} is not the id of an event of this stream", param="Last-Event-ID")
    if any(count > length for count, length in zip(counts, lengths, strict=True)):
        raise InvalidRequest(
            f"Last-Event-ID {last!r} is ahead of this stream, of which {','.join(map(str, lengths))} tokens are known",
            param="Last-Event-ID",
        )
    return counts
