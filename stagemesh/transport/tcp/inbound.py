"""The receiving end of a TCP connection. It reads the preamble, then frames, each into the buffer of its receive."""

from __future__ import annotations

import contextlib
import hmac
import socket

from stagemesh.errors import TransportError

from ..mailbox import HostRequest, cancelled
from . import frame
from .inbox import Inbox

_READ_BYTES = 1 << 16
_READS_A_TURN = 32


class Inbound:
    """One accepted connection.

    Args:
        secret: what its preamble must hold.
        deadline: monotonic time at which the preamble must be here.
    """

    def __init__(self, sock: socket.socket, inbox: Inbox, secret: bytes, max_frame_bytes: int, deadline: float) -> None:
        sock.setblocking(False)
        self._sock, self._inbox = sock, inbox
        self._secret, self._max_frame_bytes = secret, max_frame_bytes
        self.fd = sock.fileno()
        self.origin = _origin(sock)
        self.deadline = deadline
        self.authenticated = False
        self.ended = False
        self._rx = bytearray(_READ_BYTES)
        self._start = self._end = 0  # unread part of _rx
        self.tag = 0
        self._length = 0
        self._in_frame = False  # a header was read, its body is not complete
        self._request: HostRequest | None = None
        self._body: memoryview | None = None  # None: no memory yet
        self._missing = 0  # bytes of the body still to come

    @property
    def unexpected(self) -> bool:
        """A frame for which no receive was posted is on its way."""
        return self._in_frame and self._request is None and (self._body is None or self._body.nbytes == self._length)

    @property
    def stalled(self) -> bool:
        """A frame waits for memory."""
        return self._in_frame and self._body is None

    def read(self) -> None:
        """Reads what is there.

        Raises:
            TransportError: the stream is not valid; nothing more of it can be read.
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
        """Drops the present frame: the rest of it is read and thrown away."""
        if self._request is None and self._body is not None:
            self._inbox.give_up(self._length)
        self._request = None
        self._body = memoryview(b"")

    def close(self, error: TransportError | None) -> None:
        """Ends the connection, and the receive that was being filled."""
        if error is not None:
            with contextlib.suppress(OSError):
                self._sock.send(frame.pack_refusal(error.message))
        self._sock.close()
        if self._request is not None:
            self._request.finish(error or TransportError("the connection ended in the middle of a message"))
        elif self.unexpected and self._body is not None:
            self._inbox.give_up(self._length)

    def _parse(self) -> bool:
        """Parses what was read. False: a frame waits for memory."""
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
        """Reads a preamble or a header; False when it is not complete."""
        size = frame.HEADER_BYTES if self.authenticated else frame.PREAMBLE_BYTES
        have = self._end - self._start
        if have < size:
            view[:have] = bytes(view[self._start : self._end])
            self._start, self._end = 0, have
            return False
        data = view[self._start : self._start + size]
        self._start += size
        if self._start == self._end:
            data, self._start, self._end = memoryview(bytes(data)), 0, 0
        if self.authenticated:
            self.tag, self._length = frame.unpack_header(data, self._max_frame_bytes)
            self._missing = self._length
            self._in_frame, self._body, self._request = True, None, None
        elif hmac.compare_digest(frame.unpack_preamble(data), self._secret):
            self.authenticated = True
        else:
            raise TransportError("the tag secret is wrong")
        return True

    def _place(self) -> bool:
        place = self._inbox.place(self.tag, self._length)
        if isinstance(place, HostRequest):
            self._request, self._body = place, place.view
            place.on_cancel(self._cancel)
        else:
            self._body = place
        return self._body is not None

    def _cancel(self, request: HostRequest) -> None:
        if self._request is request:
            self._request, self._body = None, memoryview(b"")
            request.finish(cancelled())

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
            self._inbox.complete(self.tag, body.obj)


def _origin(sock: socket.socket) -> str:
    try:
        return "%s:%d" % sock.getpeername()[:2]  # noqa: UP031
    except OSError:
        return "an address that is gone"
