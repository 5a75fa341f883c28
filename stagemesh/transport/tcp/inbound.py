"""The receiving end of a TCP connection. It reads the preamble, then each frame into the buffer of its receive."""

from __future__ import annotations

import contextlib
import hmac
import socket
from collections.abc import Callable

from stagemesh.errors import TransportError

from ..mailbox import HostRequest, Mailbox, cancelled, wrong_size
from . import frame

_READS_A_TURN = 64
_scratch = memoryview(bytearray(1 << 16))
"""Buffer for bytes that are dropped."""


class Inbound:
    """One accepted connection.

    The body of a frame is read into the buffer of its posted receive. The body of an unexpected frame is read into new
    memory, if there is room for it. If not, nothing more is read until there is.

    Args:
        secret: the secret that its preamble must have.
        deadline: monotonic time by which the preamble must have arrived.
        has_room: returns whether an unexpected body of this many bytes may be kept.
    """

    def __init__(
        self,
        sock: socket.socket,
        mailbox: Mailbox[bytearray],
        secret: bytes,
        max_frame_bytes: int,
        deadline: float,
        has_room: Callable[[int], bool],
    ) -> None:
        sock.setblocking(False)
        self._sock, self._mailbox, self._has_room = sock, mailbox, has_room
        self._secret, self._max_frame_bytes = secret, max_frame_bytes
        self.fd = sock.fileno()
        self.origin = _origin(sock)
        self.deadline = deadline
        self.authenticated = False
        self.ended = False
        self.tag = 0
        self._length = 0  # Of the body.
        self._in_body = False
        self._head = memoryview(bytearray(frame.HEADER_BYTES))  # A preamble or a header.
        self._view: memoryview | None = self._head  # The buffer to fill next; None if a frame waits for memory.
        self._skipped = 0  # Number of bytes to drop after `_view`.
        self._request: HostRequest | None = None
        self._kept: bytearray | None = None  # The body of an unexpected frame.

    @property
    def unexpected(self) -> bool:
        """Whether a frame without a posted receive is being read."""
        return self._kept is not None or self.stalled

    @property
    def stalled(self) -> bool:
        """Whether a frame waits for memory."""
        return self._view is None

    @property
    def kept_bytes(self) -> int:
        """Bytes of memory for the unexpected frame that is being read."""
        return len(self._kept) if self._kept is not None else 0

    def read(self) -> None:
        """Reads the bytes that have arrived.

        Raises:
            TransportError: the stream is not valid. The rest of it cannot be read.
        """
        view = self._next()
        for _ in range(_READS_A_TURN):
            if view is None:
                return
            try:
                got = self._sock.recv_into(view)
            except BlockingIOError:
                return
            if not got:
                self.ended = True
                return
            self._view = view[got:]
            view = self._next()

    def drop_frame(self) -> None:
        """Drops the current frame: the rest of it is read and discarded."""
        rest = self._length if self._view is None else len(self._view)
        self._request = self._kept = None
        self._skip(rest)

    def close(self, error: TransportError | None) -> None:
        """Ends the connection, and the receive that was being filled."""
        if error is not None:
            with contextlib.suppress(OSError):
                self._sock.send(frame.pack_refusal(error.message))
        self._sock.close()
        if self._request is not None:
            self._request.finish(error or TransportError("the connection ended in the middle of a message"))

    def _next(self) -> memoryview | None:
        """Returns the next buffer to fill, which is not empty, or None if a frame waits for memory."""
        while not self._view:
            if self._view is None:
                if not self._place():
                    return None
            elif self._skipped:
                self._skip(self._skipped)
            elif self._in_body:
                self._take_body()
            else:
                self._take_head()
        return self._view

    def _take_head(self) -> None:
        """Handles a complete preamble or header."""
        self._view = self._head
        if self.authenticated:
            self.tag, self._length = frame.unpack_header(self._head, self._max_frame_bytes)
            self._in_body, self._view = True, None
        elif hmac.compare_digest(frame.unpack_preamble(self._head), self._secret):
            self.authenticated = True
        else:
            raise TransportError("the tag secret is wrong")

    def _place(self) -> bool:
        """Finds memory for a body. Returns False if there is none."""
        request = self._mailbox.match(self.tag)
        if request is not None and request.nbytes == self._length:
            self._request, self._view = request, request.view
            request.on_cancel = self._cancel
        elif request is not None:
            request.finish(wrong_size(self.tag, self._length, request.nbytes))
            self._skip(self._length)
        elif self._mailbox.fenced(self.tag):
            self._skip(self._length)
        elif self._has_room(self._length):
            self._kept = bytearray(self._length)
            self._view = memoryview(self._kept)
        else:
            return False
        return True

    def _take_body(self) -> None:
        """Handles a complete body."""
        request, kept = self._request, self._kept
        self._in_body, self._view, self._request, self._kept = False, self._head, None, None
        if kept is not None:
            request = self._mailbox.match(self.tag)
            if request is not None:  # The receive was posted while the frame was being read.
                request.take(self.tag, kept)
            else:
                self._mailbox.keep(self.tag, kept)
        elif request is not None:
            request.finish()

    def _skip(self, count: int) -> None:
        """Makes the next `count` bytes be read and discarded."""
        self._view = _scratch[:count]
        self._skipped = count - len(self._view)

    def _cancel(self, request: HostRequest) -> None:
        if self._request is request:
            self.drop_frame()
            request.finish(cancelled())


def _origin(sock: socket.socket) -> str:
    try:
        return "%s:%d" % sock.getpeername()[:2]  # noqa: UP031
    except OSError:
        return "an address that is gone"
