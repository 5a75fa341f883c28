"""What a parent and its children say to each other about starting; payloads are those of protos/v1/processes.proto.

Calls travel as one datagram each, beside the descriptors that they come with; that a service listens is told by one
frame in a pipe.
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
"""Of one datagram; Linux takes no more descriptors in one."""


class Kind(IntEnum):
    """What a frame says."""

    IMPORT = 1
    """Run this call now, for what it imports."""
    RUN = 2
    """Be this call, to its end."""
    FORK = 3
    """Fork a process that is this call."""
    FORKED = 4
    """That was done."""
    LISTENING = 5
    """A service listens."""


@dataclass(frozen=True)
class Received:
    """A call, and the descriptors that came with it."""

    kind: Kind
    call: processes_pb2.Call
    fds: list[int]


def send_call(sock: socket.socket, kind: Kind, call: processes_pb2.Call, fds: Sequence[int] = ()) -> None:
    """Raises OSError when the other end is gone, InternalError for what does not fit."""
    data = pack(kind, 0, call.SerializeToString())
    if len(data) > MAX_MESSAGE_BYTES or len(fds) > MAX_FDS:
        raise InternalError(
            f"a call of {len(data)} bytes with {len(fds)} descriptors does not fit: at most {MAX_MESSAGE_BYTES} and "
            f"{MAX_FDS} do"
        )
    socket.send_fds(sock, [data], list(fds))


def receive_call(sock: socket.socket) -> Received | None:
    """Waits for a call; None when the other end is gone. Raises InternalError for what is none."""
    data, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE_BYTES, MAX_FDS)
    if not data:
        return None
    kind, _, payload = Decoder(Kind).one(data)
    if kind not in (Kind.IMPORT, Kind.RUN, Kind.FORK):
        raise InternalError(f"{kind.name} came where a call was expected")
    return Received(kind, parse(processes_pb2.Call, payload), fds)


def pack_forked(pid: int) -> bytes:
    """To whoever asked for a fork."""
    return pack(Kind.FORKED, 0, processes_pb2.Forked(pid=pid).SerializeToString())


def unpack_forked(data: bytes) -> int:
    """The process id. Raises InternalError for another message."""
    return _unpack(Kind.FORKED, processes_pb2.Forked, data).pid


def pack_listening(ports: dict[str, int]) -> bytes:
    """For the parent of a service."""
    return pack(Kind.LISTENING, 0, processes_pb2.Listening(ports=ports).SerializeToString())


def unpack_listening(data: bytes) -> dict[str, int]:
    """Ports by name. Raises InternalError for another message."""
    return dict(_unpack(Kind.LISTENING, processes_pb2.Listening, data).ports)


def _unpack(kind: Kind, message: type[M], data: bytes) -> M:
    came, _, payload = Decoder(Kind).one(data)
    if came is not kind:
        raise InternalError(f"{came.name} came where {kind.name} was expected")
    return parse(message, payload)
