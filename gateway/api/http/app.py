"""The HTTP application: OpenAI's API and the operators' endpoints."""

from __future__ import annotations

from importlib.metadata import version

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from stagemesh.errors import NotFound
from stagemesh.gateway.api.request import Engine, ModelCard
from stagemesh.gateway.api.token_log import TokenLog
from stagemesh.gateway.telemetry.metrics import Metrics
from stagemesh.gateway.telemetry.trace import Recorder
from stagemesh.settings.gateway import GatewaySettings

from ...timing import GatewayTiming
from ..openai.call import Api
from ..openai.chat import ChatCall
from ..openai.completions import CompletionCall
from ..openai.errors import json_response, response_of, shape
from .body import ABORT, abort_of
from .endpoint import Endpoint
from .middleware import RequestMiddleware
from .resume import ResumeEndpoint
from .trace import TraceEndpoint

PARSERS = {"/v1/completions": CompletionCall.parse, "/v1/chat/completions": ChatCall.parse}
"""The endpoints that generate, and how each reads a body."""


class App(Starlette):
    """Starlette that keeps in the scope how to drop the connection. No layer has wrapped `send` yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "http":
            scope[ABORT] = abort_of(send)
        await super().__call__(scope, receive, send)


def build_app(
    engine: Engine,
    settings: GatewaySettings,
    metrics: Metrics,
    timing: GatewayTiming,
    recorder: Recorder | None = None,
) -> Starlette:
    """The application over `engine`. With a recorder it has /trace."""
    token_log = TokenLog(settings.token_log, timing) if settings.token_log else None
    api = Api(engine, settings, metrics, timing, token_log)
    get = Handlers(api)
    routes = [
        Route("/v1/models", get.models),
        Route("/v1/models/{name:path}", get.model),
        *(Route(path, Endpoint(api, parse, path), methods=["POST"]) for path, parse in PARSERS.items()),
        Route("/health", get.ready),
        Route("/readyz", get.ready),
        Route("/livez", get.live),
        Route("/mesh", get.mesh),
        Route("/metrics", get.metrics),
        Route("/version", get.version),
    ]
    if api.token_log is not None:
        routes.append(Route("/v1/streams/{id}", ResumeEndpoint(api, PARSERS), methods=["GET"]))
    if recorder is not None:
        routes.append(Route("/trace", TraceEndpoint(recorder), methods=["POST"]))
    return App(
        routes=routes,
        middleware=[Middleware(RequestMiddleware, metrics=metrics, api_key=settings.api_key)],
        exception_handlers={HTTPException: _http_error, 500: _server_error},
    )


class Handlers:
    """The endpoints that do not generate."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        model = self._api.engine.model
        return json_response({"object": "list", "data": [] if model is None else [_card(model)]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        name, model = request.path_params["name"], self._api.engine.model
        if model is None or model.name != name:
            return response_of(NotFound(f"the model {name!r} does not exist", param="model"))
        return json_response(_card(model))

    async def ready(self, request: Request) -> Response:
        """GET /health and /readyz: 503 with the reason, until a token has crossed all stages and while no pipeline
        serves."""
        ready, reason = self._api.engine.ready()
        if ready:
            return json_response({"status": "ready"})
        return json_response({"status": "unavailable", "reason": reason}, 503, {"retry-after": "1"})

    async def live(self, request: Request) -> Response:
        """GET /livez: any answer shows that the process makes progress."""
        return json_response({"status": "alive"})

    async def mesh(self, request: Request) -> Response:
        """GET /mesh."""
        return json_response(self._api.engine.describe())

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(generate_latest(self._api.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def version(self, request: Request) -> Response:
        """GET /version."""
        return json_response({"version": version("stagemesh")})


def _card(model: ModelCard) -> dict[str, object]:
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
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {request.method} {request.url.path} here"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    return json_response(shape(message, error.status_code, None, None), error.status_code, dict(error.headers or {}))


async def _server_error(request: Request, error: Exception) -> Response:
    """The error of a bug, in OpenAI's format. Starlette raises it again afterwards, so that it is logged."""
    return json_response(shape(f"{type(error).__name__}: {error}", 500, None, "internal"), 500)
