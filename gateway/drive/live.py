"""A running request: it turns tokens of its choices into the client's stream of deltas.

Deltas that the reader has not taken yet are merged, so a slow reader costs only the memory of its tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from stagemesh.errors import Cancelled, StagemeshError

from ..api.request import Delta, FinishReason, GenerationRequest, TokenLogprob
from ..schedule.sequence import Sequence
from ..telemetry.metrics import Metrics
from ..text.detokenizer import Detokenizer
from ..text.tokenizer import Tokenizer


@dataclass
class Choice:
    """One of a request's `n` answers."""

    sequence: Sequence
    detokenizer: Detokenizer
    finished: bool = False
    last_token_at: float = 0.0


class LiveRequest:
    """One accepted request. It ends exactly once, finished or with an error. Implements `request.Stream`."""

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        metrics: Metrics,
        on_end: Callable[[LiveRequest], None],
    ) -> None:
        self.request = request
        self.error: StagemeshError | None = None
        self.choices = [
            Choice(
                Sequence(request.prompt, number, request.max_tokens),
                Detokenizer(
                    tokenizer,
                    request.prompt,
                    request.stop,
                    request.skip_special_tokens,
                    request.include_stop_str_in_output,
                    request.sampling.min_tokens,
                ),
            )
            for number in range(request.n)
        ]
        self.ended = False
        self.deadline: asyncio.TimerHandle | None = None
        self._eos_ids = frozenset(tokenizer.eos_ids)
        self._metrics = metrics
        self._on_end = on_end
        self._arrived_at = time.monotonic()
        self._started = self._first_token_seen = False
        self._pending: dict[int, Delta] = {}
        self._wake = asyncio.Event()
        metrics.prompt_len.observe(len(request.prompt))
        self._take_up()

    def _take_up(self) -> None:
        """Enters the tokens of an earlier stream of this request, without sending again what the client has."""
        for number, logged in enumerate(self.request.log):
            for at, (token, logprob) in enumerate(logged):
                if at == self.request.seen[number]:
                    self._pending.pop(number, None)
                self.choices[number].sequence.log.append(token)
                self._enter(number, token, logprob)
            if len(logged) == self.request.seen[number]:
                self._pending.pop(number, None)

    # -- from the batch loop ----------------------------------------------------------------------------------------

    def started(self) -> None:
        """A plan names one of its sequences for the first time."""
        if not self._started:
            self._started = True
            self._metrics.queue_s.observe(time.monotonic() - self._arrived_at)
            self._metrics.prompt_tokens.inc(len(self.request.prompt))

    def on_token(self, number: int, token: int, logprob: TokenLogprob | None) -> bool:
        """A token entered the log of choice `number`. Returns whether that ends the choice."""
        self._measure(self.choices[number])
        return self._enter(number, token, logprob)

    def _enter(self, number: int, token: int, logprob: TokenLogprob | None) -> bool:
        choice, request = self.choices[number], self.request
        log = choice.sequence.log
        reason: FinishReason | None = None
        stopped_by: str | int | None = None
        text = ""
        if token in request.stop_token_ids and len(log) >= max(1, request.sampling.min_tokens):
            reason, stopped_by = "stop", None if token in self._eos_ids else token
            text = choice.detokenizer.finish()
        else:
            text, stop_string = choice.detokenizer.push(token)
            if stop_string is not None:
                reason, stopped_by = "stop", stop_string
            elif len(log) >= request.max_tokens:
                reason = "length"
                text += choice.detokenizer.finish()
        delta = self._pending.get(number)
        if delta is None:
            delta = self._pending[number] = Delta(number, "")
        delta.text += text
        delta.tokens.append(token)
        if logprob is not None:
            delta.logprobs.append(logprob)
        if reason is not None:
            delta.finish_reason, delta.stop_reason = reason, stopped_by
            choice.finished = True
        self._wake.set()
        if all(c.finished for c in self.choices):
            self._end(reason or "stop")
        return choice.finished

    def _measure(self, choice: Choice) -> None:
        now = time.monotonic()
        if not self._first_token_seen:
            self._first_token_seen = True
            self._metrics.ttft_s.observe(now - self._arrived_at)
        self._metrics.generation_tokens.inc()
        if choice.last_token_at:
            self._metrics.itl_s.observe(now - choice.last_token_at)
        choice.last_token_at = now

    def fail(self, error: StagemeshError) -> None:
        """Ends the request with an error. The reader first gets the deltas that it has not taken yet."""
        if not self.ended:
            self.error = error
            self._end("abort" if isinstance(error, Cancelled) else "error")

    def _end(self, reason: str) -> None:
        self.ended = True
        if self.deadline is not None:
            self.deadline.cancel()
        self._metrics.success.labels(reason).inc()
        self._metrics.e2e_s.observe(time.monotonic() - self._arrived_at)
        self._metrics.output_len.observe(sum(len(choice.sequence.log) for choice in self.choices))
        self._wake.set()
        self._on_end(self)

    @property
    def cached_tokens(self) -> int:
        """Number of prompt tokens that the prefix cache held when the first choice started. 0 until then."""
        return self.choices[0].sequence.cached_tokens or 0

    # -- to the client ----------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Cancels the request for the client."""
        self.fail(Cancelled(f"request {self.request.request_id} was cancelled"))

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Yields new deltas, merged per choice, until the request has ended. Raises its error."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._pending:
                deltas, self._pending = list(self._pending.values()), {}
                yield deltas
            if self.ended and not self._pending:
                if self.error is not None:
                    raise self.error
                return
