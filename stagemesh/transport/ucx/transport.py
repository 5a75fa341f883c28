"""The UCX transport: endpoints, the processes behind them, and late messages."""

from __future__ import annotations

import atexit
import os
import select
from collections.abc import Mapping
from weakref import WeakSet

from stagemesh.errors import TransportError

from ..base import FENCES, Buffer
from ..timing import TransportTiming
from .endpoint import Endpoint, UcxPeer
from .identity import ProcessIdentity, pack_address, unpack_address
from .self_probe import SelfProbe
from .worker import UcxRequest, UcxWorker

DEFAULTS = {"MM_ERROR_HANDLING": "y", "KEEPALIVE_INTERVAL": "1s", "TCP_CONN_NB": "y"}

HOST_DEFAULTS = {**DEFAULTS, "RNDV_THRESH": "262144"}
"""Options for host memory. A message below 256 KiB is sent eagerly, so a sender that computes need not progress it."""

CUDA_DEFAULTS = {**DEFAULTS, "RNDV_THRESH": "8192"}
"""Options for CUDA memory. It is sent by rendezvous, so that cuda_ipc moves it without a copy through host memory."""

_WATCH_EVERY = 64
"""Number of `progress` calls between two checks for ended processes and late messages."""
_IDLE_ARMS = 16

_open: WeakSet[UcxTransport] = WeakSet()


@atexit.register
def _close_all() -> None:
    """Closes all transports before the interpreter ends: see `UcxTransport.__del__`."""
    for transport in list(_open):
        transport.close()


class UcxTransport:
    """A `Transport` over UCX.

    `options` are UCX's options without the `UCX_` prefix: `{"TLS": "tcp", "NET_DEVICES": "eth0"}`. They
    override `UCX_*` in the environment, which overrides the defaults above.

    Raises:
        TransportError: ucxx is missing, or UCX cannot be initialised with these options.
    """

    name = "ucx"

    def __init__(
        self,
        options: Mapping[str, str] | None = None,
        *,
        device: str = "cpu",
        timing: TransportTiming = TransportTiming(),
    ) -> None:
        self._timing = timing
        defaults = CUDA_DEFAULTS if device.startswith("cuda") else HOST_DEFAULTS
        self._config = {key: value for key, value in defaults.items() if f"UCX_{key}" not in os.environ}
        self._config.update(options or {})
        self._worker = UcxWorker(self._config)
        self._self_probe: SelfProbe | None = None
        self._identity = ProcessIdentity.own()
        self._endpoints: dict[bytes, Endpoint] = {}
        self._fences: list[tuple[int, int]] = []
        self._deaths = select.epoll()
        self._events = select.poll()
        self._events.register(self._worker.fd, select.POLLIN)
        self._idle_arms = 0  # Since something last happened.
        self._calls = 0
        self.late_count = 0
        self._closed = False
        _open.add(self)

    def __del__(self) -> None:
        # UCX's destructors may wait for peers for ever if they run in the wrong order.
        if not getattr(self, "_closed", True):
            self.close()

    def address(self) -> bytes:
        return pack_address(self._identity, self._worker.address)

    def connect(self, address: bytes, *, timeout_s: float | None = None) -> UcxPeer:
        identity, ucx_address = unpack_address(address)
        for key, endpoint in list(self._endpoints.items()):
            if not endpoint.alive:
                endpoint.close()
                del self._endpoints[key]
        if ucx_address not in self._endpoints:
            own, deaths = self._identity, self._deaths
            try:
                made = Endpoint(self._worker, identity, ucx_address, own, deaths, self.doubt)
            except TransportError:
                self.doubt()  # The process may have ended during a send.
                raise
            self._endpoints[ucx_address] = made
        return UcxPeer(self._worker, self._endpoints[ucx_address])

    def recv(self, tag: int, buffer: Buffer) -> UcxRequest:
        return self._worker.recv(tag, buffer)

    def probe(self, tag: int) -> bool:
        return self._worker.probe(tag)

    def discard(self, tag: int, mask: int, *, forever: bool = False) -> int:
        if forever:
            self._fences = [*self._fences[1 - FENCES :], (tag, mask)]
        return self._worker.discard(tag, mask)

    def progress(self) -> bool:
        happened = self._worker.progress()
        if happened:
            self._idle_arms = 0
        if self._self_probe is not None:
            self._self_probe.progress()
        self._calls += 1
        if self._calls % _WATCH_EVERY == 0:
            self._worker.sweep()
            return self._watch() or happened
        return happened

    def fds(self) -> list[tuple[int, int]]:
        return [(self._worker.fd, select.POLLIN), (self._deaths.fileno(), select.POLLIN)]

    def arm(self) -> bool:
        if self._watch() or not self._worker.arm():
            return False
        self._idle_arms += 1
        if self._idle_arms > _IDLE_ARMS and self._events.poll(0):
            # The descriptor stays readable until a TCP peer has accepted.
            self._deaths.poll(self._timing.unready_sleep_s)
        return True

    def doubt(self) -> None:
        if self._closed:
            return
        if self._self_probe is None:
            self._self_probe = SelfProbe(self._worker, self._config, self._timing)
        self._self_probe.ask()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        if self._self_probe is not None:
            self._self_probe.close()
            self._self_probe = None
        for endpoint in self._endpoints.values():
            endpoint.close()
        self._worker.close()
        self._deaths.close()
        self._endpoints.clear()

    def _watch(self) -> bool:
        """Fails the endpoints of ended processes, and drops late messages. Returns whether a process has ended."""
        for value, mask in self._fences:
            self.late_count += self._worker.discard(value, mask)
        ended = {fd for fd, _ in self._deaths.poll(0)}
        for endpoint in list(self._endpoints.values()) if ended else ():
            if endpoint.pidfd in ended:
                endpoint.died()
        return bool(ended)
