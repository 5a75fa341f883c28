"""One gateway session's share of a link: credits on the sending side, buffers on the receiving side.

Both sides open a lane with the same number of credits. The sender spends one for each frame. The receiver returns it
when the frame's buffer is free again. Credits are sent as a running total, so one message replaces those before it.
A lane ends with a FIN, which says how many frames were sent. The slot is free only when the receiver has accounted for
each frame (used, dropped, or written into a cancelled buffer). So no late frame is taken for one of the next lane.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass

import torch

from stagemesh.errors import TransportError
from stagemesh.transport.base import Peer, Request, Transport

from .wire import (
    COUNT_BYTES,
    CREDIT,
    FIN,
    LANE_MASK,
    SEQ_MODULUS,
    LinkIdentity,
    data_tag,
    pack_count,
    tag_of,
    unpack_count,
)

MAX_WAITING = 4096
"""Limit, for each lane, of announced receives that have no buffer yet."""


class _Lane:
    """The common part of both sides: the other side's count, and sends under way."""

    def __init__(self, transport: Transport, peer: Peer, identity: LinkIdentity, slot: int, word: int) -> None:
        """`word`: the control word that carries the other side's count (wire.py)."""
        self._transport, self._peer, self._identity, self._slot = transport, peer, identity, slot
        self._sends: list[tuple[Request, object]] = []  # Requests, each with the buffer that it reads.
        self._count_tag = tag_of(identity.nonce, slot, word)
        self._count_buffer = bytearray(COUNT_BYTES)
        self._count = transport.recv(self._count_tag, self._count_buffer)
        self.closing = self.drained = self._abandoned = False

    @property
    def idle(self) -> bool:
        """Whether nothing reads or writes a buffer of this lane any more."""
        return not self._sends and self._count.done

    def abandon(self) -> None:
        """Ends the lane with its link: no more counts will come."""
        self.closing = self._abandoned = True
        self._count.cancel()

    def _send_count(self, word: int, count: int, *, last: bool = False) -> None:
        message = bytearray(pack_count(count, last=last))
        request = self._peer.send(tag_of(self._identity.nonce, self._slot, word), message)
        if not request.done:
            self._sends.append((request, message))


class SendLane(_Lane):
    """The sending side of a lane."""

    def __init__(self, transport: Transport, peer: Peer, identity: LinkIdentity, slot: int) -> None:
        super().__init__(transport, peer, identity, slot, CREDIT)
        self._sent = self._returned = 0
        self._blocked_since: float | None = None
        self._wait_send_s = 0.0

    @property
    def unconsumed(self) -> int:
        """Number of frames sent whose credit has not come back."""
        return self._sent - self._returned

    @property
    def can_send(self) -> bool:
        """Whether there is a credit. The first False starts the measurement of the wait for one."""
        if self.closing:
            return False
        if self.unconsumed < self._identity.credits:
            return True
        if self._blocked_since is None:
            self._blocked_since = time.perf_counter()
        return False

    def send(self, step: int, tensor: torch.Tensor) -> None:
        """Sends the activation of a step. Keeps `tensor` until the transport is done with it."""
        credits = self._identity.credits
        if self.closing or self.unconsumed >= credits:
            raise TransportError(f"lane {self._slot} has no credit: {self.unconsumed} of {credits} are out")
        self._sends.append((self._peer.send(data_tag(self._identity.nonce, self._slot, step), tensor), tensor))
        self._sent += 1

    def take_wait_send_s(self) -> float:
        """Returns the seconds spent without a credit since the last call."""
        waited, self._wait_send_s = self._wait_send_s, 0.0
        return waited

    def close(self) -> None:
        """Tells the receiver how many frames were sent. The lane is `drained` when it has accounted for all of them."""
        if not self.closing:
            self.closing = True
            self._send_count(FIN, self._sent)

    def progress(self) -> bool:
        """Takes credits that have come back. Releases buffers of finished sends.

        Raises:
            TransportError: a send failed.
        """
        happened = False
        if self._sends and any(request.done for request, _ in self._sends):
            happened = True
            finished = [request for request, _ in self._sends if request.done]
            self._sends = [entry for entry in self._sends if not entry[0].done]
            for request in finished:
                if request.error is not None and not self.closing:
                    raise request.error
        while not (self.drained or self._abandoned) and self._count.done and self._count.error is None:
            happened = True
            self._take_credit()
        return happened

    def _take_credit(self) -> None:
        returned, last = unpack_count(bytes(self._count_buffer))
        if not self._returned <= returned <= self._sent:
            raise TransportError(f"lane {self._slot}: {returned} credits came back for {self._sent} frames")
        self._returned = returned
        if self._blocked_since is not None and self.unconsumed < self._identity.credits:
            self._wait_send_s += time.perf_counter() - self._blocked_since
            self._blocked_since = None
        if last and self.closing:
            self.drained = True
        else:
            self._count = self._transport.recv(self._count_tag, self._count_buffer)


@dataclass(slots=True)
class _Post:
    request: Request
    buffer: torch.Tensor  # Buffer of the lane, uint8.
    tensor: torch.Tensor  # View of the part that the step fills, in the step's shape.
    completed_at: float = 0.0  # Time when it was first seen to be complete; 0 before.


