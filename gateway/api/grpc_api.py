"""The gRPC API. Engine, checks and limits are those of the HTTP API."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

from stagemesh import errors
from stagemesh.protos.v1 import gateway_pb2, gateway_pb2_grpc
from stagemesh.settings.gateway import GatewaySettings

from .build import build, encode, render_chat, served
from .http.middleware import check_key
from .openai.protocol import ChatMessage, turns
from .params import Params, parse
from .request import Delta, Engine, GenerationRequest

MAX_REQUEST_ID = 128
FINISH = {
    None: gateway_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": gateway_pb2.FINISH_REASON_STOP,
    "length": gateway_pb2.FINISH_REASON_LENGTH,
}

Context = Any  # grpc.aio.ServicerContext is generic in the stubs only


class GatewayServicer(gateway_pb2_grpc.GatewayServicer):
    """`stagemesh.v1.Gateway`. `rpc.ErrorInterceptor` turns the errors that it raises into statuses."""

    def __init__(self, engine: Engine, settings: GatewaySettings) -> None:
        self._engine = engine
        self._settings = settings

    async def Generate(
        self, request: gateway_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        """Streams deltas, then one message with the usage. The request ends when the client goes away."""
        self._authorize(context)
        asked = await self._build(request, context.time_remaining())
        stream = self._engine.submit(asked)
        # `finally` would not do: when a call ends while a message waits for its reader, this generator is not resumed.
        context.add_done_callback(lambda _: stream.cancel())
        completion_tokens = 0
        async for batch in stream:
            for delta in batch:
                completion_tokens += len(delta.tokens)
                # This waits while the reader's window is full. The engine merges deltas meanwhile.
                yield _response(asked, delta)
        yield gateway_pb2.GenerateResponse(
            request_id=asked.request_id,
            usage=gateway_pb2.Usage(prompt_tokens=len(asked.prompt), completion_tokens=completion_tokens),
        )

    async def Cancel(self, request: gateway_pb2.CancelRequest, context: Context) -> gateway_pb2.CancelResponse:
        """Ends a request by name. Raises NotFound when it is not running."""
        self._authorize(context)
        if not self._engine.cancel(request.request_id):
            raise errors.NotFound(f"no request {request.request_id!r} is running", param="request_id")
        return gateway_pb2.CancelResponse()

    async def ListModels(
        self, request: gateway_pb2.ListModelsRequest, context: Context
    ) -> gateway_pb2.ListModelsResponse:
        """Lists the served model, if there is one yet."""
        self._authorize(context)
        model = self._engine.model
        if model is None:
            return gateway_pb2.ListModelsResponse()
        card = gateway_pb2.ModelCard(id=model.name, max_model_len=model.max_model_len, created=model.created)
        return gateway_pb2.ListModelsResponse(models=[card])

    async def DescribeMesh(
        self, request: gateway_pb2.GatewayDescribeMeshRequest, context: Context
    ) -> gateway_pb2.GatewayDescribeMeshResponse:
        """The mesh as a message; /mesh shows the same as JSON."""
        self._authorize(context)
        own: Any = self._engine.describe()["gateway"]
        figures = {name: own[name] for name in ("running", "waiting", "free_pages", "total_pages")}
        return gateway_pb2.GatewayDescribeMeshResponse(mesh=self._engine.mesh, **figures)

    def _authorize(self, context: Context) -> None:
        if self._settings.api_key is None:
            return
        told = dict(context.invocation_metadata() or ()).get("authorization", "")
        check_key(told.encode() if isinstance(told, str) else told, self._settings.api_key)

    async def _build(self, request: gateway_pb2.GenerateRequest, remaining_s: float | None) -> GenerationRequest:
        model = served(self._engine, request.model)
        if len(request.request_id) > MAX_REQUEST_ID:
            raise errors.InvalidRequest(f"request_id may have at most {MAX_REQUEST_ID} characters", param="request_id")
        kind = request.WhichOneof("prompt")
        prompt: tuple[int, ...] = ()
        if kind == "text":
            prompt = await encode(model, request.text, add_special_tokens=True)
        elif kind == "token_ids":
            prompt = tuple(request.token_ids.ids)
        elif kind == "chat":
            messages = (ChatMessage(role=m.role, content=m.content) for m in request.chat.messages)
            prompt = await render_chat(model, turns(messages))
        timeout_s = request.timeout_ms / 1000 if request.timeout_ms else None
        if remaining_s is not None:
            if remaining_s <= 0:
                raise errors.DeadlineExceeded("the call's deadline passed before it was read")
            timeout_s = min(remaining_s, timeout_s or remaining_s)
        return build(
            request.request_id or f"grpc-{uuid.uuid4().hex}",
            prompt,
            _params(request, timeout_s),
            model,
            timeout_s=self._settings.request_timeout,
            fill_context=kind == "chat",
        )


def _params(request: gateway_pb2.GenerateRequest, timeout_s: float | None) -> Params:
    given = {field.name: value for field, value in request.ListFields() if field.name in Params.model_fields}
    lists = {"stop": list(request.stop), "stop_token_ids": list(request.stop_token_ids)}
    return parse(Params, {**given, **lists, "timeout": timeout_s})


def _response(asked: GenerationRequest, delta: Delta) -> gateway_pb2.GenerateResponse:
    return gateway_pb2.GenerateResponse(
        request_id=asked.request_id,
        choice=delta.choice,
        text=delta.text,
        token_ids=delta.tokens,
        logprobs=[
            gateway_pb2.TokenLogprobs(
                logprob=entry.logprob,
                top_ids=[token for token, _ in entry.top],
                top_logprobs=[logprob for _, logprob in entry.top],
            )
            for entry in delta.logprobs
        ],
        finish_reason=FINISH[delta.finish_reason],
    )
