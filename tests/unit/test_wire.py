"""What a link says beside activations, when it is not understood: the hello, and its answer."""

from __future__ import annotations

import struct

import pytest
import torch

from stagemesh.errors import StaleEpoch, TransportError
from stagemesh.stage_worker.links.wire import (
    ACK_BYTES,
    HELLO_BYTES,
    PROTOCOL_VERSION,
    LinkIdentity,
    pack_ack,
    unpack_ack,
)

IDENTITY = LinkIdentity(7, 3, b"s" * 16, 64, torch.bfloat16, 2, 100)


def of_version(message: bytes, version: int) -> bytes:
    """The version stands behind four bytes of magic in both."""
    return message[:4] + struct.pack("<H", version) + message[6:]


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (of_version(IDENTITY.hello(), PROTOCOL_VERSION + 1), r"link protocol 2 was spoken, 1 is understood"),
        (IDENTITY.hello()[:-1], "are no hello"),
        (IDENTITY.hello() + b"x", "are no hello"),
        (bytes(HELLO_BYTES), "are no hello"),
    ],
    ids=["another version", "cut", "too long", "foreign"],
)
def test_a_hello_that_is_none_is_refused(hello: bytes, why: str) -> None:
    assert IDENTITY.objection(IDENTITY.hello()) is None
    objection = IDENTITY.objection(hello)
    assert isinstance(objection, TransportError)
    with pytest.raises(TransportError, match=why):
        raise objection


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (of_version(pack_ack(None), PROTOCOL_VERSION + 1), "answered in link protocol 2, 1 is understood"),
        (pack_ack(None)[:-1], "no answer to a hello"),
        (bytes(ACK_BYTES), "no answer to a hello"),
    ],
    ids=["another version", "cut", "foreign"],
)
def test_an_answer_that_is_none_ends_the_link(answer: bytes, why: str) -> None:
    assert unpack_ack(pack_ack(None)) is None
    objection = unpack_ack(answer)
    assert isinstance(objection, TransportError)
    with pytest.raises(TransportError, match=why):
        raise objection


def test_a_reason_comes_over_as_far_as_there_is_room() -> None:
    stale = unpack_ack(pack_ack(StaleEpoch("the sender is at epoch 3, the receiver at 4")))
    assert isinstance(stale, StaleEpoch)
    assert str(stale) == "the receiver refused the link: the sender is at epoch 3, the receiver at 4"
    long = unpack_ack(pack_ack(TransportError("é" * 500)))
    assert isinstance(long, TransportError)
    assert 80 < len(str(long)) < 150
