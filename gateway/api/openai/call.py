"""One call of a generating endpoint: its request, and its answer in OpenAI's JSON, whole or as events."""

from __future__ import annotations

import functools
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from stagemesh.gateway.api.build import build, served
from stagemesh.gateway.api.params import parse
from stagemesh.gateway.api.request import Delta, Engine, GenerationRequest, ServedModel, TokenLogprob
from stagemesh.gateway.api.token_log import StreamWriter, TokenLog
from stagemesh.gateway.telemetry.metrics import Metrics
from stagemesh.settings.gateway import GatewaySettings

from ...timing import GatewayTiming
from .errors import dumps
from .protocol import Common
from .run import Generation

DONE = b"data: [DONE]\n\n"
B = TypeVar("B", bound=Common)


@dataclass(frozen=True)
class Api:
    """The objects that all endpoints share."""

    engine: Engine
    settings: GatewaySettings
    metrics: Metrics
    timing: GatewayTiming
    token_log: TokenLog | None = None


def event(payload: str) -> str:
    """`payload` as one server-sent event."""
    return f"data: {payload}\n\n"


class Call(ABC, Generic[B]):
    """One call. Subclasses write choices in the format of their endpoint."""

    body_type: type[B]
    object_whole: str
    object_chunk: str
    id_prefix: str
    fill_context: bool
    """Whether an output without max_tokens may fill the context."""

    def __init__(self, body: B, model: ServedModel) -> None:
        self.body = body
        self.model = model
        self.id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.requests: list[GenerationRequest] = []
        """One request for each prompt."""
        self.generation: Generation
        """Set when the requests are submitted."""
        self.counts: list[int] = []
        """Number of tokens of each choice so far, with those of an earlier stream of this call."""
        self.log_file: StreamWriter | None = None
        """Writer of the call's token log, if there is one. Then events have the counts as ids, for a resumed stream."""
        options = body.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        self._continuous_usage = self._include_usage and bool(options and options.continuous_usage_stats)

    @classmethod
    async def parse(cls, api: Api, data: bytes) -> Self:
        """Parses a body. Raises InvalidRequest, NotFound, Unavailable."""
        body = parse(cls.body_type, data)
        call = cls(body, served(api.engine, body.model))
        body.check_supported()
        prompts = await call.prompts()
        for i, prompt in enumerate(prompts):
            name = call.id if len(prompts) == 1 else f"{call.id}-{i}"
            timeout_s = api.settings.request_timeout
            call.requests.append(
                build(name, prompt, body, call.model, timeout_s=timeout_s, fill_context=cls.fill_context)
            )
        call.counts = [0] * sum(request.n for request in call.requests)
        return call

    @abstractmethod
    async def prompts(self) -> list[Sequence[int]]:
        """Token ids of each prompt. Raises InvalidRequest."""

    @abstractmethod
    def content(self, index: int, text: str) -> dict[str, Any]:
        """The text of a whole choice."""

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice in a chunk before the first delta, if there is such a chunk."""

    @abstractmethod
    def piece(self, index: int, text: str) -> dict[str, Any]:
        """The choice in a streamed chunk, without log-probabilities, token ids and the reason of its end."""

    @abstractmethod
    def logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The `logprobs` object of the next tokens of a choice."""

    def whole(self, choices: Sequence[Delta]) -> dict[str, Any]:
        """The whole answer."""
        self.counts = [len(choice.tokens) for choice in choices]
        return {
            **self._base(self.object_whole),
            "choices": [self._whole_choice(i, choice) for i, choice in enumerate(choices)],
            "usage": self.usage(),
        }

    def events(self, batch: Iterable[tuple[int, Delta]]) -> bytes:
        """The events of one batch of deltas."""
        lines: list[str] = []
        for index, delta in batch:
            if not self.counts[index] and (opening := self.opening(index)) is not None:
                lines.append(self._chunk(dumps(opening)))
            self.counts[index] += len(delta.tokens)
            lines.append(self._chunk(dumps(self._chunk_choice(index, delta))))
        return "".join(lines).encode()

    def last_event(self) -> bytes:
        """The events that end the stream: the usage, if it is wanted, and [DONE]."""
        usage = event(f'{self._head}],"usage":{dumps(self.usage())}}}').encode() if self._include_usage else b""
        return usage + DONE

    def usage(self) -> dict[str, Any]:
        """The token counts so far. A prompt counts once, whatever the number of its choices."""
        prompt, completion = sum(len(request.prompt) for request in self.requests), sum(self.counts)
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": self.generation.cached_tokens},
        }

    def prompt_ids(self, index: int) -> dict[str, Any]:
        """The ids of a choice's prompt, if they are wanted."""
        if not self.body.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self.requests[index // self.requests[0].n].prompt)}

    @functools.cached_property
    def _head(self) -> str:
        """The beginning of every chunk."""
        return dumps(self._base(self.object_chunk))[:-1] + ',"choices":['

    def _whole_choice(self, index: int, choice: Delta) -> dict[str, Any]:
        return {
            "index": index,
            **self.content(index, choice.text),
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
        number = f"id: {','.join(map(str, self.counts))}\n" if self.log_file is not None else ""
        if self._continuous_usage:
            return number + event(f'{self._head}{choice}],"usage":{dumps(self.usage())}}}')
        end = '],"usage":null}' if self._include_usage else "]}"
        return number + event(f"{self._head}{choice}{end}")
