"""Submits the requests of one call to the engine, merges their streams, and makes sure that they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from stagemesh.gateway.api.request import Delta, Engine, GenerationRequest, Stream


class Generation:
    """The running requests of one call, one for each prompt. Choice `c` of prompt `p` has the index p * n + c."""

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest]) -> None:
        """Submits all requests, or none. Raises what the engine raises."""
        self.requests = requests
        self._streams: list[Stream] = []
        try:
            for request in requests:
                self._streams.append(engine.submit(request))
        except BaseException:
            self.cancel()
            raise

    @property
    def cached_tokens(self) -> int:
        """Tokens of all prompts that the prefix cache held."""
        return sum(stream.cached_tokens for stream in self._streams)

    def cancel(self) -> None:
        """Ends all requests. It may be called at any time."""
        for stream in self._streams:
            stream.cancel()

    async def deltas(self) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Batches of (index, delta) as they come. Raises what the engine raises."""
        if len(self._streams) == 1:
            async for batch in self._streams[0]:
                yield [(delta.choice, delta) for delta in batch]
            return
        # At most one batch of each stream is kept here. For a slow reader the engine keeps the rest.
        iterators = [aiter(stream) for stream in self._streams]
        pending = {asyncio.ensure_future(anext(it)): p for p, it in enumerate(iterators)}
        try:
            while pending:
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                ready: list[tuple[int, Delta]] = []
                for future in done:
                    p = pending.pop(future)
                    try:
                        batch = future.result()
                    except StopAsyncIteration:
                        continue
                    first = p * self.requests[p].n
                    ready += [(first + delta.choice, delta) for delta in batch]
                    pending[asyncio.ensure_future(anext(iterators[p]))] = p
                if ready:
                    yield ready
        finally:
            for future in pending:
                future.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def whole(self) -> list[Delta]:
        """All choices, each as one delta, once they have ended."""
        pieces: list[list[Delta]] = [[] for request in self.requests for _ in range(request.n)]
        async for batch in self.deltas():
            for index, delta in batch:
                pieces[index].append(delta)
        return [_joined(deltas) for deltas in pieces]


def _joined(deltas: Sequence[Delta]) -> Delta:
    last = deltas[-1]
    return Delta(
        last.choice,
        "".join(delta.text for delta in deltas),
        [token for delta in deltas for token in delta.tokens],
        [entry for delta in deltas for entry in delta.logprobs],
        last.finish_reason,
        last.stop_reason,
    )
