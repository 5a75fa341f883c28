"""Messages between a parent and its children about starting. Payloads are in protos/v1/processes.proto.

A call is one datagram, together with the descriptors that it passes. A service writes one frame into a pipe when it
listens.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from enum import IntEnum

from google.protobuf.message import Message

from stagemesh.errors import InternalError
from stagemesh.protos.v1 import processes_pb2

from .frames import Decoder, M, pack, parse

MAX_MESSAGE_BYTES, MAX_FDS = 1 << 16, 253
"""Limits of one datagram. Linux passes at most this many descriptors."""


class Kind(IntEnum):
    """Kind of a frame."""

    IMPORT = 1
    """An order to run this call for its imports."""
    RUN = 2
    """An order to run this call, and to end with its status."""
    FORK = 3
    """An order to fork a process that runs this call."""
    FORKED = 4
    """The process was forked."""
    LISTENING = 5
    """A service listens."""


def send_call(sock: socket.socket, kind: Kind, call: processes_pb2.Call, fds: Sequence[int] = ()) -> None:
    """Sends a call. Raises OSError if the other end is gone, InternalError if the call is too large."""
    data = pack_message(kind, call)
    if len(data) > MAX_MESSAGE_BYTES or len(fds) > MAX_FDS:
        raise InternalError(
            f"a call of {len(data)} bytes with {len(fds)} descriptors does not fit: at most {MAX_MESSAGE_BYTES} and "
            f"{MAX_FDS} do"
        )
    socket.send_fds(sock, [data], list(fds))


def receive_call(sock: socket.socket) -> tuple[Kind, processes_pb2.Call, list[int]] | None:
    """Waits for a call and its descriptors. Returns None if the other end is gone.

    Raises InternalError for any other message.
    """
    data, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE_BYTES, MAX_FDS)
    if not data:
        return None
    kind, _, payload = Decoder(Kind).one(data)
    if kind not in (Kind.IMPORT, Kind.RUN, Kind.FORK):
        raise InternalError(f"{kind.name} came where a call was expected")
    return kind, parse(processes_pb2.Call, payload), fds


def pack_message(kind: Kind, message: Message) -> bytes:
    """Packs a message into one frame."""
    return pack(kind, 0, message.SerializeToString())


def unpack(kind: Kind, message: type[M], data: bytes) -> M:
    """Returns the message in the single frame `data`. Raises InternalError for anything but a frame of this kind."""
    came, _, payload = Decoder(Kind).one(data)
    if came is not kind:
        raise InternalError(f"{came.name} came where {kind.name} was expected")
    return parse(message, payload)