class ReceiveLane(_Lane):
    """The receiving side of a lane: `credits` buffers of `max_bytes`, allocated once."""

    def __init__(
        self, transport: Transport, peer: Peer, identity: LinkIdentity, slot: int, device: torch.device
    ) -> None:
        self._max_bytes, self._device = identity.max_bytes, device
        # Before anything is posted: there may be no memory for them.
        self._free = [self._new_buffer() for _ in range(identity.credits)]
        super().__init__(transport, peer, identity, slot, FIN)
        self._spares = 0
        self._posts: dict[int, _Post] = {}  # Keyed by step modulo SEQ_MODULUS.
        self._waiting: deque[tuple[int, tuple[int, ...]]] = deque()  # Entries: step, shape.
        self._released = 0
        self._accounted = 0  # Frames dropped or written into cancelled buffers since the lane closes.
        self._quarantine: list[tuple[Request, object]] = []

    def post(self, step: int, shape: tuple[int, ...]) -> None:
        """Announces the frame of a step. Posts its receive now, or when a buffer is free."""
        nbytes = math.prod(shape) * self._identity.dtype.itemsize
        if nbytes > self._max_bytes:
            raise TransportError(
                f"step {step} brings {nbytes} bytes, lane {self._slot} has buffers of {self._max_bytes}"
            )
        if self.closing:
            raise TransportError(f"lane {self._slot} is closed")
        if step % SEQ_MODULUS in self._posts:
            raise TransportError(f"step {step} was posted on lane {self._slot} already")
        if self._free and not self._waiting:
            self._start(step, shape, self._free.pop())
        elif len(self._waiting) >= MAX_WAITING:
            raise TransportError(f"lane {self._slot} has {MAX_WAITING} receives waiting for a buffer")
        else:
            self._waiting.append((step, shape))

    def ready(self, step: int) -> torch.Tensor | None:
        """Returns the activation of a posted step if it is complete, else None. The lane owns it until `release`.

        Raises:
            TransportError: its receive failed.
        """
        post = self._posts.get(step % SEQ_MODULUS)
        if post is None or not post.request.done:
            return None
        if post.request.error is not None:
            raise post.request.error
        return post.tensor

    def note_completed(self) -> None:
        """Records when receives were first seen to be complete, for traces."""
        for post in self._posts.values():
            if not post.completed_at and post.request.done:
                post.completed_at = time.monotonic()

    def completed_at(self, step: int) -> float:
        """Time when the activation of a step was first seen to be complete; 0 if it is not complete."""
        self.note_completed()
        post = self._posts.get(step % SEQ_MODULUS)
        return 0.0 if post is None else post.completed_at

    def release(self, step: int) -> None:
        """Frees the buffer of a used activation for the next frame. Returns the credit to the sender."""
        post = self._posts.pop(step % SEQ_MODULUS, None)
        if post is None or not post.request.done:
            raise TransportError(f"step {step} is not there to be released on lane {self._slot}")
        self._released += 1
        self._send_count(CREDIT, self._released)
        if self._spares > 0:
            self._spares -= 1  # More buffers than credits exist: free this one.
        elif self._waiting:
            self._start(*self._waiting.popleft(), post.buffer)
        else:
            self._free.append(post.buffer)

    def close(self) -> None:
        """Cancels posted receives. Keeps their buffers until nothing writes them.

        The lane is `drained` when no frame is missing.
        """
        if self.closing:
            return
        self.closing = True
        self._waiting.clear()
        for post in self._posts.values():
            post.request.cancel()
            self._quarantine.append((post.request, post.buffer))
        self._posts.clear()
        self._free.clear()

    def abandon(self) -> None:
        """Ends the lane with its link: no FIN will come."""
        self.close()
        super().abandon()

    @property
    def idle(self) -> bool:
        """Nothing reads or writes a buffer of this lane any more."""
        return not self._quarantine and super().idle

    @property
    def quarantined(self) -> int:
        """Number of buffers of cancelled receives that may still be written."""
        return len(self._quarantine)

    def progress(self) -> bool:
        """Lends a spare buffer to a frame that came out of order. Accounts for the frames of a closing lane."""
        happened = False
        self.note_completed()
        if self._sends:
            self._sends = [entry for entry in self._sends if not entry[0].done]
        if self._waiting:
            happened = self._lend()
        if self.closing and not self.drained:
            self._account()
        return happened

    def _lend(self) -> bool:
        """Gives spare buffers to frames that have come and have none. Returns whether it did.

        Without them, a sender that runs steps in another order than they were posted could deadlock with the receiver.
        At most as many frames as credits can have come, so that is also the limit of spare buffers.
        """
        lent = False
        for waiting in list(self._waiting):
            tag = data_tag(self._identity.nonce, self._slot, waiting[0])
            if self._spares < self._identity.credits and self._transport.probe(tag):
                self._waiting.remove(waiting)
                self._spares += 1
                self._start(*waiting, self._new_buffer())
                lent = True
        return lent

    def _account(self) -> None:
        still: list[tuple[Request, object]] = []
        for request, buffer in self._quarantine:
            if not request.done:
                still.append((request, buffer))
            elif request.error is None:
                self._accounted += 1
        self._quarantine = still
        if self._abandoned:
            return  # The transport drops all further frames of the link.
        self._accounted += self._transport.discard(tag_of(self._identity.nonce, self._slot, 0), LANE_MASK)
        if not self._count.done or self._count.error is not None:
            return
        sent, _ = unpack_count(bytes(self._count_buffer))
        if not self._quarantine and self._released + self._accounted >= sent:
            self._released = sent
            self._send_count(CREDIT, sent, last=True)
            self.drained = True

    def _start(self, step: int, shape: tuple[int, ...], buffer: torch.Tensor) -> None:
        dtype = self._identity.dtype
        part = buffer[: math.prod(shape) * dtype.itemsize]
        request = self._transport.recv(data_tag(self._identity.nonce, self._slot, step), part)
        self._posts[step % SEQ_MODULUS] = _Post(request, buffer, part.view(dtype).view(shape))

    def _new_buffer(self) -> torch.Tensor:
        return torch.empty(max(self._max_bytes, 1), dtype=torch.uint8, device=self._device)
