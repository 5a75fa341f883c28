"""The activation plane's transports: one contract (`base`), three that keep it (`ucx`, `tcp`, `inproc`)."""

from __future__ import annotations

from .base import Buffer, Peer, Request, Transport
from .select import available_transports, open_transport

__all__ = ["Buffer", "Peer", "Request", "Transport", "available_transports", "open_transport"]
