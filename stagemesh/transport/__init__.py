"""The activation plane's transports: one contract (`base.py`), three that keep it (`ucx`, `tcp`, `inproc.py`).

Tagged messages of raw bytes between processes belong here. What they mean (links, lanes, credits) is the stage
worker's.
"""

from __future__ import annotations

from .base import Buffer, Peer, Request, Transport
from .select import open_transport

__all__ = ["Buffer", "Peer", "Request", "Transport", "open_transport"]
