"""Opens a transport by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal, TypeAlias

from stagemesh.errors import ConfigError, TransportError

from .base import Transport
from .tcp.transport import TcpTransport
from .timing import TransportTiming
from .ucx.transport import UcxTransport

log = logging.getLogger(__name__)

TransportName: TypeAlias = Literal["auto", "ucx", "tcp"]


def open_transport(
    name: TransportName | str = "auto",
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    advertise: str | None = None,
    device: str = "cpu",
    ucx_options: Mapping[str, str] | None = None,
    timing: TransportTiming = TransportTiming(),
) -> Transport:
    """Open a transport. "auto" is UCX; where UCX cannot be opened, TCP, with a warning that says why.

    Args:
        name: "auto", "ucx" or "tcp".
        host: address to bind (TCP only; UCX takes its network devices from `ucx_options["NET_DEVICES"]`).
        port: port to bind (TCP only); 0 asks the system for a free one.
        advertise: host that other workers connect to (TCP only); the bound address when None.
        device: "cpu" or "cuda": where the activations live; chooses UCX's thresholds.
        ucx_options: UCX's own settings without the `UCX_` prefix, e.g. `{"TLS": "tcp", "NET_DEVICES": "eth0"}`.
        timing: what the transport waits for, and how long.

    Raises:
        ConfigError: no transport has this name.
        TransportError: the transport cannot be opened; the text says why.
    """
    if name in ("auto", "ucx"):
        try:
            return UcxTransport(ucx_options, device=device, timing=timing)
        except TransportError as error:
            if name == "ucx":
                raise
            log.warning("activations go over TCP, not UCX: %s", error)
            name = "tcp"
    if name == "tcp":
        return TcpTransport(host, port, advertise=advertise, timing=timing)
    raise ConfigError(f"no transport is called {name!r}; there are auto, ucx and tcp")
