"""Messages between a parent and its children about starting. Payloads are in protos/v1/processes.proto.

A call is one datagram, together with the descriptors that it hands over. A service writes one frame into a pipe when it
listens.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

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


@dataclass(frozen=True)
class Received:
    """A call, and its descriptors."""

    kind: Kind
    call: processes_pb2.Call
    fds: list[int]


def send_call(sock: socket.socket, kind: Kind, call: processes_pb2.Call, fds: Sequence[int] = ()) -> None:
    """Sends a call. Raises OSError when the other end is gone, InternalError for a call that is too large."""
    data = pack(kind, 0, call.SerializeToString())
    if len(data) > MAX_MESSAGE_BYTES or len(fds) > MAX_FDS:
        raise InternalError(
            f"a call of {len(data)} bytes with {len(fds)} descriptors does not fit: at most {MAX_MESSAGE_BYTES} and "
            f"{MAX_FDS} do"
        )
    socket.send_fds(sock, [data], list(fds))


def receive_call(sock: socket.socket) -> Received | None:
    """Waits for a call. None when the other end is gone. Raises InternalError for any other message."""
    data, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE_BYTES, MAX_FDS)
    if not data:
        return None
    kind, _, payload = Decoder(Kind).one(data)
    if kind not in (Kind.IMPORT, Kind.RUN, Kind.FORK):
        raise InternalError(f"{kind.name} came where a call was expected")
    return Received(kind, parse(processes_pb2.Call, payload), fds)


def pack_forked(pid: int) -> bytes:
    """A forked process's answer to its parent."""
    return pack(Kind.FORKED, 0, processes_pb2.Forked(pid=pid).SerializeToString())


def unpack_forked(data: bytes) -> int:
    """The process id. Raises InternalError for any other message."""
    return _unpack(Kind.FORKED, processes_pb2.Forked, data).pid


def pack_listening(ports: dict[str, int]) -> bytes:
    """A service's message to its parent."""
    return pack(Kind.LISTENING, 0, processes_pb2.Listening(ports=ports).SerializeToString())


def unpack_listening(data: bytes) -> dict[str, int]:
    """Ports by name. Raises InternalError for any other message."""
    return dict(_unpack(Kind.LISTENING, processes_pb2.Listening, data).ports)


def _unpack(kind: Kind, message: type[M], data: bytes) -> M:
    came, _, payload = Decoder(Kind).one(data)
    if came is not kind:
        raise InternalError(f"{came.name} came where {kind.name} was expected")
    return parse(message, payload)
