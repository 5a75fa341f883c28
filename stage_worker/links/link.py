"""A link: a directed stream of activations between two ranks, over any transport.

The receiver makes nonce and secret, gRPC carries them and both addresses; the sender says hello on the link itself, the
receiver checks epoch, secret and row shape, and answers. Then lanes are opened, one for each gateway session, with
credits. Neither end blocks or owns a thread: the engine calls `transport.progress()`, then `progress()` of its links. A
peer that dies shows as `error`; one that hangs does not: step deadlines see that.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

import torch

from stagemesh.errors import StagemeshError, TransportError
from stagemesh.transport.base import Peer, Request, Transport

from .lanes import ReceiveLane, SendLane
from .wire import (
    ACK_BYTES,
    CONTROL_SLOT,
    HELLO,
    HELLO_ACK,
    HELLO_BYTES,
    LINK_MASK,
    LinkIdentity,
    pack_ack,
    tag_of,
    unpack_ack,
)

__all__ = ["LinkIdentity", "LinkReceiver", "LinkSender", "LinkState", "sending_rank"]

DOUBT = 0.25
"""Of the time for a handshake: what is not answered by then may be an end that hears nobody."""

LinkState = Literal["connecting", "ready", "failed", "closed"]


def sending_rank(rank: int, senders: int, receivers: int) -> int:
    """Which of `senders` ranks the receiving rank `rank` of `receivers` reads the (replicated) activation from."""
    if not 0 <= rank < receivers or senders < 1:
        raise TransportError(f"no rank {rank} among {receivers} receivers of {senders} senders")
    return rank * senders // receivers


Lane = TypeVar("Lane", SendLane, ReceiveLane)


class _Link(ABC, Generic[Lane]):
    """What both ends have in common: a peer, a state, a deadline, lanes."""

    def __init__(
        self, transport: Transport, address: bytes, identity: LinkIdentity, timeout_s: float, word: int, nbytes: int
    ) -> None:
        """`word`: what the other side says in the handshake (wire.py), in a message of `nbytes`."""
        self._transport, self._identity = transport, identity
        self._peer: Peer = transport.connect(address, timeout_s=timeout_s)
        self._timeout_s = timeout_s
        self._began_at = time.monotonic()
        self._doubted = False
        self._lanes: dict[int, Lane] = {}
        self.state: LinkState = "connecting"
        self.error: StagemeshError | None = None
        self._word_tag = self._tag(word)
        self._word_buffer = bytearray(nbytes)
        self._word = transport.recv(self._word_tag, self._word_buffer)
        self._said: list[tuple[Request, bytearray]] = []

    @abstractmethod
    def _take_word(self, word: bytes) -> None:
        """Goes on with the handshake. Raises what is to end the link."""

    @abstractmethod
    def _make_lane(self, slot: int) -> Lane: ...

    @property
    def heard(self) -> bool:
        """Whether the other side's word of the handshake has come; `progress` takes it."""
        return self._word.done

    @property
    def identity(self) -> LinkIdentity:
        """What both ends agreed on."""
        return self._identity

    @property
    def up(self) -> bool:
        """The hello was sent and welcomed: activations may flow. Lanes can be opened before."""
        return self.state == "ready"

    @property
    def route(self) -> str:
        """See `Peer.route`."""
        return self._peer.route

    def lane_closed(self, slot: int) -> bool:
        """The slot is free."""
        return slot not in self._lanes

    def progress(self, now: float | None = None) -> bool:
        """Handshake, credits, finished sends, buffers for early frames; True when something happened. A failure is
        found in `error`.

        Args:
            now: `time.monotonic()`, where the caller has it at hand.
        """
        happened = False
        try:
            if self.state == "connecting" and self.heard:
                # Before the deadline is looked at: what came within a long step has been seen by nobody yet.
                happened = True
                if self._word.error is not None:
                    raise self._word.error
                self._take_word(bytes(self._word_buffer))
            if self.state in ("connecting", "ready"):
                self._check(now)
            for slot, lane in list(self._lanes.items()):
                happened |= lane.progress()
                if lane.drained and lane.idle:
                    del self._lanes[slot]
        except StagemeshError as error:
            self._fail(error)
            return True
        return happened

    def open_lane(self, slot: int) -> None:
        """Start a lane; the other end opens it, too. Its buffers are allocated here and never again.

        Raises:
            TransportError: the slot is taken or out of range, or the link is over.
        """
        if not 0 <= slot < CONTROL_SLOT:
            raise TransportError(f"slot {slot} is not between 0 and {CONTROL_SLOT - 1}")
        if slot in self._lanes:
            raise TransportError(f"slot {slot} is in use, or its last frames are not accounted for yet")
        if self.over:
            raise self.error or TransportError("the link is closed")
        self._lanes[slot] = self._make_lane(slot)

    def close_lane(self, slot: int) -> None:
        """End a lane: what it posted is cancelled, its buffers are kept until nothing uses them, late frames dropped.
        Its slot may be opened again once `lane_closed`, which takes the other end's `close_lane`, too."""
        lane = self._lanes.get(slot)
        if lane is None or self.over:
            return
        try:
            lane.close()
        except TransportError as error:
            self._fail(error)

    @property
    def over(self) -> bool:
        """It has failed or was closed."""
        return self.state in ("failed", "closed")

    @property
    def drained(self) -> bool:
        """The link is over, and nothing reads or writes a buffer of it any more."""
        handshake = self._word.done and all(said.done for said, _ in self._said)
        return self.over and handshake and all(lane.idle for lane in self._lanes.values())

    def close(self) -> None:
        """End the link at once. Go on with `progress()` until it is `drained`: only then are tensors and buffers
        free."""
        self._end("closed")

    def _fail(self, error: StagemeshError) -> None:
        if not self.over:
            self.error = error
            self._end("failed")

    def _end(self, state: LinkState) -> None:
        if self.over:
            return
        self.state = state
        for lane in self._lanes.values():
            lane.abandon()
        self._let_go()
        self._peer.close()

    def _let_go(self) -> None:
        """Nothing of the other side is waited for any more."""
        self._word.cancel()

    def _say(self, word: int, message: bytes) -> None:
        """Sends a message of the handshake."""
        buffer = bytearray(message)
        self._said = [entry for entry in self._said if not entry[0].done]
        self._said.append((self._peer.send(self._tag(word), buffer), buffer))

    def _tag(self, seq: int) -> int:
        return tag_of(self._identity.nonce, CONTROL_SLOT, seq)

    def _check(self, now: float | None) -> None:
        """Raises TransportError when the peer is gone, or silent beyond the deadline of the handshake."""
        if self._peer.error is not None:
            raise self._peer.error
        if self.state != "connecting":
            return
        waited_s = (time.monotonic() if now is None else now) - self._began_at
        if waited_s > self._timeout_s:
            raise TransportError(f"the link was not answered within {self._timeout_s:g} s")
        if waited_s > DOUBT * self._timeout_s and not self._doubted:
            self._doubted = True
            self._transport.doubt()


