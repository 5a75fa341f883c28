"""The HTTP application: OpenAI's API and the operators' endpoints."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from stagemesh.errors import InternalError, NotFound, StagemeshError
from stagemesh.gateway.api.request import Engine, ServedModel
from stagemesh.gateway.api.token_log import TokenLog
from stagemesh.gateway.telemetry.metrics import Metrics
from stagemesh.gateway.telemetry.trace import Recorder
from stagemesh.settings.gateway import GatewaySettings

from ...timing import GatewayTiming
from ..openai.call import Api, Call
from ..openai.chat import ChatCall
from ..openai.completions import CompletionCall
from ..openai.errors import response_of, shape
from .endpoint import Endpoint, begin_new
from .middleware import RequestMiddleware
from .resume import begin_resumed
from .trace import trace

CALLS: dict[str, type[Call[Any]]] = {"/v1/completions": CompletionCall, "/v1/chat/completions": ChatCall}
"""The endpoints that generate."""


def build_app(
    engine: Engine, settings: GatewaySettings, metrics: Metrics, timing: GatewayTiming, recorder: Recorder
) -> ASGIApp:
    """The application over `engine`."""
    token_log = TokenLog(settings.token_log, timing) if settings.token_log else None
    api = Api(engine, settings, metrics, timing, token_log)
    get = Handlers(api)
    routes = [
        Route("/v1/models", get.models),
        Route("/v1/models/{name:path}", get.model),
        *(Route(path, Endpoint(api, begin_new(kind)), methods=["POST"]) for path, kind in CALLS.items()),
        Route("/health", get.ready),
        Route("/readyz", get.ready),
        Route("/livez", get.live),
        Route("/mesh", get.mesh),
        Route("/metrics", get.metrics),
        Route("/version", get.version),
        Route("/trace", trace(recorder), methods=["POST"]),
    ]
    if api.token_log is not None:
        routes.append(Route("/v1/streams/{id}", Endpoint(api, begin_resumed(CALLS)), methods=["GET"]))
    handlers = {HTTPException: _http_error, StagemeshError: _error, ClientDisconnect: _gone, 500: _error}
    return RequestMiddleware(Starlette(routes=routes, exception_handlers=handlers), metrics, settings.api_key)


class Handlers:
    """The endpoints that do not generate."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        model = self._api.engine.model
        return JSONResponse({"object": "list", "data": [] if model is None else [_card(model)]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        name, model = request.path_params["name"], self._api.engine.model
        if model is None or model.name != name:
            raise NotFound(f"the model {name!r} does not exist", param="model")
        return JSONResponse(_card(model))

    async def ready(self, request: Request) -> Response:
        """GET /health and /readyz: 503 with the reason, until a token has crossed all stages and while no pipeline
        serves."""
        ready, reason = self._api.engine.ready()
        if ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "unavailable", "reason": reason}, 503, {"retry-after": "1"})

    async def live(self, request: Request) -> Response:
        """GET /livez: any answer shows that the process makes progress."""
        return JSONResponse({"status": "alive"})

    async def mesh(self, request: Request) -> Response:
        """GET /mesh."""
        return JSONResponse(self._api.engine.describe())

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(generate_latest(self._api.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def version(self, request: Request) -> Response:
        """GET /version."""
        return JSONResponse({"version": version("stagemesh")})


def _card(model: ServedModel) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "stagemesh",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
    }


async def _http_error(request: Request, error: Exception) -> Response:
    """The error of an unknown path or method, in OpenAI's format."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {request.method} {request.url.path} here",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    return JSONResponse(shape(message, error.status_code, None, None), error.status_code, error.headers)


async def _error(request: Request, error: Exception) -> Response:
    """A StagemeshError gets its own response, any other error an InternalError's; Starlette then raises it again."""
    return response_of(
        error if isinstance(error, StagemeshError) else InternalError(f"{type(error).__name__}: {error}")
    )


async def _gone(request: Request, error: Exception) -> Response:
    """The response after the client has gone. No one reads it."""
    return Response(status_code=499)
