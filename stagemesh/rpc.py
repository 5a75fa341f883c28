"""gRPC servers and channels for all services: bounds, health, reflection, and one mapping of errors.

A handler raises an error of `stagemesh.errors`. The interceptor turns it into a gRPC status with a
`google.rpc.ErrorInfo` detail (and `RetryInfo`). `from_rpc_error` makes the same error again on the other side.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from stagemesh import errors
from stagemesh.timing import Timing

log = logging.getLogger(__name__)

DETAILS = "grpc-status-details-bin"
DOMAIN = "stagemesh"
MAX_MESSAGE_BYTES = 16 << 20


@dataclass(frozen=True)
class RpcTiming(Timing):
    """Times of every channel and server."""

    keepalive_s: float = 2.0
    """A connection that is idle for this long is pinged. So a peer that vanished without closing its socket is noticed
    before a request hangs."""
    keepalive_timeout_s: float = 2.0
    """Time within which a ping must be answered."""
    ping_interval_s: float = 1.0
    """The least time between two pings. A server drops peers that ping faster."""
    reconnect_first_s: float = 0.1
    """Pause after the first failed attempt to connect. A restarted peer should be found within a second."""
    reconnect_most_s: float = 1.0
    """The longest pause after later failed attempts."""
    connect_s: float = 2.0
    """The least time that an attempt to connect may take: a handshake is slow on a busy machine."""
    answer_s: float = 2.0
    """Time that a client waits after its request's deadline: the gateway's error says more than the channel's."""

    def relations(self) -> Iterator[tuple[bool, str]]:
        yield self.ping_interval_s <= self.keepalive_s, "ping_interval_s <= keepalive_s: the other side takes the pings"
        yield self.reconnect_first_s <= self.reconnect_most_s, "reconnect_first_s <= reconnect_most_s"


def options(timing: RpcTiming) -> list[tuple[str, Any]]:
    """Returns gRPC's options for a channel or a server."""

    def ms(seconds: float) -> int:
        return int(seconds * 1000)

    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", ms(timing.keepalive_s)),
        ("grpc.keepalive_timeout_ms", ms(timing.keepalive_timeout_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", ms(timing.ping_interval_s)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", ms(timing.ping_interval_s)),
        ("grpc.initial_reconnect_backoff_ms", ms(timing.reconnect_first_s)),
        ("grpc.max_reconnect_backoff_ms", ms(timing.reconnect_most_s)),
        # gRPC takes this as the least time of an attempt, too.
        ("grpc.min_reconnect_backoff_ms", ms(timing.connect_s)),
        # Services on one machine must not share one connection pool with a dead peer's address.
        ("grpc.use_local_subchannel_pool", 1),
        # A port that is in use is an error. Otherwise a second listener would get half of the calls.
        ("grpc.so_reuseport", 0),
    ]


def channel(address: str, timing: RpcTiming = RpcTiming()) -> grpc.aio.Channel:
    """Makes an unencrypted channel to `address` (host:port)."""
    return grpc.aio.insecure_channel(address, options=options(timing))


class Server:
    """A started gRPC server with health and reflection. `set_serving` sets `grpc.health.v1`."""

    def __init__(self, server: grpc.aio.Server, port: int, health_servicer: Any, names: Sequence[str]) -> None:
        self._server = server
        self._health = health_servicer
        self._names = names
        self.port = port

    async def set_serving(self, serving: bool) -> None:
        """Sets the health of the whole server and of each service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Stops accepting at once and cancels calls that still run after `grace_s`."""
        await self._server.stop(grace_s)


async def start_server(
    host: str,
    port: int,
    add: Callable[[grpc.aio.Server], None],
    names: Sequence[str],
    *,
    serving: bool = True,
    timing: RpcTiming = RpcTiming(),
) -> Server:
    """Starts a server on host:port (0: the system chooses) with the servicers that `add` adds.

    `names` are the full names of those services. Raises ConfigError if the port cannot be bound.
    """
    server = grpc.aio.server(options=options(timing), interceptors=[ErrorInterceptor()])
    add(server)
    health_servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    shown = f"[{host}]" if ":" in host else host
    try:
        bound = server.add_insecure_port(f"{shown}:{port}")
    except RuntimeError as e:
        raise errors.ConfigError(
            f"cannot listen on {host}:{port}: the port is in use, or the address is not this machine's; "
            "choose another with --port"
        ) from e
    await server.start()
    made = Server(server, bound, health_servicer, names)
    await made.set_serving(serving)
    return made


def status_of(error: errors.StagemeshError) -> status_pb2.Status:
    """Converts `error` to a google.rpc.Status with details."""
    code = error.grpc_status
    status = status_pb2.Status(code=code.value[0], message=error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    if error.param:
        info.metadata["param"] = error.param
    status.details.add().Pack(info)
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(error.retry_after_s * 1000))
        status.details.add().Pack(retry)
    return status


def from_rpc_error(error: grpc.RpcError) -> errors.StagemeshError:
    """Converts a failed call to our error. A peer that cannot be reached is `Unavailable`."""
    metadata: Any = error.trailing_metadata() or ()
    status = status_pb2.Status.FromString(dict(metadata).get(DETAILS, b""))
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        _ = detail.Unpack(info) or detail.Unpack(retry)
    if not info.reason:
        return errors.by_status(error.code())(error.details() or error.code().name)
    after_s = retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None
    return errors.by_reason(info.reason)(status.message, retry_after_s=after_s, param=info.metadata.get("param"))


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """A context in which a failed call raises its error of `stagemesh.errors`."""
    try:
        yield
    except grpc.RpcError as e:
        raise from_rpc_error(e) from e


@contextlib.asynccontextmanager
async def _with_status(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """A context for a handler. Its errors are sent to the caller as a status with details."""
    try:
        yield
    except (grpc.aio.AbortError, grpc.aio.UsageError):
        raise
    except grpc.aio.BaseError:
        return  # The server was stopped, or the peer went away, so nobody can receive a status.
    except Exception as e:
        error = e
        if not isinstance(error, errors.StagemeshError):
            log.exception("a handler failed", exc_info=error)
            error = errors.InternalError(f"{type(error).__name__}: {error}")
        details = ((DETAILS, status_of(error).SerializeToString()),)
        await context.abort(error.grpc_status, error.message, trailing_metadata=details)


Handler = Any  # grpc.RpcMethodHandler is generic in the stubs only
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Turns errors that handlers raise into gRPC statuses with details. Any other exception is INTERNAL and logged."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wraps the handler that `continuation` finds."""
        handler = await continuation(details)
        if handler is None:
            return handler
        kind = next(kind for kind in KINDS if getattr(handler, kind) is not None)
        inner: Any = getattr(handler, kind)
        if not (inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner)):
            return handler  # Reflection's handlers are plain functions and handle their own errors.

        async def one(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with _with_status(context):
                return await inner(request, context)

        async def many(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            async with _with_status(context):
                async for response in inner(request, context):
                    yield response

        make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            many if kind.endswith("_stream") else one,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
