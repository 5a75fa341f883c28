"""Frames on a byte stream, and the box in which arrived frames meet posted receives.

On the wire, little endian. A connection starts with a preamble, then carries frames:

    preamble   magic "SMSH", version u8, 3 zero bytes, secret 16 bytes        24 bytes
    frame      magic "SMFR", version u8, 3 zero bytes, tag u64, length u64    24 bytes, then `length` bytes
    refusal    magic "SMNO", reason in UTF-8, zero padded                     64 bytes, the other way, before a close
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from stagemesh.errors import TransportError

from .base import FENCES

Held = TypeVar("Held")

VERSION = 1
MAX_FRAME_BYTES = 1 << 28
SECRET_BYTES = 16

_PREAMBLE = struct.Struct("<4sB3x16s")
_HEADER = struct.Struct("<4sB3xQQ")
_REFUSAL = struct.Struct("<4s60s")
PREAMBLE_BYTES = _PREAMBLE.size
HEADER_BYTES = _HEADER.size
REFUSAL_BYTES = _REFUSAL.size


def pack_preamble(secret: bytes) -> bytes:
    """The first bytes of a connection."""
    return _PREAMBLE.pack(b"SMSH", VERSION, secret)


def unpack_preamble(data: bytes | memoryview) -> bytes:
    """The secret in a preamble.

    Raises:
        TransportError: the other side does not speak this protocol, or another version of it.
    """
    magic, version, secret = _PREAMBLE.unpack(data)
    if magic != b"SMSH":
        raise TransportError(f"not a stagemesh peer: it began with {magic!r}")
    if version != VERSION:
        raise TransportError(f"the peer speaks frame version {version}, this side {VERSION}")
    return bytes(secret)


def pack_header(tag: int, length: int) -> bytes:
    """What precedes the `length` bytes of a frame."""
    return _HEADER.pack(b"SMFR", VERSION, tag, length)


def unpack_header(data: bytes | memoryview, max_frame_bytes: int) -> tuple[int, int]:
    """(tag, length in bytes) of a frame.

    Raises:
        TransportError: not a header, or a length over the bound: the stream cannot be followed any further.
    """
    magic, version, tag, length = _HEADER.unpack(data)
    if magic != b"SMFR" or version != VERSION:
        raise TransportError(f"a frame header expected, got {bytes(data[:8])!r}")
    if length > max_frame_bytes:
        raise TransportError(f"a frame of {length} bytes is over the bound of {max_frame_bytes}")
    return tag, length


def pack_refusal(reason: str) -> bytes:
    """Told to a connection before it is closed."""
    return _REFUSAL.pack(b"SMNO", reason.encode()[:60])


def unpack_refusal(data: bytes) -> str | None:
    """The reason in a refusal; None when `data` is not one."""
    if len(data) < REFUSAL_BYTES:
        return None
    magic, reason = _REFUSAL.unpack(data[:REFUSAL_BYTES])
    return str(reason.rstrip(b"\0").decode(errors="replace")) if magic == b"SMNO" else None


class HostRequest:
    """A send or receive on host memory. `view` is dropped when it is done, so that the buffer lives until then."""

    __slots__ = ("_land", "_on_cancel", "done", "error", "nbytes", "view")

    def __init__(self, view: memoryview, land: Callable[[], None] | None = None) -> None:
        self.view: memoryview | None = view
        self.nbytes = view.nbytes
        self.done = False
        self.error: TransportError | None = None
        self._land = land
        self._on_cancel: Callable[[HostRequest], None] | None = None

    def finish(self, error: TransportError | None = None) -> None:
        """The buffer is free from here on."""
        if self.done:
            return
        if error is None and self._land is not None:
            self._land()
        self.error = error
        self.view = None
        self._land = self._on_cancel = None
        self.done = True

    def on_cancel(self, hook: Callable[[HostRequest], None]) -> None:
        """Who to ask for an early end."""
        self._on_cancel = hook

    def cancel(self) -> None:
        """See `Request.cancel`."""
        if not self.done and self._on_cancel is not None:
            self._on_cancel(self)


def cancelled() -> TransportError:
    """The error of a request that was cancelled before its message came."""
    return TransportError("cancelled")


def wrong_size(tag: int, got: int, expected: int) -> TransportError:
    """The error of a receive whose message had another size than its buffer."""
    return TransportError(f"the message with tag {tag:#018x} has {got} bytes, its receive expected {expected}")


class Mailbox(Generic[Held]):
    """Posted receives and held (unexpected) messages by tag. `Held` is what a transport keeps for one message."""

    def __init__(self) -> None:
        self._posted: dict[int, deque[HostRequest]] = {}
        self._held: dict[int, deque[Held]] = {}
        self._fences: deque[tuple[int, int]] = deque(maxlen=FENCES)
        self.late_count = 0
        """See `Transport.late_count`."""

    def post(self, tag: int, request: HostRequest) -> Held | None:
        """Post a receive; returns the held message that it matches, if there is one, and does not post it then."""
        held = self._held.get(tag)
        if held:
            message = held.popleft()
            if not held:
                del self._held[tag]
            return message
        self._posted.setdefault(tag, deque()).append(request)
        request.on_cancel(lambda r: self._unpost(tag, r))
        return None

    def match(self, tag: int) -> HostRequest | None:
        """Take the oldest receive posted for an arriving message."""
        posted = self._posted.get(tag)
        if not posted:
            return None
        request = posted.popleft()
        if not posted:
            del self._posted[tag]
        return request

    def hold(self, tag: int, message: Held) -> None:
        """Keep a message for which no receive is posted."""
        self._held.setdefault(tag, deque()).append(message)

    def holds(self, tag: int) -> bool:
        """True when a message with this tag is held."""
        return tag in self._held

    def fenced(self, tag: int) -> bool:
        """True when a message with this tag, which has just come, is to be dropped; it is counted."""
        late = any((tag ^ value) & mask == 0 for value, mask in self._fences)
        self.late_count += late
        return late

    def discard(self, tag: int, mask: int, forever: bool) -> list[Held]:
        """Take out all held messages whose tag equals `tag` in the bits of `mask`."""
        if forever:
            self._fences.append((tag, mask))
        stale = [held_tag for held_tag in self._held if (held_tag ^ tag) & mask == 0]
        return [message for held_tag in stale for message in self._held.pop(held_tag)]

    def fail_all(self, error: TransportError) -> None:
        """End every posted receive."""
        posted, self._posted = self._posted, {}
        for queue in posted.values():
            for request in queue:
                request.finish(error)

    def _unpost(self, tag: int, request: HostRequest) -> None:
        posted = self._posted.get(tag)
        if posted is None or request not in posted:
            return
        posted.remove(request)
        if not posted:
            del self._posted[tag]
        request.finish(cancelled())
