"""Where the bodies of arriving frames are put."""

from __future__ import annotations

from stagemesh.errors import TransportError

from ..mailbox import HostRequest, Mailbox, wrong_size


class Inbox:
    """A body goes into the buffer of its posted receive. An unexpected one goes into new memory.

    That memory is bounded over all connections, but one unexpected frame is accepted whatever its size.
    """

    def __init__(self, max_unexpected_bytes: int) -> None:
        self._max_bytes = max_unexpected_bytes
        self._bytes = 0
        """Bytes of unexpected frames, including those that are still arriving."""
        self._mailbox: Mailbox[bytearray] = Mailbox()

    @property
    def late_count(self) -> int:
        """See `Transport.late_count`."""
        return self._mailbox.late_count

    # -- the transport's side ---------------------------------------------------------------------------------------

    def post(self, tag: int, request: HostRequest) -> None:
        """Posts a receive. If its frame is here already, ends it."""
        message = self._mailbox.post(tag, request)
        if message is not None:
            self._bytes -= len(message)
            request.take(tag, message)

    def has(self, tag: int) -> bool:
        """True when an unexpected frame with this tag is here."""
        return self._mailbox.has(tag)

    def discard(self, tag: int, mask: int, forever: bool) -> int:
        """See `Transport.discard`. Drops complete frames only."""
        dropped = self._mailbox.discard(tag, mask, forever)
        self._bytes -= sum(map(len, dropped))
        return len(dropped)

    def fail_all(self, error: TransportError) -> None:
        """Ends every posted receive."""
        self._mailbox.fail_all(error)

    # -- a connection's side ----------------------------------------------------------------------------------------

    def place(self, tag: int, length: int) -> HostRequest | memoryview | None:
        """Where the body of an arriving frame goes: a posted receive, or memory. None: it must wait for memory.

        An empty view of another length means that the body must be thrown away.
        """
        request = self._mailbox.match(tag)
        if request is not None:
            if request.nbytes == length:
                return request
            request.finish(wrong_size(tag, length, request.nbytes))
            return memoryview(b"")
        if self._mailbox.fenced(tag):
            return memoryview(b"")
        if self._bytes and self._bytes + length > self._max_bytes:
            return None
        self._bytes += length
        return memoryview(bytearray(length))

    def complete(self, tag: int, body: bytearray) -> None:
        """Takes the complete body of an unexpected frame."""
        request = self._mailbox.match(tag)
        if request is None:
            self._mailbox.keep(tag, body)
        else:  # posted while the frame was on its way
            self._bytes -= len(body)
            request.take(tag, body)

    def give_up(self, length: int) -> None:
        """Frees the memory of an unexpected frame that will not be completed."""
        self._bytes -= length
