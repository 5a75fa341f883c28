"""Wire format of a link's messages other than activations: tags, hello, its answer, credits, end of a lane.

Tag, 64 bits: nonce (32) | slot (8) | seq (24). `seq` is the step modulo SEQ_MODULUS, or one of four words above it:

    CREDIT     receiver -> sender   how many frames of the lane were released so far, or that the lane is drained
    FIN        sender -> receiver   how many frames were sent on the lane, which ends
    HELLO      sender -> receiver   the sender's epoch, secret, dtype, hidden size     (slot CONTROL_SLOT)
    HELLO_ACK  receiver -> sender   accepted, or the reason for the refusal            (slot CONTROL_SLOT)
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass

import torch

from stagemesh.errors import StagemeshError, StaleEpoch, TransportError

PROTOCOL_VERSION = 1
SEQ_MODULUS = 0xFFFFF0
CREDIT, HELLO, HELLO_ACK, FIN = 0xFFFFFF, 0xFFFFFE, 0xFFFFFD, 0xFFFFFC
CONTROL_SLOT = 255
LANE_MASK = 0xFFFFFFFF_FF000000
LINK_MASK = 0xFFFFFFFF_00000000
SECRET_BYTES = 16

_DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.int32: 4, torch.uint8: 5}
_HELLO = struct.Struct("<4sHHIIQ16s24x")
_ACK = struct.Struct("<4sH2xB3x116s")
_COUNT = struct.Struct("<QB7x")
HELLO_BYTES = _HELLO.size
ACK_BYTES = _ACK.size
COUNT_BYTES = _COUNT.size


def tag_of(nonce: int, slot: int, seq: int) -> int:
    """The 64-bit tag of one message of a link."""
    return nonce << 32 | slot << 24 | seq


def data_tag(nonce: int, slot: int, step: int) -> int:
    """The tag of the activation of a step."""
    return nonce << 32 | slot << 24 | step % SEQ_MODULUS


@dataclass(frozen=True, slots=True)
class LinkIdentity:
    """Parameters on which both ends of a link must agree. They are exchanged over gRPC, then checked by the hello."""

    nonce: int
    """A fresh 32-bit number for every link."""
    epoch: int
    """Epoch of the pipeline for which the link was made."""
    secret: bytes
    """16 random bytes from the receiver."""
    hidden_size: int
    dtype: torch.dtype
    credits: int
    """Number of frames of one lane that may be sent and not yet released. It is not in the hello."""
    max_rows: int
    """Largest number of rows in a frame. It is not in the hello."""

    @property
    def max_bytes(self) -> int:
        """Largest size of a frame."""
        return self.max_rows * self.hidden_size * self.dtype.itemsize

    def __post_init__(self) -> None:
        if not 0 <= self.nonce < 1 << 32 or len(self.secret) != SECRET_BYTES:
            raise TransportError(f"a link needs a 32-bit nonce and a secret of {SECRET_BYTES} bytes")
        if self.dtype not in _DTYPE_CODES:
            raise TransportError(
                f"rows of {self.dtype} cannot be sent; float32, bfloat16, float16, int32 and uint8 can"
            )

    def hello(self) -> bytes:
        """Packs the sender's first message."""
        code = _DTYPE_CODES[self.dtype]
        return _HELLO.pack(b"SMHI", PROTOCOL_VERSION, code, self.nonce, self.hidden_size, self.epoch, self.secret)

    def objection(self, hello: bytes) -> StagemeshError | None:
        """Returns why a hello does not fit, or None if it fits."""
        if len(hello) != HELLO_BYTES or not hello.startswith(b"SMHI"):
            return TransportError(f"{len(hello)} bytes came that are no hello of {HELLO_BYTES}")
        _, version, code, nonce, hidden_size, epoch, secret = _HELLO.unpack(hello)
        if version != PROTOCOL_VERSION:
            return TransportError(f"link protocol {version} was spoken, {PROTOCOL_VERSION} is understood")
        if nonce != self.nonce or not hmac.compare_digest(secret, self.secret):
            return TransportError("the tag secret is wrong")
        if epoch != self.epoch:
            return StaleEpoch(f"the sender is at epoch {epoch}, the receiver at {self.epoch}")
        if code != _DTYPE_CODES[self.dtype] or hidden_size != self.hidden_size:
            mine = f"{self.hidden_size} x {self.dtype}"
            return TransportError(f"the sender has rows of {hidden_size} x dtype code {code}, the receiver of {mine}")
        return None


def pack_ack(objection: StagemeshError | None) -> bytes:
    """Packs the answer to a hello."""
    stale = isinstance(objection, StaleEpoch)
    verdict = 0 if objection is None else 2 if stale else 1
    reason = objection.message.encode()[:116] if objection is not None else b""
    return _ACK.pack(b"SMOK", PROTOCOL_VERSION, verdict, reason)


def unpack_ack(data: bytes) -> StagemeshError | None:
    """Returns the receiver's objection, or None if it accepted the hello."""
    if len(data) != ACK_BYTES or not data.startswith(b"SMOK"):
        return TransportError(f"the receiver answered with {len(data)} bytes that are no answer to a hello")
    _, version, verdict, reason = _ACK.unpack(data)
    if version != PROTOCOL_VERSION:
        return TransportError(f"the receiver answered in link protocol {version}, {PROTOCOL_VERSION} is understood")
    if verdict == 0:
        return None
    text = "the receiver refused the link: " + reason.rstrip(b"\0").decode(errors="replace")
    return StaleEpoch(text) if verdict == 2 else TransportError(text)


def pack_count(count: int, *, last: bool = False) -> bytes:
    """Packs a credit or a FIN: a cumulative number of frames, and whether the lane is drained."""
    return _COUNT.pack(count, last)


def unpack_count(data: bytes) -> tuple[int, bool]:
    """Returns (cumulative number of frames, whether the lane is drained)."""
    count, last = _COUNT.unpack(data)
    return count, bool(last)
