"""Messages between a parent and its children about starting. Payloads are in protos/v1/processes.proto.

A call is one datagram, together with the descriptors that it hands over. A service writes one frame into a pipe when it
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
"""Most of one datagram. Linux takes no more descriptors."""


class Kind(IntEnum):
    """Kind of a frame."""

    IMPORT = 1
    """Run this call, for what it imports."""
    RUN = 2
    """Run this call, and end with its status."""
    FORK = 3
    """Fork a process that runs this call."""
    FORKED = 4
    """The process was forked."""
    LISTENING = 5
    """A service listens."""


def send_call(sock: socket.socket, kind: Kind, call: processes_pb2.Call, fds: Sequence[int] = ()) -> None:
    """Sends a call. Raises OSError when the other end is gone, InternalError for a call that is too large."""
    data = pack_message(kind, call)
    if len(data) > MAX_MESSAGE_BYTES or len(fds) > MAX_FDS:
        raise InternalError(
            f"a call of {len(data)} bytes with {len(fds)} descriptors does not fit: at most {MAX_MESSAGE_BYTES} and "
            f"{MAX_FDS} do"
        )
    socket.send_fds(sock, [data], list(fds))


def receive_call(sock: socket.socket) -> tuple[Kind, processes_pb2.Call, list[int]] | None:
    """Waits for a call and its descriptors. None when the other end is gone.

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
    """One frame with a message in it."""
    return pack(kind, 0, message.SerializeToString())


def unpack(kind: Kind, message: type[M], data: bytes) -> M:
    """The message in the one frame that `data` holds. Raises InternalError for a frame of another kind, or none."""
    came, _, payload = Decoder(Kind).one(data)
    if came is not kind:
        raise InternalError(f"{came.name} came where {kind.name} was expected")
    return parse(message, payload)
