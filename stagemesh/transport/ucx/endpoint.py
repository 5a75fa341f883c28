"""One UCX endpoint: its users, the route of its bytes, and whether the process behind it lives."""

from __future__ import annotations

import ctypes
import os
import re
import select
from collections.abc import Callable
from typing import Any

from stagemesh.errors import TransportError

from ..base import Buffer
from .identity import ProcessIdentity
from .worker import UcxRequest, UcxWorker

_CLOSE_PERIOD_NS = 10_000_000
_SHARED_MEMORY = {"posix", "sysv", "cma", "xpmem", "knem", "mm", "self"}


class Endpoint:
    """The endpoint to one remote worker, shared by all peers with that address.

    UCX pairs the endpoints of two workers in the order in which each side made them, and fails one half of a pair when
    the other half is closed. With one endpoint per link, closing a link could break another one. On one host, the
    endpoint is kept as long as the peer's process runs, even without a link: the other side may already make the next
    link on its half. Between hosts, it is closed with its last user: after a network cut, a new connection works sooner
    than an old one recovers.
    """

    def __init__(
        self,
        worker: UcxWorker,
        identity: ProcessIdentity,
        ucx_address: bytes,
        own: ProcessIdentity,
        deaths: select.epoll,
        on_gone: Callable[[], None],
    ) -> None:
        """Makes the endpoint, and watches the peer's process if it is on this host.

        Args:
            deaths: epoll that gets a pidfd of that process, which is readable when the process has ended.
            on_gone: function to call when the peer is gone. The peer may have ended during a send.

        Raises:
            TransportError: UCX cannot make it, or the process has ended.
        """
        self._worker, self._deaths, self.on_gone = worker, deaths, on_gone
        self.pidfd = identity.watch(own)
        try:
            self.raw: Any = worker.endpoint(ucx_address)
        except TransportError:
            if self.pidfd is not None:
                os.close(self.pidfd)
            raise
        if self.pidfd is not None:
            deaths.register(self.pidfd, select.EPOLLIN)
        self._kept = self.pidfd is not None and identity.shares_network
        self.users: set[UcxPeer] = set()
        self._closed = False

    @property
    def alive(self) -> bool:
        """Whether it is neither closed nor failed."""
        return not self._closed and bool(self.raw.alive)

    @property
    def why(self) -> str:
        """UCX's reason for a failure, in brackets, or an empty string."""
        try:
            self.raw.raise_on_error()
        except self._worker.lib.UCXError as error:
            return f" ({error})"
        return ""

    def release(self, peer: UcxPeer) -> None:
        """Removes a user. The last one may close the endpoint."""
        self.users.discard(peer)
        if not self.users and not (self._kept and self.alive):
            self.close()

    def died(self) -> None:
        """Fails all users, because the peer's process has ended."""
        for peer in list(self.users):
            peer.fail(TransportError("the peer process has ended"))
        self.close()
        self.on_gone()

    def close(self) -> None:
        """Closes the endpoint and all its users."""
        for peer in list(self.users):
            if peer.error is None:
                peer.close()
        if self._closed:
            return
        if self.alive:
            # A forced close ends pending requests, even a rendezvous with a dead peer, which `close` would leave open.
            # It takes microseconds.
            self.raw.close_blocking(_CLOSE_PERIOD_NS, 1)
        self._closed = True
        if self.pidfd is not None:
            if not self._deaths.closed:
                self._deaths.unregister(self.pidfd)
            os.close(self.pidfd)


class UcxPeer:
    """A `Peer` over UCX."""

    def __init__(self, worker: UcxWorker, endpoint: Endpoint) -> None:
        self._worker = worker
        self._endpoint: Endpoint | None = endpoint
        endpoint.users.add(self)
        self._error: TransportError | None = None
        self._route = "unknown"

    @property
    def error(self) -> TransportError | None:
        if self._error is None and self._endpoint is not None and not self._endpoint.alive:
            endpoint = self._endpoint
            self.fail(TransportError(f"the peer is gone: its UCX endpoint failed{endpoint.why}"))
            endpoint.on_gone()
        return self._error

    @property
    def route(self) -> str:
        if self._endpoint is not None and self.error is None:
            self._route = endpoint_route(self._endpoint.raw.handle)
        return self._route

    def send(self, tag: int, buffer: Buffer) -> UcxRequest:
        if self.error is not None or self._endpoint is None:
            raise self._error or TransportError("this peer was closed")
        return self._worker.send(self._endpoint.raw, tag, buffer)

    def close(self) -> None:
        self.fail(TransportError("this peer was closed"))

    def fail(self, error: TransportError) -> None:
        """Ends this peer with an error."""
        self._error = self._error or error
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            endpoint.release(self)


def endpoint_route(handle: int) -> str:
    """Returns the transports that UCX chose for the messages sent so far, from its description of the endpoint.

    The description has one table for each kind of message that was sent ("tagged message by ... from host memory"). Its
    last column names transport and device of each size range. Before the first message there is no table.
    """
    text = _describe(handle)
    used = {match.group(1) for match in re.finditer(r"\|\s*(\w+)/[\w:.-]+\s*\|\s*$", text, re.MULTILINE)}
    if not used:
        return "unknown"
    return "+".join(sorted({"shared memory" if name in _SHARED_MEMORY else name for name in used}))


def _describe(handle: int) -> str:
    """Returns UCX's description of an endpoint. The loader returns the libucp that ucxx has already loaded."""
    libc = ctypes.CDLL(None)
    libc.open_memstream.restype = ctypes.c_void_p
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
    ctypes.CDLL("libucp.so.0").ucp_ep_print_info(ctypes.c_void_p(handle), stream)
    libc.fclose(stream)
    try:
        return ctypes.string_at(text, size.value).decode(errors="replace")
    finally:
        libc.free(text)
