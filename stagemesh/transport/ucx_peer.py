"""One UCX endpoint: what it takes, whether the process behind it lives."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagemesh.errors import TransportError

from .base import Buffer

if TYPE_CHECKING:
    from .ucx import UcxRequest, UcxTransport

_ADDRESS = struct.Struct("<4sI16sQIQ")
_CLOSE_PERIOD_NS = 10_000_000
_SHARED_MEMORY = {"posix", "sysv", "cma", "xpmem", "knem", "mm", "self"}


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Which process, on which boot of which host; comparable between processes of one PID namespace."""

    boot_id: bytes
    pid_namespace: int
    pid: int
    start_ticks: int

    @classmethod
    def own(cls) -> ProcessIdentity:
        """This process."""
        boot = bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
        pid = os.getpid()
        return cls(boot, os.stat("/proc/self/ns/pid").st_ino, pid, _start_ticks(pid) or 0)

    def watch(self, own: ProcessIdentity) -> int | None:
        """A pidfd of this process, readable when it ends. None where it is out of sight, or `own` itself.

        Raises:
            TransportError: it has ended already.
        """
        if (self.boot_id, self.pid_namespace) != (own.boot_id, own.pid_namespace) or self.pid == own.pid:
            return None
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError as error:
            raise TransportError(f"the peer process {self.pid} has ended") from error
        except OSError:
            return None  # a kernel or sandbox without pidfd: UCX's keep-alive is left
        if _start_ticks(self.pid) != self.start_ticks:
            os.close(pidfd)
            raise TransportError(f"the peer process {self.pid} has ended, another has its number")
        return pidfd

    @property
    def shares_network(self) -> bool:
        """Whether this process of the own host has the same interfaces, and so no network in between."""
        try:
            return os.stat(f"/proc/{self.pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
        except OSError:
            return False


def pack_address(identity: ProcessIdentity, ucx_address: bytes) -> bytes:
    """A UCX worker address with the process it belongs to, and a checksum: UCX itself trusts what it is given."""
    body = (
        _ADDRESS.pack(b"SMU1", 0, identity.boot_id, identity.pid_namespace, identity.pid, identity.start_ticks)
        + ucx_address
    )
    return body[:4] + struct.pack("<I", zlib.crc32(body)) + body[8:]


def unpack_address(address: bytes) -> tuple[ProcessIdentity, bytes]:
    """The parts of `pack_address`.

    Raises:
        TransportError: not a UCX address of this version, or damaged.
    """
    if len(address) <= _ADDRESS.size or address[:4] != b"SMU1":
        raise TransportError(f"not a UCX address: {len(address)} bytes that begin with {address[:8]!r}")
    _, crc, boot_id, namespace, pid, start_ticks = _ADDRESS.unpack_from(address)
    if zlib.crc32(address[:4] + b"\0\0\0\0" + address[8:]) != crc:
        raise TransportError("the UCX address is damaged: its checksum does not fit")
    return ProcessIdentity(boot_id, namespace, pid, start_ticks), address[_ADDRESS.size :]


class Endpoint:
    """One UCX endpoint for all peers of a transport that have the same address.

    UCX pairs the endpoints of two workers in the order in which each made its own, and what is left of a pair is failed
    when the other one is closed. So with one for each link, closing one would break whichever link the other side's
    happens to be for. And where no network is in between it is `kept` as long as the peer's process runs, also while
    no link uses it: the other side may be making the next link, on its own, already. Elsewhere it is closed with its
    last user: behind a cut that has healed a new connection comes up sooner than one that waits to send again.
    """

    def __init__(self, transport: UcxTransport, raw: Any, pidfd: int | None = None, *, kept: bool = False) -> None:
        self._transport, self.raw, self.pidfd, self._kept = transport, raw, pidfd, kept
        self.users: set[UcxPeer] = set()
        self._closed = False

    @property
    def alive(self) -> bool:
        """Neither closed nor given up by UCX."""
        return not self._closed and bool(self.raw.alive)

    @property
    def why(self) -> str:
        """What UCX says of its end, in brackets; empty where it says nothing."""
        try:
            self.raw.raise_on_error()
        except self._transport.lib.UCXError as error:
            return f" ({error})"
        return ""

    def release(self, peer: UcxPeer) -> None:
        """A user less."""
        self.users.discard(peer)
        if not self.users and not (self._kept and self.alive):
            self.close()

    def died(self) -> None:
        """Its process has ended: ends what is under way."""
        for peer in list(self.users):
            peer.fail(TransportError("the peer process has ended"))
        self.close()
        # It may have ended within a send.
        self._transport.doubt()

    def close(self) -> None:
        """Ends it, and its users with it."""
        for peer in list(self.users):
            if peer.error is None:
                peer.close()
        if self._closed:
            return
        if self.alive:
            # Forced: ends the requests under way, also a rendezvous that waits for a dead peer, which `close` would
            # leave open. It takes microseconds.
            self.raw.close_blocking(_CLOSE_PERIOD_NS, 1)
        self._closed = True
        if self.pidfd is not None:
            self._transport.unwatch(self.pidfd)
            os.close(self.pidfd)


class UcxPeer:
    """See `Peer`."""

    def __init__(self, transport: UcxTransport, endpoint: Endpoint) -> None:
        self._transport = transport
        self._endpoint: Endpoint | None = endpoint
        endpoint.users.add(self)
        self._error: TransportError | None = None
        self._route = "unknown"

    @property
    def error(self) -> TransportError | None:
        if self._error is None and self._endpoint is not None and not self._endpoint.alive:
            self.fail(TransportError(f"the peer is gone: its UCX endpoint failed{self._endpoint.why}"))
            self._transport.doubt()
        return self._error

    @property
    def route(self) -> str:
        if self._endpoint is not None and self.error is None:
            self._route = self._transport.route_of(self._endpoint.raw)
        return self._route

    def send(self, tag: int, buffer: Buffer) -> UcxRequest:
        if self.error is not None or self._endpoint is None:
            raise self._error or TransportError("this peer was closed")
        array, nbytes = self._transport.array(buffer, writable=False)
        raw = self._endpoint.raw.tag_send(array, self._transport.tag(tag))
        return self._transport.track(raw, (array, buffer), nbytes, None)

    def close(self) -> None:
        self.fail(TransportError("this peer was closed"))

    def fail(self, error: TransportError) -> None:
        """Nothing goes this way any more."""
        self._error = self._error or error
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            endpoint.release(self)


def endpoint_route(handle: int) -> str:
    """The transports that UCX chose for the messages sent so far on an endpoint, from its own description.

    The description holds one table for each kind of message that was sent ("tagged message by ... from host memory"),
    whose last column names transport and device of each size range. Before the first message there is none.
    """
    text = _describe(handle)
    used = {match.group(1) for match in re.finditer(r"\|\s*(\w+)/[\w:.-]+\s*\|\s*$", text, re.MULTILINE)}
    if not used:
        return "unknown"
    return "+".join(sorted({"shared memory" if name in _SHARED_MEMORY else name for name in used}))


_libraries: list[ctypes.CDLL] = []


def _libucp() -> ctypes.CDLL:
    """The libucp that ucxx loaded into this process."""
    if not _libraries:
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "libucp" in line:
                _libraries.append(ctypes.CDLL(line.split(maxsplit=5)[5]))
                break
        else:
            raise TransportError("libucp is not loaded in this process")
    return _libraries[0]


def _describe(handle: int) -> str:
    libc = ctypes.CDLL(None)
    libc.open_memstream.restype = ctypes.c_void_p
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
    _libucp().ucp_ep_print_info(ctypes.c_void_p(handle), stream)
    libc.fclose(stream)
    try:
        return ctypes.string_at(text, size.value).decode(errors="replace")
    finally:
        libc.free(text)


def _start_ticks(pid: int) -> int | None:
    """When a process began, in ticks since boot; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])
