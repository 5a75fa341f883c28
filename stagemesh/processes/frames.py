"""Frames between processes of one machine, over sockets and pipes: a header, then a payload.

Every frame begins with magic and version, so that bytes of another release, or of somebody else, are refused where they
arrive. What kinds there are, and what a payload holds, is the affair of those who exchange them.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from stagemesh.errors import InternalError

MAGIC, VERSION = 0x4D53, 1
"""`SM`, and the version of this layout."""
HEADER = struct.Struct("<HBBII")
"""Magic, version, kind, id, bytes of the payload."""
MAX_PAYLOAD_BYTES = 17 << 20
"""More than any gRPC message has (rpc.py), and bounded: a length that is wrong must not be waited for."""

K = TypeVar("K", bound=IntEnum)
M = TypeVar("M", bound=Message)


def pack(kind: int, ident: int, payload: bytes = b"") -> bytes:
    """One frame. Raises InternalError for a payload beyond the bound."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InternalError(f"a payload of {len(payload)} bytes does not fit a frame of at most {MAX_PAYLOAD_BYTES}")
    return HEADER.pack(MAGIC, VERSION, kind, ident, len(payload)) + payload


def parse(message: type[M], payload: bytes) -> M:
    """The message that a payload holds. Raises InternalError where it holds another, or is cut."""
    try:
        return message.FromString(payload)
    except DecodeError as e:
        raise InternalError(f"{len(payload)} bytes cannot be read as {message.__name__}: {e}") from e


class Decoder(Generic[K]):
    """Takes bytes as they come; gives whole frames. After an error it is of no further use."""

    def __init__(self, kinds: type[K]) -> None:
        self._kinds = {int(kind): kind for kind in kinds}
        self._chunks: list[bytes] = []
        """The beginning of a frame that is not whole yet, as it came."""
        self._missing = 0
        """Bytes that have to come before it is worth another look."""

    def feed(self, data: bytes) -> list[tuple[K, int, bytes]]:
        """(kind, id, payload) of each frame that is whole by now. Raises InternalError for what is no such frame."""
        if self._chunks:
            self._chunks.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return []
            data = b"".join(self._chunks)
        frames: list[tuple[K, int, bytes]] = []
        at, end, wanted = 0, len(data), HEADER.size
        while end - at >= HEADER.size:
            magic, version, kind, ident, size = HEADER.unpack_from(data, at)
            if magic != MAGIC or version != VERSION or kind not in self._kinds or size > MAX_PAYLOAD_BYTES:
                raise InternalError(self._objection(magic, version, kind, size))
            begin = at + HEADER.size
            if end - begin < size:
                wanted += size
                break
            at = begin + size
            frames.append((self._kinds[kind], ident, data[begin:at]))
        self._chunks = [data[at:]] if at < end else []
        self._missing = wanted - (end - at)
        return frames

    def close(self) -> None:
        """No more will come. Raises InternalError where that is in the midst of a frame."""
        if self._chunks:
            had = sum(map(len, self._chunks))
            raise InternalError(f"the other end closed within a frame, of which {had} bytes had come")

    def one(self, data: bytes) -> tuple[K, int, bytes]:
        """The frame that a datagram, or a whole file, holds. Raises InternalError where it is not just one."""
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
