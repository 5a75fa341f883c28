"""`stagemesh gateway`: the HTTP and gRPC front ends over one engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from pathlib import Path

import uvloop

from stagemesh import process, rpc
from stagemesh.hub.reference import parse
from stagemesh.protos.v1 import gateway_pb2, gateway_pb2_grpc
from stagemesh.settings.gateway import GatewaySettings

from .api.grpc_api import GatewayServicer
from .api.http.app import build_app
from .api.http.server import HttpServer, bind
from .engine import MeshEngine
from .telemetry.metrics import Metrics
from .timing import GatewayTiming

log = logging.getLogger(__name__)

SERVICE_NAME = gateway_pb2.DESCRIPTOR.services_by_name["Gateway"].full_name


def run(settings: GatewaySettings, ready_fd: int | None = None) -> int:
    """Runs one gateway until SIGTERM or SIGINT. Returns the exit status.

    Raises ConfigError when it cannot listen, and CheckpointError when the tokenizer cannot be read.
    """
    process.set_title("gateway")
    process.set_up_logging("gateway")
    return uvloop.run(_run(settings, ready_fd))


async def _run(settings: GatewaySettings, ready_fd: int | None) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop.set)
    timing = GatewayTiming().scaled(settings.time_scale)
    metrics = Metrics()
    engine = MeshEngine(settings, metrics, timing)
    if settings.model is not None:
        await engine.read_checkpoint(parse(settings.model, settings.revision) or Path(settings.model))
    listener = bind(settings.host, settings.port)
    grpc_server = await rpc.start_server(
        settings.host,
        settings.grpc_port,
        lambda s: gateway_pb2_grpc.add_GatewayServicer_to_server(GatewayServicer(engine, settings), s),
        [SERVICE_NAME],
        serving=False,
    )
    http = HttpServer(build_app(engine, settings, metrics, timing, engine.recorder), timing)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    following = engine.start()
    port = listener.getsockname()[1]
    process.tell_ready(ready_fd, port=port, grpc_port=grpc_server.port)
    log.info("HTTP on %s:%d, gRPC on %s:%d", settings.host, port, settings.host, grpc_server.port)
    health = asyncio.create_task(_tell_health(engine, grpc_server, timing.health_look_s))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([stopped, serving, following], return_when=asyncio.FIRST_COMPLETED)
    health.cancel()
    await grpc_server.set_serving(False)
    await engine.stop(settings.drain_timeout)
    http.should_exit = True
    await asyncio.gather(serving, grpc_server.stop(timing.grpc_stop_s))
    with contextlib.suppress(asyncio.CancelledError):
        following.result()  # Raises the error that ended it, if one did.
    return 0


async def _tell_health(engine: MeshEngine, server: rpc.Server, look_s: float) -> None:
    """Keeps grpc.health.v1 equal to /health."""
    told: bool | None = None
    while True:
        ready, _ = engine.ready()
        if ready is not told:
            told = ready
            await server.set_serving(ready)
        await asyncio.sleep(look_s)
