"""Frames between processes of one machine, over sockets and pipes: a header, then a payload.

Every frame begins with magic and version, so that foreign bytes, or bytes of another release, are refused on arrival.
The users of this module define kinds and payloads.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from stagemesh.errors import InternalError

MAGIC, VERSION = 0x4D53, 1
"""Magic bytes `SM`, and the version of this layout."""
HEADER = struct.Struct("<HBBII")
"""Layout of the header: magic, version, kind, id, bytes of the payload."""
MAX_PAYLOAD_BYTES = 17 << 20
"""Largest payload, larger than any gRPC message (rpc.py). With it, no reader waits for a payload of a wrong length."""

K = TypeVar("K", bound=IntEnum)
M = TypeVar("M", bound=Message)


def pack(kind: int, ident: int, payload: bytes = b"") -> bytes:
    """Makes a frame. Raises InternalError for a payload that is too large."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InternalError(f"a payload of {len(payload)} bytes does not fit a frame of at most {MAX_PAYLOAD_BYTES}")
    return HEADER.pack(MAGIC, VERSION, kind, ident, len(payload)) + payload


def parse(message: type[M], payload: bytes) -> M:
    """Parses a payload. Raises InternalError for a payload that is cut, or of another message."""
    try:
        return message.FromString(payload)
    except DecodeError as e:
        raise InternalError(f"{len(payload)} bytes cannot be read as {message.__name__}: {e}") from e


class Decoder(Generic[K]):
    """Turns a stream of bytes into frames. It must not be used after an error."""

    def __init__(self, kinds: type[K]) -> None:
        self._kinds = {int(kind): kind for kind in kinds}
        self._rest = bytearray()
        """The first bytes of a frame that is not complete yet."""

    def feed(self, data: bytes) -> list[tuple[K, int, bytes]]:
        """Returns (kind, id, payload) of each frame that is now complete. Raises InternalError for invalid bytes."""
        held: bytes | bytearray = data
        if self._rest:
            held = self._rest
            held += data
        frames: list[tuple[K, int, bytes]] = []
        at = 0
        while len(held) >= (begin := at + HEADER.size):
            magic, version, kind, ident, size = HEADER.unpack_from(held, at)
            if magic != MAGIC or version != VERSION or kind not in self._kinds or size > MAX_PAYLOAD_BYTES:
                raise InternalError(self._objection(magic, version, kind, size))
            if len(held) < begin + size:
                break
            at = begin + size
            frames.append((self._kinds[kind], ident, bytes(held[begin:at])))
        if held is data:
            self._rest += data[at:]
        else:
            del self._rest[:at]
        return frames

    def close(self) -> None:
        """Marks the end of the stream. Raises InternalError if it is within a frame."""
        if self._rest:
            raise InternalError(f"the other end closed within a frame, of which {len(self._rest)} bytes had come")

    def one(self, data: bytes) -> tuple[K, int, bytes]:
        """Returns the frame in `data`. Raises InternalError unless there is exactly one."""
        frames = self.feed(data)
        self.close()
        if len(frames) != 1:
            raise InternalError(f"{len(frames)} frames came where one was expected")
        return frames[0]

    def _objection(self, magic: int, version: int, kind: int, size: int) -> str:
        if magic != MAGIC:
            return f"what came does not begin as a frame: {magic:#06x} in place of {MAGIC:#06x}"
        if version != VERSION:
            return f"a frame of version {version} came, {VERSION} is understood: are all processes of one release?"
        if kind not in self._kinds:
            return f"a frame of kind {kind} came; known are {', '.join(map(str, sorted(self._kinds)))}"
        return f"a frame of {size} bytes was announced, {MAX_PAYLOAD_BYTES} are allowed"