class LinkSender(_Link[SendLane]):
    """The sending end.

    Args:
        transport: this rank's, driven by the caller.
        peer_address: of the receiver's transport.
        identity: nonce, epoch, secret and row shape that the receiver made known over gRPC.
        timeout_s: until the hello must be answered.

    Raises:
        TransportError: the address is not one of this transport.
    """

    def __init__(
        self, transport: Transport, peer_address: bytes, identity: LinkIdentity, *, timeout_s: float = 5.0
    ) -> None:
        super().__init__(transport, peer_address, identity, timeout_s, HELLO_ACK, ACK_BYTES)
        try:
            self._say(HELLO, identity.hello())
        except TransportError as error:
            self._fail(error)

    def _make_lane(self, slot: int) -> SendLane:
        return SendLane(self._transport, self._peer, self._identity, slot)

    def can_send(self, slot: int) -> bool:
        """The link is ready and the lane has a credit. The time from a False to the credit is counted as wait-send."""
        return self.state == "ready" and self._lanes[slot].can_send

    def send(self, slot: int, step: int, tensor: torch.Tensor) -> None:
        """Send the activation of a step: a contiguous [T, H] tensor, which must not change until it is sent, and is
        kept alive until then.

        Raises:
            TransportError: the link is not ready, has failed, or the lane has no credit.
        """
        if self.state != "ready":
            raise self.error or TransportError(f"the link is {self.state}")
        try:
            self._lanes[slot].send(step, tensor)
        except TransportError as error:
            if self._peer.error is not None:
                self._fail(error)
            raise

    def unconsumed(self, slot: int) -> int:
        """Frames sent on a lane whose credit has not come back."""
        return self._lanes[slot].unconsumed

    def take_wait_send_s(self, slot: int) -> float:
        """Seconds that a lane spent without a credit since the last call."""
        return self._lanes[slot].take_wait_send_s()

    def _take_word(self, word: bytes) -> None:
        objection = unpack_ack(word)
        if objection is not None:
            raise objection
        self.state = "ready"


