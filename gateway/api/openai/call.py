"""One call of a generating endpoint: its request, and its answer in OpenAI's JSON, whole or as events."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stagemesh.gateway.api.request import Delta, Engine, GenerationRequest, ModelCard, TokenLogprob
from stagemesh.gateway.api.token_log import TokenLog
from stagemesh.gateway.telemetry.metrics import Metrics
from stagemesh.gateway.text.tokenizer import Tokenizer
from stagemesh.settings.gateway import GatewaySettings

from ...timing import GatewayTiming
from .errors import dumps
from .protocol import Common
from .run import Choice, Generation

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Api:
    """What all endpoints share."""

    engine: Engine
    settings: GatewaySettings
    metrics: Metrics
    timing: GatewayTiming
    token_log: TokenLog | None = None


def event(payload: str) -> str:
    """`payload` as one server-sent event."""
    return f"data: {payload}\n\n"


class Call(ABC):
    """One call. Subclasses write the choices of their endpoint."""

    object_whole: str
    object_chunk: str
    id_prefix: str

    def __init__(self, body: Common, model: ModelCard, tokenizer: Tokenizer) -> None:
        self.body = body
        self.model = model
        self.tokenizer = tokenizer
        self.id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.stream = bool(body.stream)
        self.requests: Sequence[GenerationRequest] = ()
        self.generation: Generation | None = None
        """Set when the requests are submitted."""
        options = body.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        self._continuous_usage = self._include_usage and bool(options and options.continuous_usage_stats)
        self._completion_tokens = 0
        self._told: list[int] = []
        """Tokens of each choice so far: the events' ids, where the stream can be resumed; else empty."""
        self._opened: set[int] = set()
        self._head = self._make_head()

    @abstractmethod
    def content(self, index: int, text: str) -> dict[str, Any]:
        """The text of a whole choice."""

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """A choice of the chunk before the first delta, if there is one."""

    @abstractmethod
    def piece(self, index: int, text: str) -> dict[str, Any]:
        """A choice of a streamed chunk: everything but what comes with tokens and the end."""

    @abstractmethod
    def logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The `logprobs` object of the next tokens of a choice."""

    def number_events(self) -> None:
        """Gives its events ids, so that its stream can be resumed."""
        self._told = [0] * sum(request.n for request in self.requests)

    def resume(self, call_id: str, created: int, seen: Sequence[int]) -> None:
        """Makes it the rest of an earlier call. `seen`: tokens of each choice that the client has."""
        self.id, self.created = call_id, created
        self._head = self._make_head()
        self._told = list(seen)
        self._completion_tokens = sum(seen)
        self._opened = {index for index, count in enumerate(seen) if count}

    def _make_head(self) -> str:
        return dumps(self._base(self.object_chunk))[:-1] + ',"choices":['

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole answer."""
        self._completion_tokens = sum(len(choice.tokens) for choice in choices)
        return {
            **self._base(self.object_whole),
            "choices": [self._whole_choice(i, choice) for i, choice in enumerate(choices)],
            "usage": self.usage(),
        }

    def events(self, batch: Iterable[tuple[int, Delta]]) -> bytes:
        """The events of one batch of deltas."""
        lines: list[str] = []
        for index, delta in batch:
            if index not in self._opened:
                self._opened.add(index)
                opening = self.opening(index)
                if opening is not None:
                    lines.append(self._chunk(dumps(opening)))
            self._completion_tokens += len(delta.tokens)
            if self._told:
                self._told[index] += len(delta.tokens)
            if delta.text or delta.tokens or delta.finish_reason is not None:
                lines.append(self._chunk(dumps(self._chunk_choice(index, delta))))
        return "".join(lines).encode()

    def last_event(self) -> bytes:
        """The events that end the stream: the usage, if it is wanted, and [DONE]."""
        usage = event(f'{self._head}],"usage":{dumps(self.usage())}}}').encode() if self._include_usage else b""
        return usage + DONE

    def usage(self) -> dict[str, Any]:
        """The token counts so far. A prompt counts once, whatever the number of its choices."""
        prompt = sum(len(request.prompt) for request in self.requests)
        cached = self.generation.cached_tokens if self.generation is not None else 0
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + self._completion_tokens,
            "completion_tokens": self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def request_ids(self, count: int) -> list[str]:
        """Request ids for `count` prompts."""
        return [self.id] if count == 1 else [f"{self.id}-{i}" for i in range(count)]

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            **self.content(index, "".join(choice.text)),
            "logprobs": self._logprobs_of(index, choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **({"token_ids": choice.tokens} if self.body.return_token_ids else {}),
        }

    def _chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        made = {**self.piece(index, delta.text), "logprobs": self._logprobs_of(index, delta.logprobs)}
        if delta.finish_reason is not None:
            made |= {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        return {**made, "token_ids": delta.tokens} if self.body.return_token_ids else made

    def _logprobs_of(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return self.logprobs(index, entries) if self.requests[0].sampling.logprobs else None

    def _base(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}

    def _chunk(self, choice: str) -> str:
        number = f"id: {','.join(map(str, self._told))}\n" if self._told else ""
        if self._continuous_usage:
            return number + event(f'{self._head}{choice}],"usage":{dumps(self.usage())}}}')
        end = '],"usage":null}' if self._include_usage else "]}"
        return number + event(f"{self._head}{choice}{end}")
