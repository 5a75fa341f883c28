"""Tag matching in host memory: posted receives, and messages that arrived before a receive was posted.

As in MPI, a message without a posted receive is called unexpected.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from stagemesh.errors import TransportError

from .base import FENCES

Message = TypeVar("Message")


class HostRequest:
    """A send or receive on host memory. It keeps the buffer alive through `view` until it is done."""

    __slots__ = ("_land", "done", "error", "nbytes", "on_cancel", "view")

    def __init__(self, view: memoryview, land: Callable[[], object] | None = None) -> None:
        """`land`: function to call when all bytes of a receive are in `view`."""
        self.view: memoryview | None = view
        self.nbytes = view.nbytes
        self.done = False
        self.error: TransportError | None = None
        self._land = land
        self.on_cancel: Callable[[HostRequest], None] | None = None
        """Function that `cancel` calls."""

    def finish(self, error: TransportError | None = None) -> None:
        """Ends the request, and frees its buffer."""
        if self.done:
            return
        if error is None and self._land is not None:
            self._land()
        self.error = error
        self.view = None
        self._land = self.on_cancel = None
        self.done = True

    def take(self, tag: int, message: bytearray | memoryview) -> None:
        """Ends a receive by copying a whole message, or with an error if the message's size is wrong."""
        if self.view is None or len(message) != self.nbytes:
            self.finish(wrong_size(tag, len(message), self.nbytes))
        else:
            self.view[:] = message
            self.finish()

    def cancel(self) -> None:
        """See `Request.cancel`."""
        if self.on_cancel is not None:
            self.on_cancel(self)


def cancelled() -> TransportError:
    """Makes the error of a request that was cancelled before its message came."""
    return TransportError("cancelled")


def wrong_size(tag: int, got: int, expected: int) -> TransportError:
    """Makes the error of a receive whose message and buffer differ in size."""
    return TransportError(f"the message with tag {tag:#018x} has {got} bytes, its receive expected {expected}")


class Mailbox(Generic[Message]):
    """Posted receives and unexpected messages, by tag. `Message` is a transport's type of an unexpected message."""

    def __init__(self) -> None:
        self._posted: dict[int, deque[HostRequest]] = {}
        self._unexpected: dict[int, deque[Message]] = {}
        self._fences: deque[tuple[int, int]] = deque(maxlen=FENCES)
        self.late_count = 0
        """Number of late messages; see `Transport.late_count`."""

    def post(self, tag: int, request: HostRequest) -> Message | None:
        """Posts a receive. If an unexpected message matches, returns that message instead."""
        message = _pop(self._unexpected, tag)
        if message is None:
            self._posted.setdefault(tag, deque()).append(request)
            request.on_cancel = lambda r: self._unpost(tag, r)
        return message

    def match(self, tag: int) -> HostRequest | None:
        """Removes and returns the oldest receive posted for an arriving message, or None."""
        return _pop(self._posted, tag)

    def keep(self, tag: int, message: Message) -> None:
        """Keeps an unexpected message."""
        self._unexpected.setdefault(tag, deque()).append(message)

    @property
    def unexpected(self) -> Iterator[Message]:
        """All unexpected messages."""
        return itertools.chain.from_iterable(self._unexpected.values())

    def has(self, tag: int) -> bool:
        """Whether there is an unexpected message with this tag."""
        return tag in self._unexpected

    def fenced(self, tag: int) -> bool:
        """Whether an arriving message with this tag must be dropped. If so, it is counted as late."""
        late = any((tag ^ value) & mask == 0 for value, mask in self._fences)
        self.late_count += late
        return late

    def discard(self, tag: int, mask: int, forever: bool) -> list[Message]:
        """Removes and returns all unexpected messages whose tag equals `tag` in the bits of `mask`."""
        if forever:
            self._fences.append((tag, mask))
        stale = [kept for kept in self._unexpected if (kept ^ tag) & mask == 0]
        return [message for kept in stale for message in self._unexpected.pop(kept)]

    def fail_all(self, error: TransportError) -> None:
        """Ends every posted receive."""
        posted, self._posted = self._posted, {}
        for queue in posted.values():
            for request in queue:
                request.finish(error)

    def _unpost(self, tag: int, request: HostRequest) -> None:
        posted = self._posted.get(tag)
        if posted is None or request not in posted:
            return
        posted.remove(request)
        if not posted:
            del self._posted[tag]
        request.finish(cancelled())


Item = TypeVar("Item")


def _pop(queues: dict[int, deque[Item]], tag: int) -> Item | None:
    """Removes and returns a tag's oldest item. Removes the queue with its last item."""
    queue = queues.get(tag)
    if queue is None:
        return None
    item = queue.popleft()
    if not queue:
        del queues[tag]
    return item
