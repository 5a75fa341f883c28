"""The TCP transport: a listener, and connections in both directions.

A `Peer` is one outgoing connection, on which frames go one way. The address contains a secret, and is sent by gRPC. A
connection that does not begin with the secret is refused before any of its frames is read. Bodies are read directly
into posted buffers. Unexpected bodies are kept up to a bound. Above it, a socket is not read until a receive is posted.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time

from stagemesh.errors import TransportError

from ..base import Buffer, recv_view
from ..mailbox import HostRequest, Mailbox
from ..timing import TransportTiming
from . import frame
from .inbound import Inbound
from .outbound import Outbound

log = logging.getLogger(__name__)

_MAX_UNAUTHENTICATED = 64
_CHECK_EVERY = 256
"""Number of `progress` calls between two checks of deadlines."""


class TcpTransport:
    """A `Transport` over TCP.

    Args:
        host: address to bind, numeric or a name.
        port: port to bind; 0 asks the system for a free one.
        advertise: host that others connect to; the bound address when None.
        max_frame_bytes: largest frame. A larger one is refused, and its connection closed.
        max_unexpected_bytes: bound of the memory for unexpected frames, over all connections.

    Raises:
        TransportError: the address cannot be bound.
    """

    name = "tcp"

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        advertise: str | None = None,
        max_frame_bytes: int = frame.MAX_FRAME_BYTES,
        max_unexpected_bytes: int = 1 << 26,
        timing: TransportTiming = TransportTiming(),
    ) -> None:
        self._timing = timing
        self._max_frame_bytes, self._max_unexpected_bytes = max_frame_bytes, max_unexpected_bytes
        self._secret = os.urandom(frame.SECRET_BYTES)
        try:
            family, _, _, _, sockaddr = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._listener = socket.create_server(sockaddr[:2], family=family, backlog=128)
        except OSError as error:
            raise TransportError(f"cannot listen for activations on {host}:{port}: {error}") from error
        self._listener.setblocking(False)
        bound_host, self.port = self._listener.getsockname()[:2]
        self.host = advertise or str(bound_host)
        self._epoll = select.epoll()
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._inbound: dict[int, Inbound] = {}
        self._outbound: dict[int, Outbound] = {}
        self._mailbox: Mailbox[bytearray] = Mailbox()
        self._waiting: list[Inbound] = []  # Connections with a frame that waits for memory.
        self.refused_count = 0
        self._calls = 0
        self._closed = False

    def address(self) -> bytes:
        return frame.pack_address(self.host, self.port, self._secret)

    def connect(self, address: bytes, *, timeout_s: float | None = None) -> Outbound:
        host, port, secret = frame.unpack_address(address)
        within_s = self._timing.connect_s if timeout_s is None else timeout_s
        peer = Outbound(host, port, secret, self._epoll, within_s)
        if peer.error is None:
            self._outbound[peer.fd] = peer
        return peer

    def recv(self, tag: int, buffer: Buffer) -> HostRequest:
        request = HostRequest(*recv_view(buffer))
        message = self._mailbox.post(tag, request)
        if message is not None:
            request.take(tag, message)
        if self._waiting:
            self._resume()
        return request

    def probe(self, tag: int) -> bool:
        return self._mailbox.has(tag) or any(c.tag == tag for c in self._inbound.values() if c.unexpected)

    def discard(self, tag: int, mask: int, *, forever: bool = False) -> int:
        count = len(self._mailbox.discard(tag, mask, forever))
        for connection in self._inbound.values():
            if connection.unexpected and (connection.tag ^ tag) & mask == 0:
                connection.drop_frame()
                count += 1
        self._resume()
        return count

    @property
    def late_count(self) -> int:
        return self._mailbox.late_count

    def progress(self) -> bool:
        self._calls += 1
        if self._calls % _CHECK_EVERY == 0:
            self._check_deadlines()
        events = self._epoll.poll(0)
        for fd, event in events:
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._inbound:
                self._read(self._inbound[fd])
            elif fd in self._outbound:
                self._outbound[fd].on_event(event)
                if self._outbound[fd].error is not None:
                    del self._outbound[fd]
        return bool(events)

    def doubt(self) -> None:
        """Does nothing: each peer has its own connection, so none can block another one's messages."""

    def fds(self) -> list[tuple[int, int]]:
        return [(self._epoll.fileno(), select.POLLIN)]

    def arm(self) -> bool:
        self._check_deadlines()
        return True  # epoll is level-triggered.

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for peer in self._outbound.values():
            peer.close()
        for connection in list(self._inbound.values()):
            self._drop(connection, None)
        self._listener.close()
        self._mailbox.fail_all(TransportError("the transport was closed"))
        self._epoll.close()

    # -- connections ------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise TransportError("no file descriptors are left to accept a connection") from error
                return
            unauthenticated = [c for c in self._inbound.values() if not c.authenticated]
            if len(unauthenticated) >= _MAX_UNAUTHENTICATED:
                # The oldest is dropped: a peer with the secret sends it at once.
                self.refused_count += 1
                self._drop(unauthenticated[0], TransportError("too many connections that do not say who they are"))
            deadline = time.monotonic() + self._timing.preamble_s
            connection = Inbound(sock, self._mailbox, self._secret, self._max_frame_bytes, deadline, self._has_room)
            self._inbound[sock.fileno()] = connection
            self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _has_room(self, length: int) -> bool:
        """Whether an unexpected frame may be kept: the first one always, others up to the bound."""
        kept = sum(map(len, self._mailbox.unexpected)) + sum(c.kept_bytes for c in self._inbound.values())
        return not kept or kept + length <= self._max_unexpected_bytes

    def _read(self, connection: Inbound) -> None:
        try:
            connection.read()
        except TransportError as error:
            self.refused_count += 1
            log.warning("a connection from %s was refused: %s", connection.origin, error)
            self._drop(connection, error)
        except OSError as error:
            self._drop(connection, TransportError(f"the connection broke: {error}"))
        else:
            if connection.ended:
                self._drop(connection, None)
            elif connection.stalled and connection not in self._waiting:
                self._waiting.append(connection)
                self._epoll.unregister(connection.fd)

    def _resume(self) -> None:
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            if connection.fd in self._inbound:
                self._epoll.register(connection.fd, select.EPOLLIN)
                self._read(connection)

    def _drop(self, connection: Inbound, error: TransportError | None) -> None:
        self._inbound.pop(connection.fd, None)
        if connection in self._waiting:
            self._waiting.remove(connection)
        else:
            self._epoll.unregister(connection.fd)
        connection.close(error)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for connection in [c for c in self._inbound.values() if not c.authenticated and now > c.deadline]:
            self.refused_count += 1
            self._drop(connection, TransportError("no preamble came in time"))
        for fd, peer in list(self._outbound.items()):
            peer.check_deadline(now)
            if peer.error is not None:
                del self._outbound[fd]
