"""A third transport, within one process: for tests, which run on it beside UCX and TCP.

Small messages are copied when they are sent. Larger ones stay in the sender's buffer until the receiver takes them, as
with a rendezvous over UCX, so that code that frees a buffer too early fails here, too. Two transports may be driven by
two threads; each one by one thread.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections import deque
from dataclasses import dataclass
from weakref import WeakValueDictionary

from stagemesh.errors import TransportError
from stagemesh.transport import Transport, open_transport
from stagemesh.transport.base import Buffer, recv_view, send_view
from stagemesh.transport.mailbox import HostRequest, Mailbox

EAGER_BYTES = 8192

_transports: WeakValueDictionary[bytes, InprocTransport] = WeakValueDictionary()


@dataclass(slots=True)
class _Message:
    tag: int
    view: memoryview
    request: HostRequest | None  # the sender's, for a rendezvous
    sender: InprocTransport


class InprocTransport:
    """See `Transport`."""

    name = "inproc"

    def __init__(self) -> None:
        self._address = b"inproc:" + os.urandom(16)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._inbox: deque[_Message] = deque()
        self._mailbox: Mailbox[_Message] = Mailbox()
        self._peers: list[InprocPeer] = []
        self._completed = False
        self.closed = False
        _transports[self._address] = self

    def address(self) -> bytes:
        return self._address

    def connect(self, address: bytes, *, timeout_s: float | None = None) -> InprocPeer:
        remote = _transports.get(address)
        if remote is None:
            raise TransportError(f"no in-process transport has the address {address[:32]!r}")
        peer = InprocPeer(self, remote)
        self._peers.append(peer)
        return peer

    def recv(self, tag: int, buffer: Buffer) -> HostRequest:
        view, land = recv_view(buffer)
        request = HostRequest(view, land)
        message = self._mailbox.post(tag, request)
        if message is not None:
            _deliver(message, request)
        return request

    def probe(self, tag: int) -> bool:
        return self._mailbox.has(tag)

    def discard(self, tag: int, mask: int, *, forever: bool = False) -> int:
        self.progress()
        stale = self._mailbox.discard(tag, mask, forever)
        for message in stale:
            _drop(message)
        return len(stale)

    @property
    def late_count(self) -> int:
        return self._mailbox.late_count

    def progress(self) -> bool:
        happened, self._completed = self._completed, False
        while self._inbox:
            message = self._inbox.popleft()
            happened = True
            request = self._mailbox.match(message.tag)
            if request is not None:
                _deliver(message, request)
            elif self._mailbox.fenced(message.tag):
                _drop(message)
            else:
                self._mailbox.keep(message.tag, message)
        return happened

    def doubt(self) -> None:
        """Does nothing: no peer can block another one's messages here."""

    def fds(self) -> list[tuple[int, int]]:
        return [(self._wake_fd, select.POLLIN)]

    def arm(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        return not self._inbox and not self._completed

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for peer in self._peers:
            peer.close()
        self.progress()
        for message in self._mailbox.discard(0, 0, forever=True):
            _drop(message)
        self._mailbox.fail_all(TransportError("the transport was closed"))
        for other in list(_transports.values()):
            other.wake()
        os.close(self._wake_fd)

    def put(self, message: _Message) -> None:
        """Adds a message. The sender calls it, on its own thread."""
        self._inbox.append(message)
        self.wake()

    def wake(self) -> None:
        """Wakes an owner that sleeps on `fds()`."""
        self._completed = True
        if not self.closed:
            os.eventfd_write(self._wake_fd, 1)


class InprocPeer:
    """See `Peer`."""

    route = "in-process"

    def __init__(self, local: InprocTransport, remote: InprocTransport) -> None:
        self._local, self._remote = local, remote
        self._closed = False
        self._live: list[_Message] = []

    @property
    def error(self) -> TransportError | None:
        return TransportError("the in-process peer was closed") if self._remote.closed else None

    def send(self, tag: int, buffer: Buffer) -> HostRequest:
        if self._closed or self._remote.closed:
            raise self.error or TransportError("this peer was closed")
        view = send_view(buffer)
        request = HostRequest(view)
        if view.nbytes <= EAGER_BYTES:
            self._remote.put(_Message(tag, memoryview(bytes(view)), None, self._local))
            request.finish()
        else:
            message = _Message(tag, view, request, self._local)
            self._live = [m for m in self._live if m.request is not None and not m.request.done]
            self._live.append(message)
            self._remote.put(message)
        return request

    def close(self) -> None:
        self._closed = True
        for message in self._live:
            if message.request is not None and not message.request.done:
                message.view = memoryview(bytes(message.view))  # the sender's buffer is its own again
                message.request.finish(TransportError("the peer was closed before the message was taken"))
        self._live.clear()


def open_any(name: str) -> Transport:
    """What `open_transport` opens, and "inproc"."""
    return InprocTransport() if name == "inproc" else open_transport(name)


def _deliver(message: _Message, request: HostRequest) -> None:
    request.take(message.tag, message.view)
    _drop(message)


def _drop(message: _Message) -> None:
    if message.request is not None:
        message.request.finish()
        message.sender.wake()
