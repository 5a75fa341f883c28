"""TCP without threads: non-blocking sockets behind one epoll, in the same `progress()` as the other transports.

A `Peer` is one outgoing connection; frames travel on it one way only. The address carries a secret (and gRPC carries
the address): a connection that does not begin with it is told so and dropped, before any frame of it is looked at.
Reads go straight into the posted buffer; what nobody asked for yet is held up to a bound, then that socket is read no
further until a receive is posted.
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import select
import socket
import struct
import time

from stagemesh.errors import TransportError

from . import frame
from .base import Buffer, recv_view
from .frame import HostRequest, Mailbox, wrong_size
from .tcp_conn import Inbound, Outbound

log = logging.getLogger(__name__)

_ADDRESS = struct.Struct("<4sH16s")
_PREAMBLE_TIMEOUT_S = 5.0
_MAX_STRANGERS = 64
_CHECK_EVERY = 256


class TcpTransport:
    """See `Transport`.

    Args:
        host: address to bind, numeric or a name.
        port: port to bind; 0 asks the system for a free one.
        advertise: host that others connect to; the bound address when None.
        max_frame_bytes: a longer frame is refused and its connection closed.
        max_held_bytes: bound of all held (unexpected) frames together; one frame is held whatever its size.

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
        max_held_bytes: int = 1 << 26,
    ) -> None:
        self._max_frame_bytes, self._max_held_bytes = max_frame_bytes, max_held_bytes
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
        self._held_bytes = 0
        self._waiting: list[Inbound] = []  # they have a frame for which there is no room
        self.refused_count = 0
        self._calls = 0
        self._closed = False

    def address(self) -> bytes:
        return _ADDRESS.pack(b"SMT1", self.port, self._secret) + self.host.encode()

    def connect(self, address: bytes, *, timeout_s: float = 5.0) -> Outbound:
        if len(address) <= _ADDRESS.size or address[:4] != b"SMT1":
            raise TransportError(f"not a TCP address: {len(address)} bytes that begin with {address[:4]!r}")
        _, port, secret = _ADDRESS.unpack_from(address)
        host = address[_ADDRESS.size :].decode(errors="replace")
        peer = Outbound(host, port, secret, self._epoll, timeout_s)
        if peer.error is None:
            self._outbound[peer.fd] = peer
        return peer

    def recv(self, tag: int, buffer: Buffer) -> HostRequest:
        view, land = recv_view(buffer)
        request = HostRequest(view, land)
        held = self._mailbox.post(tag, request)
        if held is not None:
            self._held_bytes -= len(held)
            _deliver(tag, held, request)
        if self._waiting:
            self._resume()
        return request

    def probe(self, tag: int) -> bool:
        return self._mailbox.holds(tag) or any(c.tag == tag for c in self._inbound.values() if c.unexpected)

    def discard(self, tag: int, mask: int, *, forever: bool = False) -> int:
        dropped = self._mailbox.discard(tag, mask, forever)
        self._held_bytes -= sum(map(len, dropped))
        count = len(dropped)
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
            elif fd in self._outbound and not self._outbound[fd].on_event(event):
                del self._outbound[fd]
        return bool(events)

    def doubt(self) -> None:
        """Every peer has a way of its own here: none can break another's."""

    def fds(self) -> list[tuple[int, int]]:
        return [(self._epoll.fileno(), select.POLLIN)]

    def arm(self) -> bool:
        self._check_deadlines()
        return True  # epoll is level-triggered

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

    # -- what an inbound connection asks for -------------------------------------------------------------------------

    def check_secret(self, secret: bytes) -> None:
        """Raises TransportError when a connection does not know the secret."""
        if not hmac.compare_digest(secret, self._secret):
            raise TransportError("the tag secret is wrong")

    def place(self, tag: int, length: int) -> HostRequest | memoryview | None:
        """Where the body of an arriving frame goes: a posted receive, held memory, or (None) nowhere yet.

        An empty view of another length means: read over it.
        """
        request = self._mailbox.match(tag)
        if request is not None:
            if request.nbytes == length:
                return request
            request.finish(wrong_size(tag, length, request.nbytes))
            return memoryview(b"")
        if self._mailbox.fenced(tag):
            return memoryview(b"")
        if self._held_bytes and self._held_bytes + length > self._max_held_bytes:
            return None
        self._held_bytes += length
        return memoryview(bytearray(length))

    def held(self, tag: int, view: memoryview) -> None:
        """An unexpected frame is complete."""
        payload = view.obj
        assert isinstance(payload, bytearray)
        request = self._mailbox.match(tag)
        if request is not None:  # posted while the frame was on its way
            self._held_bytes -= len(payload)
            _deliver(tag, payload, request)
        else:
            self._mailbox.hold(tag, payload)

    def unhold(self, length: int) -> None:
        """An unexpected frame was given up before it was complete."""
        self._held_bytes -= length

    @property
    def max_frame_bytes(self) -> int:
        """The longest frame that is accepted."""
        return self._max_frame_bytes

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
            strangers = [c for c in self._inbound.values() if not c.known]
            if len(strangers) >= _MAX_STRANGERS:  # the oldest goes: a right peer says who it is at once
                self.refused_count += 1
                self._drop(strangers[0], TransportError("too many connections that do not say who they are"))
            connection = Inbound(sock, self, time.monotonic() + _PREAMBLE_TIMEOUT_S)
            self._inbound[sock.fileno()] = connection
            self._epoll.register(sock.fileno(), select.EPOLLIN)

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
        for connection in [c for c in self._inbound.values() if not c.known and now > c.deadline]:
            self.refused_count += 1
            self._drop(connection, TransportError("no preamble came in time"))
        for fd, peer in list(self._outbound.items()):
            if peer.past_deadline(now) or peer.error is not None:
                del self._outbound[fd]


def _deliver(tag: int, payload: bytearray, request: HostRequest) -> None:
    if len(payload) != request.nbytes or request.view is None:
        request.finish(wrong_size(tag, len(payload), request.nbytes))
        return
    request.view[:] = payload
    request.finish()
