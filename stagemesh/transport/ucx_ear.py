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
from typing import TYPE_CHECKING

from stagemesh.errors import TransportError

from .ucx_peer import Endpoint

if TYPE_CHECKING:
    from .ucx import UcxRequest, UcxTransport

log = logging.getLogger(__name__)

HEARS_S = 0.5
"""How long a message to oneself may take. A sender that lives and was descheduled in its copy holds all up, too."""
LOOK_S = 0.05
"""Between two calls of `progress` no more than this counts: nobody ran, or this process computed meanwhile."""

_SHARED_QUEUE = re.compile(r"\s(posix|sysv|xpmem)/")


class Ear:
    """Asks, when told to, whether `transport`, whose worker has the address `ucx_address`, still hears.

    Args:
        config: UCX's options of that worker.
        resources: what its context says of itself (`info`): the ways that it has.
    """

    def __init__(self, transport: UcxTransport, ucx_address: bytes, config: dict[str, str], resources: str) -> None:
        self._transport = transport
        self._tag = int.from_bytes(os.urandom(8), "little")
        self._request: UcxRequest | None = None
        self._waited_s = self._looked_at = 0.0
        lib = transport.lib
        self._endpoint: Endpoint | None = None
        shared = ",".join(sorted(set(_SHARED_QUEUE.findall(resources))))
        if not shared:
            return  # nobody else writes into this process's memory
        try:
            self._context = lib.UCXContext(config_dict={**config, "TLS": shared}, feature_flags=(lib.Feature.TAG,))
            self._worker = lib.UCXWorker(self._context)
            address = lib.UCXAddress.create_from_buffer(bytearray(ucx_address))
            raw = lib.UCXEndpoint.create_from_worker_address(self._worker, address, True)
        except lib.UCXError as e:
            log.warning("whether this process still hears through shared memory cannot be asked: %s", e)
            return
        self._endpoint = Endpoint(transport, raw)

    def ask(self) -> None:
        """Sends a message; `progress` looks for it. Also behind one that is under way: that may be in front of what
        this one is about. The queue keeps the order, so the newest alone is waited for."""
        if self._endpoint is None:
            return
        self._request = self._transport.recv(self._tag, bytearray(8))
        self._waited_s, self._looked_at = 0.0, time.monotonic()
        payload = bytearray(8)
        array, nbytes = self._transport.array(payload, writable=False)
        self._transport.track(
            self._endpoint.raw.tag_send(array, self._transport.tag(self._tag)), (array, payload), nbytes, None
        )

    def progress(self) -> None:
        """Call with the transport's own `progress`. Raises TransportError once it is known to be deaf."""
        if self._request is None:
            return
        self._worker.progress_once()
        if self._request.done:
            self._request = None
            return
        now = time.monotonic()
        self._waited_s += min(now - self._looked_at, LOOK_S)
        self._looked_at = now
        if self._waited_s > HEARS_S:
            raise TransportError(
                f"UCX hears nothing through shared memory for {HEARS_S:g} s: a peer process ended, or was stopped, in "
                "the middle of a send, and its half message blocks the queue for all; only a new process helps"
            )

    def close(self) -> None:
        """Before the transport's own worker is closed."""
        if self._endpoint is not None:
            self._endpoint.close()
        self._endpoint = self._request = None
