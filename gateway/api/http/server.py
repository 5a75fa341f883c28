"""The HTTP server: uvicorn on a socket that is already bound."""

from __future__ import annotations

import contextlib
import socket

import uvicorn
from starlette.types import ASGIApp

from stagemesh.errors import ConfigError

from ...timing import GatewayTiming

BACKLOG = 1024


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, since the gateway stops its parts in its own order.

    Set `should_exit` to end it.
    """

    def __init__(self, app: ASGIApp, timing: GatewayTiming) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=timing.keep_alive_s,  # type: ignore[arg-type]  # used as seconds of a timer
            timeout_graceful_shutdown=timing.http_stop_s,  # type: ignore[arg-type]
        )
        super().__init__(config)

    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Captures no signals."""
        return contextlib.nullcontext()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError when the port is in use or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=host == "::")
    except OSError as e:
        raise ConfigError(f"cannot listen on {host}:{port}: {e.strerror}; choose another with --port") from e
    sock.setblocking(False)
    return sock