class LinkReceiver(_Link[ReceiveLane]):
    """The receiving end.

    Args:
        transport: this rank's, driven by the caller.
        sender_address: of the sender's transport, for credits.
        identity: made by this side (`os.urandom` for nonce and secret), made known over gRPC.
        device: where the lanes' buffers live.
        timeout_s: until a right hello must have come.

    Raises:
        TransportError: the address is not one of this transport.
    """

    def __init__(
        self,
        transport: Transport,
        sender_address: bytes,
        identity: LinkIdentity,
        *,
        device: torch.device | str = "cpu",
        timeout_s: float = 5.0,
    ) -> None:
        super().__init__(transport, sender_address, identity, timeout_s, HELLO, HELLO_BYTES)
        self._device = torch.device(device)
        self.refused_count = 0
        self.refusal: StagemeshError | None = None

    def _make_lane(self, slot: int) -> ReceiveLane:
        return ReceiveLane(self._transport, self._peer, self._identity, slot, self._device)

    def post(self, slot: int, step: int, shape: Sequence[int]) -> None:
        """Announce what a step will bring, as soon as its plan is known.

        Raises:
            TransportError: larger than the lane's buffers, posted before, or the link is over.
        """
        if self.over:
            raise self.error or TransportError("the link is closed")
        self._lanes[slot].post(step, tuple(shape))

    def ready(self, slot: int, step: int) -> torch.Tensor | None:
        """The activation of a posted step [T, H] when it is all there and the link is ready; the lane's own memory,
        until `release`. A receive that failed fails the link."""
        if self.state != "ready":
            return None
        try:
            return self._lanes[slot].ready(step)
        except TransportError as error:
            self._fail(error)
            return None

    def note_completed(self) -> None:
        """Writes down which activations have come by now: called between layers, `progress()` does it else."""
        for lane in self._lanes.values():
            lane.note_completed()

    def completed_at(self, slot: int, step: int) -> float:
        """When the activation of a step was first seen to be all there (`time.monotonic()`); 0 when it is not yet."""
        return self._lanes[slot].completed_at(step)

    def release(self, slot: int, step: int) -> None:
        """The activation is used up (on CUDA: the kernels that read it were launched on the current stream)."""
        if self.state != "ready":
            return
        try:
            self._lanes[slot].release(step)
        except TransportError as error:
            if self._peer.error is None:
                raise
            self._fail(error)

    def quarantined(self) -> int:
        """Buffers of closed lanes that may still be written."""
        return sum(lane.quarantined for lane in self._lanes.values())

    def _take_word(self, word: bytes) -> None:
        objection = self._identity.objection(word)
        self._say(HELLO_ACK, pack_ack(objection))
        if objection is None:
            self.state = "ready"
            return
        # A stale address can reach a worker that took another's place: go on waiting for the right sender.
        self.refused_count += 1
        self.refusal = objection
        self._word = self._transport.recv(self._word_tag, self._word_buffer)

    def _let_go(self) -> None:
        super()._let_go()
        self._transport.discard(self._identity.nonce << 32, LINK_MASK, forever=True)
