"""Frames between a worker's agent (gRPC, asyncio) and its rank processes (engine), over a Unix socket pair.

A frame is a kind, a 32-bit id and a payload: protobuf bytes, or JSON for the few that have no message. A rank reads and
writes without asyncio; the agent has asyncio streams on its end. Plans and results pass through unparsed.
"""

from __future__ import annotations

import contextlib
import enum
import json
import select
import socket
import struct
import time
from typing import Any

from stagemesh.errors import InternalError, StagemeshError, by_reason

HEADER = struct.Struct("<IBI")


class Kind(enum.IntEnum):
    """What a frame says. The id names a call (ASSIGN..PREPARE and their replies), a session (RUN, RESULT) or a
    number (LATE_FRAMES)."""

    # agent -> rank
    ASSIGN = 1
    OFFER_LINK = 2
    CONNECT_LINK = 3
    ACTIVATE = 4
    RELEASE = 5
    OPEN_SESSION = 6
    CLOSE_SESSION = 7
    PREPARE = 8
    RUN = 10
    SHUTDOWN = 11
    # rank -> agent
    READY = 20
    PROGRESS = 21
    REPLY = 22
    ERROR = 23
    RESULT = 24
    SESSION_ENDED = 25
    LINK_BROKEN = 26
    PAGES_COPIED = 27
    LATE_FRAMES = 28
    # rank 0 -> other ranks
    ORDER_STEP = 40
    ORDER_CALL = 41

    @property
    def is_call(self) -> bool:
        """Whether the agent waits for a REPLY or an ERROR of the same id."""
        return self <= Kind.PREPARE


def pack(kind: Kind, ident: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return HEADER.pack(len(payload), kind, ident) + payload


def pack_error(ident: int, error: BaseException) -> bytes:
    """An ERROR frame that `unpack_error` makes the same error from."""
    known = error if isinstance(error, StagemeshError) else InternalError(f"{type(error).__name__}: {error}")
    return pack(
        Kind.ERROR,
        ident,
        dumps({"reason": known.reason, "message": known.message, "retry_after_s": known.retry_after_s}),
    )


def unpack_error(payload: bytes) -> StagemeshError:
    """The error that an ERROR or SESSION_ENDED frame carries."""
    said = json.loads(payload)
    return by_reason(said["reason"])(said["message"], retry_after_s=said.get("retry_after_s"))


def dumps(value: Any) -> bytes:
    """JSON bytes."""
    return json.dumps(value).encode()


class Socket:
    """A rank's end: reads what has come without waiting, writes with a deadline."""

    def __init__(self, sock: socket.socket, write_timeout_s: float = 30.0) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._pending = bytearray()
        self._write_timeout_s = write_timeout_s
        self.closed = False

    def fileno(self) -> int:
        """For poll."""
        return self._sock.fileno()

    def receive(self) -> list[tuple[Kind, int, bytes]]:
        """All whole frames that have come. Sets `closed` when the other end is gone."""
        while True:
            try:
                data = self._sock.recv(1 << 18)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            if not data:
                self.closed = True
                break
            self._pending += data
            if len(data) < (1 << 18):
                break
        frames: list[tuple[Kind, int, bytes]] = []
        at = 0
        while len(self._pending) - at >= HEADER.size:
            size, kind, ident = HEADER.unpack_from(self._pending, at)
            if len(self._pending) - at - HEADER.size < size:
                break
            at += HEADER.size
            frames.append((Kind(kind), ident, bytes(self._pending[at : at + size])))
            at += size
        if at:
            del self._pending[:at]
        return frames

    def send(self, kind: Kind, ident: int, payload: bytes = b"") -> None:
        """Writes one frame; a reader that is gone sets `closed`, one that is stuck past the deadline too."""
        self.send_packed(pack(kind, ident, payload))

    def send_packed(self, frame: bytes) -> None:
        """`send` for a frame that is packed already."""
        left = memoryview(frame)
        deadline = time.monotonic() + self._write_timeout_s
        while left and not self.closed:
            try:
                left = left[self._sock.send(left) :]
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self.closed = True
                select.select([], [self._sock], [], 0.1)
            except ConnectionError:
                self.closed = True

    def close(self) -> None:
        """Closes the socket."""
        self.closed = True
        with contextlib.suppress(OSError):
            self._sock.close()
