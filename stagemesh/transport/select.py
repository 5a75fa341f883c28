"""Opens a transport by name."""

from __future__ import annotations

from collections.abc import Mapping

from stagemesh.errors import ConfigError

from .base import Transport
from .tcp.transport import TcpTransport
from .timing import TransportTiming
from .ucx.transport import UcxTransport


def open_transport(
    name: str,
    *,
    host: str = "127.0.0.1",
    advertise: str | None = None,
    device: str = "cpu",
    ucx_options: Mapping[str, str] | None = None,
    timing: TransportTiming = TransportTiming(),
) -> Transport:
    """Opens a transport.

    Args:
        name: "ucx" or "tcp".
        host: address to bind (TCP only; UCX takes its network devices from `ucx_options["NET_DEVICES"]`).
        advertise: host that other workers connect to (TCP only); the bound address when None.
        device: device of the activations, "cpu" or "cuda". It decides UCX's thresholds.
        ucx_options: UCX's own settings without the `UCX_` prefix, e.g. `{"TLS": "tcp", "NET_DEVICES": "eth0"}`.
        timing: the transport's times.

    Raises:
        ConfigError: no transport has this name.
        TransportError: the transport cannot be opened; the text says why.
    """
    if name == "ucx":
        return UcxTransport(ucx_options, device=device, timing=timing)
    if name == "tcp":
        return TcpTransport(host, advertise=advertise, timing=timing)
    raise ConfigError(f"no transport is called {name!r}; there are ucx and tcp")
