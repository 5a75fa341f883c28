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

    def __init__(self, transport: Transport, address: bytes, identity: LinkIdentity, timeout_s: float) -> None:
        self._transport, self._identity = transport, identity
        self._peer: Peer = transport.connect(address, timeout_s=timeout_s)
        self._timeout_s = timeout_s
        self._began_at = time.monotonic()
        self._doubted = False
        self._lanes: dict[int, Lane] = {}
        self.state: LinkState = "connecting"
        self.error: StagemeshError | None = None

    @abstractmethod
    def _shake_hands(self) -> bool:
        """Goes on with the handshake; True when something came. Raises what is to end the link."""

    @abstractmethod
    def _let_go(self) -> None:
        """The link is over: nothing of the handshake is waited for any more."""

    @property
    @abstractmethod
    def heard(self) -> bool:
        """Whether the other side's word of the handshake has come; `progress` takes it."""

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
            if self.state == "connecting":
                # Before the deadline is looked at: what came within a long step has been seen by nobody yet.
                happened = self._shake_hands()
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

    def close(self) -> None:
        """End the link at once. Go on with `progress()` until it is `drained`: only then are tensors and buffers
        free."""
        self._end("closed")

    def _fail(self, error: StagemeshError) -> None:
        if self.state in ("connecting", "ready"):
            self.error = error
            self._end("failed")

    def _end(self, state: LinkState) -> None:
        if self.state in ("failed", "closed"):
            return
        self.state = state
        for lane in self._lanes.values():
            lane.abandon()
        self._let_go()
        self._peer.close()

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

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < CONTROL_SLOT:
            raise TransportError(f"slot {slot} is not between 0 and {CONTROL_SLOT - 1}")
        if slot in self._lanes:
            raise TransportError(f"slot {slot} is in use, or its last frames are not accounted for yet")
        if self.state not in ("connecting", "ready"):
            raise self.error or TransportError("the link is closed")


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
        super().__init__(transport, peer_address, identity, timeout_s)
        self._ack_buffer = bytearray(ACK_BYTES)
        self._ack = transport.recv(self._tag(HELLO_ACK), self._ack_buffer)
        self._hello_buffer = bytearray(identity.hello())
        self._hello: Request | None = None
        try:
            self._hello = self._peer.send(self._tag(HELLO), self._hello_buffer)
        except TransportError as error:
            self._fail(error)

    @property
    def heard(self) -> bool:
        """The hello is answered."""
        return self._ack.done

    def open_lane(self, slot: int, credits: int) -> None:
        """Start a lane; the receiver opens it with the same number of credits.

        Raises:
            TransportError: the slot is taken or out of range, or the link is over.
        """
        self._check_slot(slot)
        self._lanes[slot] = SendLane(self._transport, self._peer, self._identity.nonce, slot, credits)

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

    def close_lane(self, slot: int) -> None:
        """End a lane. Its slot may be opened again once `lane_closed`."""
        lane = self._lanes.get(slot)
        if lane is None or self.state not in ("connecting", "ready"):
            return
        try:
            lane.close()
        except TransportError as error:
            self._fail(error)

    @property
    def drained(self) -> bool:
        """The link is over, and nothing reads or writes a buffer of it any more."""
        handshake = self._ack.done and (self._hello is None or self._hello.done)
        return self.state in ("failed", "closed") and handshake and all(lane.idle for lane in self._lanes.values())

    def _shake_hands(self) -> bool:
        if not self.heard:
            return False
        objection = self._ack.error or unpack_ack(bytes(self._ack_buffer))
        if objection is not None:
            raise objection
        self.state = "ready"
        return True

    def _let_go(self) -> None:
        self._ack.cancel()


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
        super().__init__(transport, sender_address, identity, timeout_s)
        self._device = torch.device(device)
        self._answers: list[tuple[Request, bytearray]] = []
        self.refused_count = 0
        self.refusal: StagemeshError | None = None
        self._hello_buffer = bytearray(HELLO_BYTES)
        self._hello = transport.recv(self._tag(HELLO), self._hello_buffer)

    @property
    def heard(self) -> bool:
        """A hello has come."""
        return self._hello.done

    def open_lane(self, slot: int, credits: int, max_bytes: int) -> None:
        """Start a lane with `credits` buffers of `max_bytes`, allocated here and never again.

        Raises:
            TransportError: the slot is taken or out of range, or the link is over.
        """
        self._check_slot(slot)
        self._lanes[slot] = ReceiveLane(
            self._transport,
            self._peer,
            self._identity.nonce,
            slot,
            credits=credits,
            max_bytes=max_bytes,
            device=self._device,
        )

    def post(self, slot: int, step: int, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
        """Announce what a step will bring, as soon as its plan is known. `dtype` is the link's when None.

        Raises:
            TransportError: larger than the lane's buffers, posted before, or the link is over.
        """
        if self.state in ("failed", "closed"):
            raise self.error or TransportError("the link is closed")
        self._lanes[slot].post(step, shape, dtype or self._identity.dtype)

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

    def close_lane(self, slot: int) -> None:
        """End a lane: receives are cancelled, their buffers kept until nothing writes them, late frames dropped. Its
        slot may be opened again once `lane_closed`, which takes the sender's `close_lane` too."""
        lane = self._lanes.get(slot)
        if lane is not None:
            lane.close()

    def quarantined(self) -> int:
        """Buffers of closed lanes that may still be written."""
        return sum(lane.quarantined for lane in self._lanes.values())

    @property
    def drained(self) -> bool:
        """The link is over, and nothing reads or writes a buffer of it any more."""
        handshake = self._hello.done and all(answer.done for answer, _ in self._answers)
        return self.state in ("failed", "closed") and handshake and all(lane.idle for lane in self._lanes.values())

    def _shake_hands(self) -> bool:
        if not self.heard:
            return False
        if self._hello.error is not None:
            raise self._hello.error
        objection = self._identity.objection(bytes(self._hello_buffer))
        answer = bytearray(pack_ack(objection))
        self._answers = [entry for entry in self._answers if not entry[0].done]
        self._answers.append((self._peer.send(self._tag(HELLO_ACK), answer), answer))
        if objection is None:
            self.state = "ready"
            return True
        # A stale address can reach a worker that took another's place: go on waiting for the right sender.
        self.refused_count += 1
        self.refusal = objection
        self._hello = self._transport.recv(self._tag(HELLO), self._hello_buffer)
        return True

    def _let_go(self) -> None:
        self._hello.cancel()
        self._transport.discard(self._identity.nonce << 32, LINK_MASK, forever=True)
