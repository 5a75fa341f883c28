"""A link: a directed stream of activations between two ranks, over any transport.

The receiver makes the nonce and the secret. gRPC carries them and both addresses. The sender says hello on the link
itself. The receiver checks epoch, secret and row shape, and answers. Then each gateway session opens a lane with
credits. Neither end blocks or owns a thread: the engine calls `transport.progress()`, then `progress()` of its links.
`error` shows a peer that died. It does not show a peer that hangs: step deadlines find that.
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
"""Share of the handshake's time-out after which the link doubts its own transport: it may receive nothing."""

LinkState = Literal["connecting", "ready", "failed", "closed"]


def sending_rank(rank: int, senders: int, receivers: int) -> int:
    """Returns the sending rank from which receiving rank `rank` reads the activation, which all senders hold.

    Raises TransportError for a rank that does not exist.
    """
    if not 0 <= rank < receivers or senders < 1:
        raise TransportError(f"no rank {rank} among {receivers} receivers of {senders} senders")
    return rank * senders // receivers


Lane = TypeVar("Lane", SendLane, ReceiveLane)


class _Link(ABC, Generic[Lane]):
    """The common part of both ends: a peer, a state, a deadline, lanes."""

    def __init__(
        self, transport: Transport, address: bytes, identity: LinkIdentity, timeout_s: float, word: int, nbytes: int
    ) -> None:
        """`word`: the other side's message in the handshake (wire.py), of `nbytes` bytes."""
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
        """Continues the handshake. Raises the error that ends the link, if any."""

    @abstractmethod
    def _make_lane(self, slot: int) -> Lane: ...

    @property
    def heard(self) -> bool:
        """Whether the other side's handshake message has come. `progress` handles it."""
        return self._word.done

    @property
    def identity(self) -> LinkIdentity:
        """The parameters on which both ends agreed."""
        return self._identity

    @property
    def up(self) -> bool:
        """Whether the hello was accepted, so that activations may flow. Lanes may be opened before."""
        return self.state == "ready"

    @property
    def route(self) -> str:
        """The route of the connection; see `Peer.route`."""
        return self._peer.route

    def lane_closed(self, slot: int) -> bool:
        """Whether the slot is free."""
        return slot not in self._lanes

    def progress(self, now: float | None = None) -> bool:
        """Advances the handshake and the lanes. Returns whether anything happened. Sets `error` on a failure.

        Args:
            now: `time.monotonic()`, if the caller already has it.
        """
        happened = False
        try:
            if self.state == "connecting" and self.heard:
                # The message is handled before the deadline is checked: it may have come during a long step.
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
        """Starts a lane and allocates its buffers. The other end must open it, too.

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
        """Ends a lane: cancels its receives, keeps its buffers until nothing uses them, drops late frames.

        The slot may be opened again once `lane_closed`. That needs `close_lane` on the other end, too.
        """
        lane = self._lanes.get(slot)
        if lane is None or self.over:
            return
        try:
            lane.close()
        except TransportError as error:
            self._fail(error)

    @property
    def over(self) -> bool:
        """Whether the link has failed or was closed."""
        return self.state in ("failed", "closed")

    @property
    def drained(self) -> bool:
        """Whether the link is over and nothing reads or writes its buffers any more."""
        handshake = self._word.done and all(said.done for said, _ in self._said)
        return self.over and handshake and all(lane.idle for lane in self._lanes.values())

    def close(self) -> None:
        """Ends the link at once. Call `progress()` until it is `drained`: only then are its buffers free."""
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
        """Stops waiting for messages of the other side."""
        self._word.cancel()

    def _say(self, word: int, message: bytes) -> None:
        """Sends a message of the handshake."""
        buffer = bytearray(message)
        self._said = [entry for entry in self._said if not entry[0].done]
        self._said.append((self._peer.send(self._tag(word), buffer), buffer))

    def _tag(self, seq: int) -> int:
        return tag_of(self._identity.nonce, CONTROL_SLOT, seq)

    def _check(self, now: float | None) -> None:
        """Raises TransportError when the peer is gone, or silent past the deadline of the handshake."""
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
        transport: this rank's transport, driven by the caller.
        peer_address: address of the receiver's transport.
        identity: nonce, epoch, secret and row shape, which the receiver told over gRPC.
        timeout_s: time within which the hello must be answered.

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
        """Whether the link is ready and the lane has a credit. Time from a False to the credit counts as wait-send."""
        return self.state == "ready" and self._lanes[slot].can_send

    def send(self, slot: int, step: int, tensor: torch.Tensor) -> None:
        """Sends the activation of a step: a contiguous [T, H] tensor. It must not change until it is sent, and is kept
        alive until then.

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
        """Number of frames sent on a lane whose credit has not come back."""
        return self._lanes[slot].unconsumed

    def take_wait_send_s(self, slot: int) -> float:
        """Returns the seconds that a lane spent without a credit since the last call."""
        return self._lanes[slot].take_wait_send_s()

    def _take_word(self, word: bytes) -> None:
        objection = unpack_ack(word)
        if objection is not None:
            raise objection
        self.state = "ready"


class LinkReceiver(_Link[ReceiveLane]):
    """The receiving end.

    Args:
        transport: this rank's transport, driven by the caller.
        sender_address: address of the sender's transport, for credits.
        identity: parameters made by this side (nonce and secret are random), told to the sender over gRPC.
        device: device of the lanes' buffers.
        timeout_s: time within which a valid hello must come.

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
        """Announces the activation of a step, as soon as its plan is known.

        Raises:
            TransportError: the activation is too large for the buffers, it was posted before, or the link is over.
        """
        if self.over:
            raise self.error or TransportError("the link is closed")
        self._lanes[slot].post(step, tuple(shape))

    def ready(self, slot: int, step: int) -> torch.Tensor | None:
        """Returns the activation [T, H] of a posted step if it is complete and the link is ready, else None.

        It is the lane's own memory, valid until `release`. A failed receive fails the link.
        """
        if self.state != "ready":
            return None
        try:
            return self._lanes[slot].ready(step)
        except TransportError as error:
            self._fail(error)
            return None

    def note_completed(self) -> None:
        """Records which activations have come. The engine calls it between layers; `progress()` does the same."""
        for lane in self._lanes.values():
            lane.note_completed()

    def completed_at(self, slot: int, step: int) -> float:
        """Time (`time.monotonic()`) when a step's activation was first seen to be complete; 0 if it is not complete."""
        return self._lanes[slot].completed_at(step)

    def release(self, slot: int, step: int) -> None:
        """Frees a used activation. On CUDA, the kernels that read it must have been launched on the current stream."""
        if self.state != "ready":
            return
        try:
            self._lanes[slot].release(step)
        except TransportError as error:
            if self._peer.error is None:
                raise
            self._fail(error)

    def quarantined(self) -> int:
        """Number of buffers of closed lanes that may still be written."""
        return sum(lane.quarantined for lane in self._lanes.values())

    def _take_word(self, word: bytes) -> None:
        objection = self._identity.objection(word)
        self._say(HELLO_ACK, pack_ack(objection))
        if objection is None:
            self.state = "ready"
            return
        # A stale address can reach a worker that replaced another one. Go on waiting for the right sender.
        self.refused_count += 1
        self.refusal = objection
        self._word = self._transport.recv(self._word_tag, self._word_buffer)

    def _let_go(self) -> None:
        super()._let_go()
        self._transport.discard(self._identity.nonce << 32, LINK_MASK, forever=True)
