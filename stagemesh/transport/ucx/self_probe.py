"""Whether other processes of this host still reach a UCX worker through shared memory.

All senders of a host share one queue of the receiver. UCX's sender takes an element of it, copies its message there,
then marks it as written; one that is killed between the two (most likely while it is descheduled in the copy) leaves an
element that is never marked, and the receiver waits before it for ever: deaf to everyone, not only to the dead. UCX has
no call that tells. So the worker is sent a message, by another worker of the same process that knows no other way than
shared memory: it comes within microseconds, or never.
"""

from __future__ import annotations

import logging
import os
import re
import time
from typing import Any

from stagemesh.errors import TransportError

from ..timing import TransportTiming
from .worker import UcxRequest, UcxWorker

log = logging.getLogger(__name__)

_SHARED_QUEUE = re.compile(r"\s(posix|sysv|xpmem)/")
_CLOSE_PERIOD_NS = 10_000_000


class SelfProbe:
    """Asks, when told to, whether `receiver` still hears.

    Args:
        config: UCX's options of that worker.
    """

    def __init__(self, receiver: UcxWorker, config: dict[str, str], timing: TransportTiming) -> None:
        self._receiver, self._timing = receiver, timing
        self._tag = int.from_bytes(os.urandom(8), "little")
        self._request: UcxRequest | None = None
        self._waited_s = self._looked_at = 0.0
        self._sender: UcxWorker | None = None
        self._endpoint: Any = None
        shared = ",".join(sorted(set(_SHARED_QUEUE.findall(receiver.resources))))
        if not shared:
            return  # nobody else writes into this process's memory
        try:
            self._sender = UcxWorker({**config, "TLS": shared}, wakeup=False)
            self._endpoint = self._sender.endpoint(receiver.address)
        except TransportError as e:
            self._sender = None
            log.warning("whether this process still hears through shared memory cannot be asked: %s", e)

    def ask(self) -> None:
        """Sends a message; `progress` looks for it. Also behind one that is under way: that may be in front of what
        this one is about. The queue keeps the order, so the newest alone is waited for."""
        if self._sender is None:
            return
        self._request = self._receiver.recv(self._tag, bytearray(8))
        self._waited_s, self._looked_at = 0.0, time.monotonic()
        self._sender.send(self._endpoint, self._tag, bytearray(8))

    def progress(self) -> None:
        """Call with the receiver's own `progress`. Raises TransportError once it is known to be deaf."""
        if self._request is None or self._sender is None:
            return
        self._sender.progress()
        if self._request.done:
            self._request = None
            self._sender.sweep()
            return
        now = time.monotonic()
        self._waited_s += min(now - self._looked_at, self._timing.self_probe_look_s)
        self._looked_at = now
        if self._waited_s > self._timing.self_probe_s:
            raise TransportError(
                f"UCX hears nothing through shared memory for {self._timing.self_probe_s:g} s: a peer process ended, "
                "or was stopped, in the middle of a send, and its half message blocks the queue for all; only a new "
                "process helps"
            )

    def close(self) -> None:
        """Before the receiver is closed."""
        if self._sender is not None:
            if self._endpoint.alive:
                self._endpoint.close_blocking(_CLOSE_PERIOD_NS, 1)
            self._sender.close()
        self._endpoint = self._sender = self._request = None
