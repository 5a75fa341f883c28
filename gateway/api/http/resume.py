"""GET /v1/streams/{id}: the rest of a stream that broke, at any gateway that shares the token log.

The id is that of the answer's chunks. `Last-Event-ID` is the id of the last event that the client has; an EventSource
sends it automatically. Tokens in the log are sent as they are; the others are sampled as they would have been.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from stagemesh.errors import InvalidRequest

from ..openai.call import Api, Call
from .endpoint import Begin


def begin_resumed(kinds: Mapping[str, type[Call[Any]]]) -> Begin:
    """Makes calls that send the rest of logged ones. `kinds`: path of the endpoint -> its kind of call."""

    async def begin(api: Api, scope: Scope, data: bytes) -> Call[Any]:
        assert api.token_log is not None
        logged, choices, log_file = api.token_log.resume(scope["path_params"]["id"])
        call = await kinds[logged.path].parse(api, logged.body.encode())
        n = call.requests[0].n
        told = [tuple(choices.get(index, ())) for index in range(len(call.counts))]
        seen = _seen(Headers(scope=scope).get("last-event-id", ""), list(map(len, told)))
        for p, (request, seed) in enumerate(zip(call.requests, logged.seeds, strict=True)):
            request.sampling.seed = seed
            own = slice(p * n, (p + 1) * n)
            call.requests[p] = dataclasses.replace(request, log=tuple(told[own]), seen=tuple(seen[own]))
        call.id, call.created = logged.id, logged.created
        call.counts, call.log_file = seen, log_file
        log_file.continue_at(seen)
        return call

    return begin


def _seen(last: str, lengths: list[int]) -> list[int]:
    """Number of each choice's tokens that the client has, by `Last-Event-ID`. Raises InvalidRequest for a wrong id."""
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
