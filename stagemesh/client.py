"""The client library: asynchronous, typed, over gRPC.

    async with Client("127.0.0.1:50051") as client:
        done = await client.generate("Once upon a time", max_tokens=20)
        print(done.text)
        async for delta in client.stream([{"role": "user", "content": "Hello"}]):
            print(delta.text, end="")

Every failure is an error of `stagemesh.errors`, of the class that the gateway raised.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, cast

from google.protobuf import json_format

from stagemesh import errors, rpc
from stagemesh.protos.v1 import gateway_pb2, gateway_pb2_grpc

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or a conversation of `{"role": ..., "content": ...}`."""
FinishReason: TypeAlias = Literal["stop", "length"]
Usage: TypeAlias = gateway_pb2.Usage
"""Token counts: `prompt_tokens`, and `completion_tokens` over all choices."""
Model: TypeAlias = gateway_pb2.ModelCard
"""A served model: `id`, `max_model_len`, and when it was first served, `created`."""

_FINISH: dict[int, FinishReason] = {
    gateway_pb2.FINISH_REASON_STOP: "stop",
    gateway_pb2.FINISH_REASON_LENGTH: "length",
}


class Params(TypedDict, total=False):
    """Parameters of a request. A missing one takes the checkpoint's default, or else OpenAI's."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    n: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    logprobs: int
    """Number of likeliest tokens whose log-probabilities are returned, besides each token's own."""
    timeout_s: float
    """Seconds until the request ends with DeadlineExceeded."""
    request_id: str
    """Name of the request for `cancel`. By default the client library chooses one."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one token, and those of the likeliest tokens at its position, by id."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class StreamDelta:
    """New output of one choice."""

    request_id: str
    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None


@dataclass
class Choice:
    """The complete output of one choice."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """A complete answer. `text`, `token_ids` and `finish_reason` are those of the first choice."""

    request_id: str
    choices: list[Choice]
    usage: Usage

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first choice's tokens."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason


class Client:
    """A connection to a gateway's gRPC port. Concurrent requests share it."""

    def __init__(self, target: str, api_key: str | None = None, *, timing: rpc.RpcTiming = rpc.RpcTiming()) -> None:
        """`target`: host:port. Connects at the first call."""
        self._channel = rpc.channel(target, timing)
        self._answer_s = timing.answer_s
        self._stub: Any = gateway_pb2_grpc.GatewayStub(self._channel)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key is not None else ()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection. Requests that still run are cancelled."""
        await self._channel.close(None)

    async def generate(self, prompt: Prompt, **params: Unpack[Params]) -> Completion:
        """Returns the complete answer to `prompt`. Cancelling the awaiting task cancels the request."""
        request = _request(prompt, params)
        choices = [Choice(i) for i in range(max(1, request.n))]
        usage = Usage()
        async with contextlib.aclosing(self._responses(request, params.get("timeout_s"))) as responses:
            async for response in responses:
                if response.HasField("usage"):
                    usage = response.usage
                    continue
                delta = _delta(response)
                choice = choices[delta.choice]
                choice.text += delta.text
                choice.token_ids += delta.token_ids
                choice.logprobs += delta.logprobs
                choice.finish_reason = delta.finish_reason or choice.finish_reason
        return Completion(request.request_id, choices, usage)

    async def stream(self, prompt: Prompt, **params: Unpack[Params]) -> AsyncGenerator[StreamDelta, None]:
        """Yields the answer to `prompt` as it comes. Closing the generator (`aclose`) cancels the request."""
        async with contextlib.aclosing(self._responses(_request(prompt, params), params.get("timeout_s"))) as responses:
            async for response in responses:
                if not response.HasField("usage"):
                    yield _delta(response)

    async def cancel(self, request_id: str) -> None:
        """Ends a running request. Raises NotFound if it is not running."""
        with rpc.mapped():
            await self._stub.Cancel(gateway_pb2.CancelRequest(request_id=request_id), metadata=self._metadata)

    async def models(self) -> list[Model]:
        """Returns the models that the gateway serves."""
        with rpc.mapped():
            told = await self._stub.ListModels(gateway_pb2.ListModelsRequest(), metadata=self._metadata)
        return list(told.models)

    async def mesh(self) -> dict[str, Any]:
        """Describes the mesh as the gateway sees it: pipelines, their stages, workers, pages."""
        with rpc.mapped():
            told = await self._stub.DescribeMesh(gateway_pb2.GatewayDescribeMeshRequest(), metadata=self._metadata)
        return json_format.MessageToDict(
            told, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )

    async def _responses(
        self, request: gateway_pb2.GenerateRequest, timeout_s: float | None
    ) -> AsyncGenerator[gateway_pb2.GenerateResponse, None]:
        within_s = None if timeout_s is None else timeout_s + self._answer_s
        call = self._stub.Generate(request, metadata=self._metadata, timeout=within_s)
        try:
            with rpc.mapped():
                async for response in call:
                    yield response
        finally:
            call.cancel()


def _request(prompt: Prompt, params: Params) -> gateway_pb2.GenerateRequest:
    """Converts `prompt` and `params` to a message. Raises InvalidRequest for values that do not fit a message."""
    known: dict[str, Any] = dict(params)
    timeout_s = known.pop("timeout_s", None)
    stop = known.pop("stop", ())
    known["stop"] = [stop] if isinstance(stop, str) else list(stop)
    known.setdefault("request_id", f"client-{uuid.uuid4().hex}")
    try:
        if timeout_s is not None:
            if not timeout_s > 0:
                raise ValueError(f"timeout_s must be more than 0, not {timeout_s}")
            known["timeout_ms"] = max(1, int(timeout_s * 1000))
        request = gateway_pb2.GenerateRequest(**known)
        if isinstance(prompt, str):
            request.text = prompt
        elif prompt and isinstance(prompt[0], Mapping):
            messages = [gateway_pb2.ChatMessage(**cast(Mapping[str, str], turn)) for turn in prompt]
            request.chat.CopyFrom(gateway_pb2.ChatMessages(messages=messages))
        else:
            request.token_ids.CopyFrom(gateway_pb2.TokenIds(ids=cast(Sequence[int], prompt)))
    except (TypeError, ValueError, OverflowError) as e:
        raise errors.InvalidRequest(f"this request cannot be sent: {e}") from e
    return request


def _delta(response: gateway_pb2.GenerateResponse) -> StreamDelta:
    tokens = list(response.token_ids)
    return StreamDelta(
        request_id=response.request_id,
        choice=response.choice,
        text=response.text,
        token_ids=tokens,
        logprobs=[
            TokenLogprob(token, told.logprob, dict(zip(told.top_ids, told.top_logprobs, strict=True)))
            for token, told in zip(tokens, response.logprobs, strict=False)
        ],
        finish_reason=_FINISH.get(response.finish_reason),
    )
