"""A rank's end of a socket to its agent or to another rank: reads without blocking, writes with a deadline."""

from __future__ import annotations

import select
import socket
import time

from google.protobuf.message import Message

from stagemesh.processes.frames import Decoder, pack

from ..messages.control import Kind

READ_BYTES = 1 << 18
WRITE_LOOK_S = 0.1


class ControlSocket:
    """A socket for frames, without asyncio: the engine polls it together with its transports."""

    def __init__(self, sock: socket.socket, write_timeout_s: float) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = Decoder(Kind)
        self._write_timeout_s = write_timeout_s
        self.closed = False

    def fileno(self) -> int:
        """The descriptor, for poll."""
        return self._sock.fileno()

    def receive(self) -> list[tuple[Kind, int, bytes]]:
        """Returns all complete frames that have arrived. Sets `closed` when the other end is gone.

        Raises InternalError for bytes that are not a frame, and when the other end closed within a frame.
        """
        frames: list[tuple[Kind, int, bytes]] = []
        while not self.closed:
            try:
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            if not data:
                self.closed = True
                self._decoder.close()
            frames += self._decoder.feed(data)
            if len(data) < READ_BYTES:
                break
        return frames

    def send(self, kind: Kind, ident: int, message: Message | None = None) -> None:
        """Writes one frame. Sets `closed` when the reader is gone, or does not read the frame before the deadline."""
        left = memoryview(pack(kind, ident, b"" if message is None else message.SerializeToString()))
        deadline = time.monotonic() + self._write_timeout_s
        while left and not self.closed:
            try:
                left = left[self._sock.send(left) :]
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self.closed = True
                select.select([], [self._sock], [], WRITE_LOOK_S)
            except ConnectionError:
                self.closed = True
