"""Transports of activations: one interface (`base.py`) and two implementations (`ucx`, `tcp`).

They carry tagged messages of raw bytes between processes. What the messages mean (links, lanes, credits) belongs to the
stage worker.
"""

from __future__ import annotations

from .base import Buffer, Peer, Request, Transport
from .select import open_transport

__all__ = ["Buffer", "Peer", "Request", "Transport", "open_transport"]
