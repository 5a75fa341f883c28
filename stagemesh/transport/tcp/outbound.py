"""The sending end of a TCP connection: a queue of frames that are written as the socket accepts them."""

from __future__ import annotations

import contextlib
import os
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
    """A `Peer` that connects in the background, and queues frames until then."""

    def __init__(self, host: str, port: int, secret: bytes, epoll: select.epoll, timeout_s: float) -> None:
        self._where = f"{host}:{port}"
        self._epoll = epoll
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._queue: deque[tuple[memoryview, HostRequest | None]] = deque()
        self._queue.append((memoryview(frame.pack_preamble(secret)), None))
        self.error: TransportError | None = None
        self._connected = False
        self._wants_write = True
        self._sock = socket.socket()  # Only for `close`, if the name cannot be resolved.
        try:
            family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._sock.close()
            self._sock = socket.socket(family, kind, proto)
            self._sock.setblocking(False)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BlockingIOError):
                self._sock.connect(address)
            epoll.register(self._sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
        except OSError as error:
            self._fail(f"cannot be reached: {error}")
        self.fd = self._sock.fileno()

    @property
    def route(self) -> str:
        return "tcp" if self._connected else "unknown"

    def send(self, tag: int, buffer: Buffer) -> HostRequest:
        if self.error is not None:
            raise self.error
        view = send_view(buffer)
        request = HostRequest(view)
        header = memoryview(frame.pack_header(tag, view.nbytes))
        if view.nbytes:
            self._queue.append((header, None))
            self._queue.append((view, request))
        else:
            self._queue.append((header, request))
        if not self._wants_write:
            self._flush()
        return request

    def on_event(self, event: int) -> None:
        """Handles an event of epoll."""
        if not self._connected:
            if code := self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._fail(f"cannot be reached: {os.strerror(code)}")
                return
            self._connected = bool(event & select.EPOLLOUT)
        elif event & ~select.EPOLLOUT:
            self._hear()
        if self._connected and event & select.EPOLLOUT and self.error is None:
            self._flush()

    def check_deadline(self, now: float) -> None:
        """Ends the connection if it was not established in time."""
        if not self._connected and now > self._deadline:
            self._fail(f"did not answer within {self._timeout_s:g} s")

    def close(self) -> None:
        self._fail("was closed by this side")

    def _hear(self) -> None:
        """Reads from the connection. The other side only sends a refusal, before it closes."""
        try:
            reason = frame.unpack_refusal(self._sock.recv(frame.REFUSAL_BYTES))
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(f"broke: {error}")
        else:
            self._fail(f"refused this side: {reason}" if reason else "ended the connection")

    def _flush(self) -> None:
        while self._queue:
            views = [self._queue[i][0] for i in range(min(len(self._queue), _IOV))]
            try:
                sent = self._sock.sendmsg(views)
            except BlockingIOError:
                break
            except OSError as error:
                self._hear()  # A refusal says more than a broken pipe.
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
        """Ends the connection with a reason. Only the first reason is kept."""
        self.error = self.error or TransportError(f"the peer {self._where} {why}")
        with contextlib.suppress(OSError, ValueError):
            self._epoll.unregister(self._sock.fileno())
        self._sock.close()
        for _, request in self._queue:
            if request is not None:
                request.finish(self.error)
        self._queue.clear()
