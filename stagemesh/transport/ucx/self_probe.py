"""Finds out whether other processes of this host still reach a UCX worker through shared memory.

All senders of a host share one queue of the receiver. A sender takes an element of the queue, copies its message there,
and marks the element as written. A sender that is killed before the mark leaves an element that is never marked. The
receiver waits for it for ever, and gets no further message from any sender. UCX has no call that reports this state. So
another worker of the same process, which only uses shared memory, sends a message to the receiver. It arrives within
microseconds or never.
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
    """Probes `receiver` on request.

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
            return  # No other process writes into this one's memory.
        try:
            self._sender = UcxWorker({**config, "TLS": shared}, wakeup=False)
            self._endpoint = self._sender.endpoint(receiver.address)
        except TransportError as e:
            self._sender = None
            log.warning("whether messages arrive through shared memory cannot be checked: %s", e)

    def ask(self) -> None:
        """Sends a message, for which `progress` then waits.

        An earlier message does not count: it may be before the blocked element. The queue keeps the order, so only the
        newest message matters.
        """
        if self._sender is None:
            return
        self._request = self._receiver.recv(self._tag, bytearray(8))
        self._waited_s, self._looked_at = 0.0, time.monotonic()
        self._sender.send(self._endpoint, self._tag, bytearray(8))

    def progress(self) -> None:
        """Checks for the message. Call it with the receiver's `progress`.

        Raises TransportError if the queue is blocked.
        """
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
        """Frees the second worker. Call it before the receiver is closed."""
        if self._sender is not None:
            if self._endpoint.alive:
                self._endpoint.close_blocking(_CLOSE_PERIOD_NS, 1)
            self._sender.close()
        self._endpoint = self._sender = self._request = None
