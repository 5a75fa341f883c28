"""A UCX sender that is stopped or killed in the midst of a send, and what that does to a receiver on its host."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ucx_flood import Sender, start

from stagemesh.errors import TransportError
from stagemesh.stage_worker.links.link import LinkIdentity, LinkReceiver
from stagemesh.transport import open_transport
from stagemesh.transport.base import Peer, Transport

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed: UCX is NOT tested"
)
FLOOD, TICK, ALL_BITS = 7, 9, (1 << 64) - 1


class Receiver:
    """This process's transport, one that sends all it can, and one that sends a little every millisecond."""

    def __init__(self) -> None:
        self.transport: Transport = open_transport("ucx")
        self.senders: list[Sender] = []
        self.peers: list[Peer] = []

    def start(self, tag: int, nbytes: int, pause_s: float = 0.0) -> Sender:
        sender = start(tag, nbytes, pause_s)
        self.senders.append(sender)
        self.peers.append(self.transport.connect(sender.address))
        sender.send_to(self.transport.address())
        return sender

    def hears(self, tag: int, for_s: float) -> bool:
        """Whether a message comes."""
        self.transport.discard(tag, ALL_BITS)
        until = time.monotonic() + for_s
        while time.monotonic() < until:
            self.transport.progress()
            if self.transport.discard(tag, ALL_BITS):
                return True
        return False

    def stop_within_a_send(self, sender: Sender) -> None:
        """Stops the sender again and again, until that keeps others from being heard."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            assert self.hears(FLOOD, 10)
            sender.process.send_signal(signal.SIGSTOP)
            while Path(f"/proc/{sender.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                self.transport.progress()
            self.hears(FLOOD, 0.001)
            if not self.hears(TICK, 0.2):
                return
            sender.process.send_signal(signal.SIGCONT)
        raise AssertionError("the sender was never stopped within a send")

    def progress_for(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not until():
            self.transport.progress()
            self.transport.discard(FLOOD, ALL_BITS)
            self.transport.discard(TICK, ALL_BITS)

    def end(self) -> None:
        for sender in self.senders:
            sender.end()
        began = time.monotonic()
        self.transport.close()
        assert time.monotonic() - began < 2


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.end()


def test_a_receiver_that_a_killed_sender_made_deaf_says_so(receiver: Receiver) -> None:
    flood = receiver.start(FLOOD, 64 << 10)
    receiver.start(TICK, 8, 0.001)
    receiver.stop_within_a_send(flood)
    began = time.monotonic()
    flood.process.kill()
    with pytest.raises(TransportError, match="hears nothing"):
        receiver.progress_for(3)
    print(f"found after {time.monotonic() - began:.2f} s")
    with pytest.raises(TransportError, match="hears nothing"):
        receiver.transport.progress()


def test_a_receiver_that_a_stopped_sender_keeps_deaf_says_so_when_asked(receiver: Receiver) -> None:
    flood = receiver.start(FLOOD, 64 << 10)
    receiver.start(TICK, 8, 0.001)
    receiver.transport.doubt()
    receiver.progress_for(1)
    receiver.stop_within_a_send(flood)
    receiver.transport.doubt()
    with pytest.raises(TransportError, match="hears nothing"):
        receiver.progress_for(3)


def test_a_link_that_is_not_answered_asks(receiver: Receiver) -> None:
    """Long before its deadline, and none of its peers has ended."""
    flood = receiver.start(FLOOD, 64 << 10)
    receiver.start(TICK, 8, 0.001)
    receiver.stop_within_a_send(flood)
    identity = LinkIdentity(int.from_bytes(os.urandom(4)), 1, os.urandom(16), 64, torch.bfloat16, 4, 100)
    link = LinkReceiver(receiver.transport, receiver.senders[1].address, identity, timeout_s=10)

    def progress_link() -> bool:
        link.progress()
        return link.error is not None

    with pytest.raises(TransportError, match="hears nothing"):
        receiver.progress_for(5, progress_link)
    link.close()


def test_a_receiver_whose_peers_end_between_sends_goes_on(receiver: Receiver) -> None:
    receiver.start(TICK, 8, 0.001)
    other = receiver.start(FLOOD, 8, 0.01)
    assert receiver.hears(FLOOD, 10)
    other.process.kill()
    receiver.progress_for(5, lambda: receiver.peers[1].error is not None)
    assert receiver.peers[1].error is not None
    receiver.progress_for(1)
    assert receiver.hears(TICK, 5)


def test_asking_again_and_again_is_answered(receiver: Receiver) -> None:
    receiver.start(TICK, 8, 0.001)
    for _ in range(50):
        receiver.transport.doubt()
    receiver.progress_for(1)
    assert receiver.hears(TICK, 5)


def test_without_shared_memory_there_is_nothing_to_doubt(capfd: pytest.CaptureFixture[str]) -> None:
    """UCX is not asked for a way that it does not have: it would say so as an error, on the terminal."""
    transport = open_transport("ucx", ucx_options={"TLS": "tcp", "NET_DEVICES": "lo"})
    transport.doubt()
    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        transport.progress()
    transport.close()
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
