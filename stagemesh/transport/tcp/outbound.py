"""The sending end of a TCP connection: a queue of frames that are written as the socket accepts them."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections import deque

from stagemesh.errors import TransportError

from ..base import Buffer, send_view
from ..mailbox import HostRequest
from . import frame

_IOV = 64


class Outbound:
    """See `Peer`. It connects in the background, and queues what is sent meanwhile."""

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
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
        """Handles an event of epoll. False: the connection is over."""
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
        """Ends the connection when it was not established in time; True then."""
        if self._deadline is not None and now > self._deadline:
            self._fail(f"did not answer within {self._timeout_s:g} s")
            return True
        return False

    def close(self) -> None:
        self._fail("was closed by this side")

    def _hear(self) -> bool:
        """Reads from the connection. The other side sends nothing but a refusal, before it closes."""
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
