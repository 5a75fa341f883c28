"""The two ends of a TCP connection that carries frames one way: `Inbound` reads them, `Outbound` writes them."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections import deque
from typing import TYPE_CHECKING

from stagemesh.errors import TransportError

from . import frame
from .base import Buffer, send_view
from .frame import HostRequest

if TYPE_CHECKING:
    from .tcp import TcpTransport

_READ_BYTES = 1 << 16
_IOV = 64
_READS_A_TURN = 32


class Inbound:
    """Preamble, then frames: a header at a time, its body into the posted buffer (or held, or dropped)."""

    def __init__(self, sock: socket.socket, owner: TcpTransport, deadline: float) -> None:
        _tune(sock)
        self._sock, self._owner = sock, owner
        self.fd = sock.fileno()
        self.origin = _origin(sock)
        self.deadline = deadline
        self.known = False
        self.ended = False
        self._rx = bytearray(_READ_BYTES)
        self._start = self._end = 0  # unread part of _rx
        self.tag = 0
        self._length = 0
        self._in_frame = False  # a header was read, its body is not complete
        self._request: HostRequest | None = None
        self._body: memoryview | None = None  # None: no room yet
        self._missing = 0  # bytes of the body still to come

    @property
    def unexpected(self) -> bool:
        """A frame for which no receive was posted is on its way."""
        return self._in_frame and self._request is None and (self._body is None or self._body.nbytes == self._length)

    @property
    def stalled(self) -> bool:
        """A frame waits for room."""
        return self._in_frame and self._body is None

    def read(self) -> None:
        """Read what is there.

        Raises:
            TransportError: the stream is not what it should be; it cannot be followed any further.
        """
        for _ in range(_READS_A_TURN):
            if not self._parse():
                return
            try:
                if self._in_frame and self._missing >= _READ_BYTES and self._body is not None and self._body.nbytes:
                    got = self._sock.recv_into(self._body[self._length - self._missing :], self._missing)
                    self._take(got)
                else:
                    got = self._sock.recv_into(memoryview(self._rx)[self._end :])
                    self._end += got
            except BlockingIOError:
                return
            if got == 0:
                self.ended = True
                return

    def drop_frame(self) -> None:
        """Read over the rest of the present frame."""
        if self._request is None and self._body is not None:
            self._owner.unhold(self._length)
        self._request = None
        self._body = memoryview(b"")

    def close(self, error: TransportError | None) -> None:
        """End the connection, and the receive that was being filled."""
        if error is not None:
            with contextlib.suppress(OSError):
                self._sock.send(frame.pack_refusal(error.message))
        self._sock.close()
        if self._request is not None:
            self._request.finish(error or TransportError("the connection ended in the middle of a message"))
        elif self.unexpected and self._body is not None:
            self._owner.unhold(self._length)

    def _parse(self) -> bool:
        """Use up `_rx`. False: a frame waits for room."""
        view = memoryview(self._rx)
        while True:
            if self._in_frame:
                if self._body is None and not self._place():
                    return False
                part = min(self._missing, self._end - self._start)
                if part:
                    if self._body:
                        at = self._length - self._missing
                        self._body[at : at + part] = view[self._start : self._start + part]
                    self._start += part
                    if self._start == self._end:
                        self._start = self._end = 0
                self._take(part)
                if self._in_frame:
                    return True
            elif not self._head(view):
                return True

    def _head(self, view: memoryview) -> bool:
        """Read a preamble or a header; False when it is not complete."""
        size = frame.HEADER_BYTES if self.known else frame.PREAMBLE_BYTES
        have = self._end - self._start
        if have < size:
            view[:have] = bytes(view[self._start : self._end])
            self._start, self._end = 0, have
            return False
        data = view[self._start : self._start + size]
        self._start += size
        if self._start == self._end:
            data, self._start, self._end = memoryview(bytes(data)), 0, 0
        if self.known:
            self.tag, self._length = frame.unpack_header(data, self._owner.max_frame_bytes)
            self._missing = self._length
            self._in_frame, self._body, self._request = True, None, None
        else:
            self._owner.check_secret(frame.unpack_preamble(data))
            self.known = True
        return True

    def _place(self) -> bool:
        place = self._owner.place(self.tag, self._length)
        if isinstance(place, HostRequest):
            self._request, self._body = place, place.view
            place.on_cancel(self._cancel)
        else:
            self._body = place
        return self._body is not None

    def _cancel(self, request: HostRequest) -> None:
        if self._request is request:
            self._request, self._body = None, memoryview(b"")
            request.finish(frame.cancelled())

    def _take(self, count: int) -> None:
        """`count` bytes of the body have come."""
        self._missing -= count
        if self._missing:
            return
        self._in_frame = False
        body, request = self._body, self._request
        self._body = self._request = None
        if request is not None:
            request.finish()
        elif body is not None and body.nbytes == self._length and isinstance(body.obj, bytearray):
            self._owner.held(self.tag, body)


class Outbound:
    """See `Peer`. Connects in the background; sends queue until then."""

    def __init__(self, host: str, port: int, secret: bytes, epoll: select.epoll, timeout_s: float) -> None:
        self._where = f"{host}:{port}"
        self._epoll = epoll
        self._deadline: float | None = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._queue: deque[tuple[memoryview, HostRequest | None]] = deque()
        self._queue.append((memoryview(frame.pack_preamble(secret)), None))
        self._error: TransportError | None = None
        self._connected = False
        self._wants_write = True
        self._sock: socket.socket | None = None
        self.fd = -1
        try:
            family, kind, proto, _, sockaddr = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = socket.socket(family, kind, proto)
            _tune(sock)
            code = sock.connect_ex(sockaddr)
        except OSError as error:
            self._fail(f"cannot be reached: {error}")
            return
        self._sock, self.fd = sock, sock.fileno()
        if code not in (0, errno.EINPROGRESS):
            self._fail(f"cannot be reached: {errno.errorcode.get(code, code)}")
            return
        epoll.register(self.fd, select.EPOLLIN | select.EPOLLOUT)

    @property
    def error(self) -> TransportError | None:
        return self._error

    @property
    def route(self) -> str:
        return "tcp" if self._connected else "unknown"

    def send(self, tag: int, buffer: Buffer) -> HostRequest:
        if self._error is not None:
            raise self._error
        view = send_view(buffer)
        request = HostRequest(view)
        header = memoryview(frame.pack_header(tag, view.nbytes))
        if view.nbytes:
            self._queue.append((header, None))
            self._queue.append((view, request))
        else:
            self._queue.append((header, request))
        if self._connected and not self._wants_write:
            self._flush()
        return request

    def on_event(self, event: int) -> bool:
        """Called by the transport; False when the connection is over."""
        if self._sock is None:
            return False
        if not self._connected:
            code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self._fail(f"cannot be reached: {errno.errorcode.get(code, code)}")
                return False
            if not event & select.EPOLLOUT:
                return True
            self._connected, self._deadline = True, None
        if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and not self._hear():
            return False
        if event & select.EPOLLOUT:
            self._flush()
        return self._sock is not None

    def past_deadline(self, now: float) -> bool:
        """Ends a connection that was not made in time."""
        if self._deadline is not None and now > self._deadline:
            self._fail(f"did not answer within {self._timeout_s:g} s")
            return True
        return False

    def close(self) -> None:
        self._fail("was closed by this side")

    def _hear(self) -> bool:
        """The other side only ever speaks to refuse, or ends."""
        assert self._sock is not None
        try:
            data = self._sock.recv(frame.REFUSAL_BYTES)
        except BlockingIOError:
            return True
        except OSError as error:
            self._fail(f"broke: {error}")
            return False
        reason = frame.unpack_refusal(data)
        self._fail(f"refused this side: {reason}" if reason else "ended the connection")
        return False

    def _flush(self) -> None:
        assert self._sock is not None
        while self._queue:
            views = [self._queue[i][0] for i in range(min(len(self._queue), _IOV))]
            try:
                sent = self._sock.sendmsg(views)
            except BlockingIOError:
                break
            except OSError as error:
                if not self._hear():  # a refusal says more than a broken pipe
                    return
                self._fail(f"broke: {error}")
                return
            self._advance(sent)
        if bool(self._queue) != self._wants_write:
            self._wants_write = bool(self._queue)
            self._epoll.modify(self.fd, select.EPOLLIN | (select.EPOLLOUT if self._wants_write else 0))

    def _advance(self, sent: int) -> None:
        while sent:
            view, request = self._queue[0]
            if sent < view.nbytes:
                self._queue[0] = (view[sent:], request)
                return
            sent -= view.nbytes
            self._queue.popleft()
            if request is not None:
                request.finish()

    def _fail(self, why: str) -> None:
        if self._error is None:
            self._error = TransportError(f"the peer {self._where} {why}")
        if self._sock is not None:
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(self.fd)
            self._sock.close()
            self._sock = None
        for _, request in self._queue:
            if request is not None:
                request.finish(self._error)
        self._queue.clear()


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _origin(sock: socket.socket) -> str:
    try:
        return "%s:%d" % sock.getpeername()[:2]  # noqa: UP031
    except OSError:
        return "an address that is gone"
