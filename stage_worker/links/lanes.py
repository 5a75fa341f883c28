"""One gateway session's share of a link: credits on the sending side, buffers on the receiving side.

A lane is opened on both sides with the same number of credits. The sender spends one for each frame; the receiver gives
it back when the frame's buffer is free again, as a running total, so that one credit message makes up for those before.
A lane ends with a FIN that says how many frames there were. Only when the receiver has accounted for each of them
(used, dropped, or landed in a cancelled buffer) is the slot free: so no late frame is taken for one of the next lane.
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
"""Receives announced but without a buffer yet, for each lane."""


class _Lane:
    """What both sides have in common: the other one's count, and messages under way."""

    def __init__(self, transport: Transport, peer: Peer, identity: LinkIdentity, slot: int, word: int) -> None:
        """`word`: that brings the other side's count (wire.py)."""
        self._transport, self._peer, self._identity, self._slot = transport, peer, identity, slot
        self._sends: list[tuple[Request, object]] = []  # with the buffer each one reads
        self._count_tag = tag_of(identity.nonce, slot, word)
        self._count_buffer = bytearray(COUNT_BYTES)
        self._count = transport.recv(self._count_tag, self._count_buffer)
        self.closing = self.drained = self._abandoned = False

    @property
    def idle(self) -> bool:
        """Nothing reads or writes a buffer of this lane any more."""
        return not self._sends and self._count.done

    def abandon(self) -> None:
        """The link is over: no more counts will come."""
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
        """Frames sent whose credit has not come back."""
        return self._sent - self._returned

    @property
    def can_send(self) -> bool:
        """A credit is there. From the first False on, the wait for one is timed."""
        if self.closing:
            return False
        if self.unconsumed < self._identity.credits:
            return True
        if self._blocked_since is None:
            self._blocked_since = time.perf_counter()
        return False

    def send(self, step: int, tensor: torch.Tensor) -> None:
        """Send the activation of a step; `tensor` is kept until the transport is done with it."""
        credits = self._identity.credits
        if self.closing or self.unconsumed >= credits:
            raise TransportError(f"lane {self._slot} has no credit: {self.unconsumed} of {credits} are out")
        self._sends.append((self._peer.send(data_tag(self._identity.nonce, self._slot, step), tensor), tensor))
        self._sent += 1

    def take_wait_send_s(self) -> float:
        """Seconds spent without a credit since the last call."""
        waited, self._wait_send_s = self._wait_send_s, 0.0
        return waited

    def close(self) -> None:
        """Say how many frames there were. The lane is `drained` when the receiver has accounted for all of them."""
        if not self.closing:
            self.closing = True
            self._send_count(FIN, self._sent)

    def progress(self) -> bool:
        """Take credits, let finished buffers go.

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
    buffer: torch.Tensor  # uint8, one of the lane's
    tensor: torch.Tensor  # the part of it that the step fills, in its own shape
    completed_at: float = 0.0  # when it was first seen to be all there; 0 before


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
        self._posts: dict[int, _Post] = {}  # by step modulo SEQ_MODULUS
        self._waiting: deque[tuple[int, tuple[int, ...]]] = deque()  # step, shape
        self._released = 0
        self._accounted = 0  # frames dropped or landed in cancelled buffers, once the lane is closing
        self._quarantine: list[tuple[Request, object]] = []

    def post(self, step: int, shape: tuple[int, ...]) -> None:
        """Announce the frame of a step; its receive is posted now, or when a buffer is free."""
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
        """The activation of a posted step when it is all there. It is the lane's until `release`.

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
        """Writes down when receives were first seen to be complete, for traces."""
        for post in self._posts.values():
            if not post.completed_at and post.request.done:
                post.completed_at = time.monotonic()

    def completed_at(self, step: int) -> float:
        """When the activation of a step was first seen to be all there; 0 when it is not yet."""
        self.note_completed()
        post = self._posts.get(step % SEQ_MODULUS)
        return 0.0 if post is None else post.completed_at

    def release(self, step: int) -> None:
        """The activation was used up: its buffer takes the next frame, the sender gets its credit."""
        post = self._posts.pop(step % SEQ_MODULUS, None)
        if post is None or not post.request.done:
            raise TransportError(f"step {step} is not there to be released on lane {self._slot}")
        self._released += 1
        self._send_count(CREDIT, self._released)
        if self._spares > 0:
            self._spares -= 1  # one buffer more than credits was lent: let it go
        elif self._waiting:
            self._start(*self._waiting.popleft(), post.buffer)
        else:
            self._free.append(post.buffer)

    def close(self) -> None:
        """Cancel what is posted. Buffers are kept until nothing writes them; `drained` when no frame is missing."""
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
        """The link is over: no FIN will come."""
        self.close()
        super().abandon()

    @property
    def idle(self) -> bool:
        """Nothing reads or writes a buffer of this lane any more."""
        return not self._quarantine and super().idle

    @property
    def quarantined(self) -> int:
        """Buffers of cancelled receives that may still be written."""
        return len(self._quarantine)

    def progress(self) -> bool:
        """Lend a spare buffer to a frame that came out of turn; account for the frames of a closing lane."""
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
        """A sender that runs steps in another order than they were posted must not wait for buffers that wait for it.
        Frames that have come are no more than the credits, so neither are the spares."""
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
            return  # What comes now is dropped with all that the link brings.
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
