"""GET /v1/streams/{id}: the rest of a stream that broke, at any gateway that shares the token log.

The id is that of the answer's chunks. `Last-Event-ID` names the last event that the client has, as an EventSource sends
it by itself. Tokens in the log are sent as they are; the others are sampled as they would have been.
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
    """Resumes streams of other endpoints. `parsers`: how each of these reads a body, by its path."""

    def __init__(self, api: Api, parsers: Mapping[str, Parse]) -> None:
        self._api = api
        self._parsers = parsers

    async def _answer(self, scope: Scope, data: bytes, writer: Writer) -> Response | None:
        assert self._api.token_log is not None
        logged, log_file = self._api.token_log.resume(scope["path_params"]["id"])
        call = await self._parsers[logged.call.path](self._api, logged.call.body)
        n, count = call.requests[0].n, sum(request.n for request in call.requests)
        told = [tuple(logged.choices.get(index, ())) for index in range(count)]
        seen = _seen(dict(scope["headers"]).get(b"last-event-id", b"").decode("latin-1"), list(map(len, told)))
        call.requests = [
            dataclasses.replace(
                request,
                sampling=dataclasses.replace(request.sampling, seed=seed),
                log=tuple(told[p * n : (p + 1) * n]),
                seen=tuple(seen[p * n : (p + 1) * n]),
            )
            for p, (request, seed) in enumerate(zip(call.requests, logged.call.seeds, strict=True))
        ]
        call.resume(logged.call.call_id, logged.call.created, seen)
        log_file.continue_at(seen)
        return await answer(self._api, call, writer, log_file)


def _seen(last: str, lengths: list[int]) -> list[int]:
    """Tokens of each choice that the client has, from `Last-Event-ID`. Raises InvalidRequest for another stream's."""
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
