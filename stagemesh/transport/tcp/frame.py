"""Wire format of TCP transports, little endian. Every length is checked before anything is unpacked.

address    magic "SMT1", port u16, secret 16 bytes, host in UTF-8          22 bytes and the host; carried by gRPC
preamble   magic "SMSH", version u8, 3 zero bytes, secret 16 bytes         24 bytes; begins a connection
frame      magic "SMFR", version u8, 3 zero bytes, tag u64, length u64     24 bytes, then `length` bytes
refusal    magic "SMNO", reason in UTF-8, zero padded                      64 bytes, the other way, before a close
"""

from __future__ import annotations

import struct
from typing import Any

from stagemesh.errors import TransportError

VERSION = 1
MAX_FRAME_BYTES = 1 << 28
MAX_HOST_BYTES = 255
SECRET_BYTES = 16

_ADDRESS = struct.Struct("<4sH16s")
_PREAMBLE = struct.Struct("<4sB3x16s")
_HEADER = struct.Struct("<4sB3xQQ")
_REFUSAL = struct.Struct("<4s60s")
HEADER_BYTES = _HEADER.size
REFUSAL_BYTES = _REFUSAL.size


def pack_address(host: str, port: int, secret: bytes) -> bytes:
    """Packs the address that a remote side needs to connect."""
    return _ADDRESS.pack(b"SMT1", port, secret) + host.encode()


def unpack_address(address: bytes) -> tuple[str, int, bytes]:
    """Returns (host, port, secret).

    Raises:
        TransportError: the bytes are not an address of this kind, or are damaged.
    """
    head, host = address[: _ADDRESS.size], address[_ADDRESS.size :]
    if not 0 < len(host) <= MAX_HOST_BYTES or head[:4] != b"SMT1":
        raise TransportError(f"not a TCP address: {len(address)} bytes that begin with {address[:4]!r}")
    _, port, secret = _ADDRESS.unpack(head)
    try:
        return host.decode(), port, secret
    except UnicodeDecodeError as error:
        raise TransportError(f"not a TCP address: its host is {host[:32]!r}") from error


def pack_preamble(secret: bytes) -> bytes:
    """Packs the first bytes of a connection."""
    return _PREAMBLE.pack(b"SMSH", VERSION, secret)


def unpack_preamble(data: bytes | memoryview) -> bytes:
    """Returns the secret in a preamble.

    Raises:
        TransportError: the other side uses another protocol, or another version.
    """
    magic, version, secret = _unpack(_PREAMBLE, data, "preamble")
    if magic != b"SMSH":
        raise TransportError(f"not a stagemesh peer: it began with {magic!r}")
    if version != VERSION:
        raise TransportError(f"the peer speaks frame version {version}, this side {VERSION}")
    return bytes(secret)


def pack_header(tag: int, length: int) -> bytes:
    """Packs the header of a frame of `length` bytes."""
    return _HEADER.pack(b"SMFR", VERSION, tag, length)


def unpack_header(data: bytes | memoryview, max_frame_bytes: int) -> tuple[int, int]:
    """Returns (tag, length in bytes) of a frame.

    Raises:
        TransportError: no header, or a length over the bound. The rest of the stream cannot be read.
    """
    magic, version, tag, length = _unpack(_HEADER, data, "frame header")
    if magic != b"SMFR" or version != VERSION:
        raise TransportError(f"a frame header expected, got {bytes(data[:8])!r}")
    if length > max_frame_bytes:
        raise TransportError(f"a frame of {length} bytes is over the bound of {max_frame_bytes}")
    return tag, length


def pack_refusal(reason: str) -> bytes:
    """Packs the reason that is sent on a connection before it is closed."""
    return _REFUSAL.pack(b"SMNO", reason.encode()[:60])


def unpack_refusal(data: bytes) -> str | None:
    """Returns the reason in a refusal, or None if `data` is not a refusal."""
    if len(data) < REFUSAL_BYTES:
        return None
    magic, reason = _REFUSAL.unpack(data[:REFUSAL_BYTES])
    return str(reason.rstrip(b"\0").decode(errors="replace")) if magic == b"SMNO" else None


def _unpack(form: struct.Struct, data: bytes | memoryview, what: str) -> tuple[Any, ...]:
    if len(data) != form.size:
        raise TransportError(f"a {what} has {form.size} bytes, not {len(data)}")
    return form.unpack(data)
