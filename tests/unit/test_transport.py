"""One set of checks for every transport, two of them in one process driven by turns.

A `check_*` says what the contract of `stagemesh.transport.base` promises; each runs on UCX, TCP and in process.
"""

from __future__ import annotations

import importlib.util
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from inproc import open_any

from stagemesh.errors import TransportError
from stagemesh.transport import Peer, Request, Transport, open_transport

FULL_MASK = (1 << 64) - 1
HAS_UCXX = importlib.util.find_spec("ucxx") is not None
needs_ucxx = pytest.mark.skipif(not HAS_UCXX, reason="ucxx is not installed: UCX is NOT tested")


@dataclass
class Pair:
    """Two transports, with a peer each way, driven by turns."""

    left: Transport
    right: Transport
    to_right: Peer
    to_left: Peer

    def drive(self, until: Callable[[], bool], timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not until():
            self.left.progress()
            self.right.progress()
            assert time.monotonic() < deadline, "nothing came within the deadline"

    def wait(self, *requests: Request) -> None:
        self.drive(lambda: all(request.done for request in requests))
        for request in requests:
            assert request.error is None, request.error


@pytest.fixture(params=[pytest.param("ucx", marks=needs_ucxx), "tcp", "inproc"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    left, right = open_any(request.param), open_any(request.param)
    yield Pair(left, right, left.connect(right.address()), right.connect(left.address()))
    began = time.monotonic()
    left.close()
    right.close()
    assert time.monotonic() - began < 2, "closing blocked"


def random_bytes(nbytes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("nbytes", [0, 1, 63, 4096, 8192, 8193, 65536, 65537, 300_000, 8 << 20])
@pytest.mark.parametrize("posted_first", [True, False], ids=["posted before", "posted after"])
def test_what_is_sent_arrives_unchanged(pair: Pair, nbytes: int, posted_first: bool) -> None:
    data, buffer = random_bytes(nbytes, seed=nbytes), torch.zeros(nbytes, dtype=torch.uint8)
    if posted_first:
        received = pair.right.recv(7, buffer)
        sent = pair.to_right.send(7, data)
    else:
        sent = pair.to_right.send(7, data)
        pair.drive(lambda: pair.right.probe(7))
        received = pair.right.recv(7, buffer)
    pair.wait(received, sent)
    assert torch.equal(buffer, data)
    assert received.nbytes == sent.nbytes == nbytes
    assert not pair.right.probe(7)


def test_bf16_and_shaped_tensors_go_as_they_are(pair: Pair) -> None:
    data = torch.randn(8, 768, generator=torch.Generator().manual_seed(1)).bfloat16()
    buffer = torch.zeros_like(data)
    pair.wait(pair.right.recv(1 << 63, buffer), pair.to_right.send(1 << 63, data))
    assert torch.equal(buffer, data)


def test_many_outstanding_both_ways_in_any_order(pair: Pair) -> None:
    """200 receives posted in the opposite order of the sends, both directions at once, small and large mixed."""
    sizes = [(i * 977) % 40_000 for i in range(200)]
    data = [random_bytes(size, seed=i) for i, size in enumerate(sizes)]
    there, back = ([torch.zeros_like(d) for d in data] for _ in range(2))
    requests: list[Request] = []
    for i in reversed(range(200)):
        requests += [pair.right.recv(1000 + i, there[i]), pair.left.recv(5000 + i, back[i])]
    for i in range(200):
        requests += [pair.to_right.send(1000 + i, data[i]), pair.to_left.send(5000 + i, data[i])]
    pair.wait(*requests)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(data, there, back, strict=True))


def test_one_tag_keeps_the_order_of_sends(pair: Pair) -> None:
    buffers = [bytearray(4) for _ in range(50)]
    received = [pair.right.recv(3, buffer) for buffer in buffers[:25]]
    sent = [pair.to_right.send(3, i.to_bytes(4, "little")) for i in range(50)]
    pair.wait(*received)
    received = [pair.right.recv(3, buffer) for buffer in buffers[25:]]
    pair.wait(*received, *sent)
    assert [int.from_bytes(buffer, "little") for buffer in buffers] == list(range(50))


def test_a_request_keeps_its_buffer_alive(pair: Pair) -> None:
    """Temporaries are sent, requests are dropped, memory is churned: what arrives is still what was sent."""
    buffers = [torch.zeros(500_000, dtype=torch.uint8) for _ in range(8)]
    for i in range(8):
        pair.to_right.send(i, torch.full((500_000,), i + 1, dtype=torch.uint8))
        torch.full((500_000,), 99, dtype=torch.uint8)
    received = [pair.right.recv(i, buffer) for i, buffer in enumerate(buffers)]
    pair.wait(*received)
    assert [(int(b.min()), int(b.max())) for b in buffers] == [(i + 1, i + 1) for i in range(8)]


def test_a_message_that_does_not_fit_is_an_error_and_spares_the_memory_behind(pair: Pair) -> None:
    memory = torch.zeros(2000, dtype=torch.uint8)
    received = pair.right.recv(4, memory[:1000])
    pair.to_right.send(4, torch.ones(1500, dtype=torch.uint8))
    pair.drive(lambda: received.done)
    assert isinstance(received.error, TransportError)
    assert "1000" in str(received.error)
    assert int(memory[1000:].sum()) == 0
    buffer = bytearray(3)  # the way is still good
    pair.wait(pair.right.recv(5, buffer), pair.to_right.send(5, b"abc"))
    assert buffer == b"abc"


def test_a_cancelled_receive_ends_and_its_buffer_is_not_written(pair: Pair) -> None:
    buffer = torch.zeros(20_000, dtype=torch.uint8)
    received = pair.right.recv(6, buffer)
    received.cancel()
    pair.drive(lambda: received.done)
    assert received.error is not None
    pair.to_right.send(6, torch.ones(20_000, dtype=torch.uint8))
    pair.drive(lambda: pair.right.probe(6))
    assert int(buffer.sum()) == 0
    again = torch.zeros_like(buffer)
    pair.wait(pair.right.recv(6, again))
    assert int(again.sum()) == 20_000


def test_a_cancel_that_comes_too_late_leaves_no_trace(pair: Pair) -> None:
    """The message is under way when its receive is cancelled: it lands or it does not, the next one is whole."""
    outcomes = set()
    for i in range(40):
        nbytes = 30_000 if i % 2 else 3_000_000
        buffer = torch.zeros(nbytes, dtype=torch.uint8)
        received = pair.right.recv(8, buffer)
        sent = pair.to_right.send(8, torch.full((nbytes,), 7, dtype=torch.uint8))
        for _ in range(i // 2):
            pair.left.progress()
            pair.right.progress()
        received.cancel()
        pair.drive(lambda r=received: r.done)  # type: ignore[misc]
        outcomes.add(received.error is None)
        if received.error is None:
            assert int(buffer.min()) == 7
        else:
            pair.drive(lambda: pair.right.discard(8, FULL_MASK) > 0)
        pair.drive(lambda s=sent: s.done)  # type: ignore[misc]
    for _ in range(200):
        pair.right.progress()
    assert not pair.right.probe(8)
    assert outcomes == {True, False}, "the race was not met from both sides"


def test_discard_drops_what_fits_the_mask_and_nothing_else(pair: Pair) -> None:
    stale, kept = 0xAB << 32, 0xAC << 32
    sends = [pair.to_right.send(stale | i, random_bytes(50_000, i)) for i in range(4)]
    sends.append(pair.to_right.send(kept, b"kept"))
    pair.drive(lambda: pair.right.probe(kept) and all(pair.right.probe(stale | i) for i in range(4)))
    assert pair.right.discard(stale, 0xFFFFFFFF << 32) == 4
    assert not any(pair.right.probe(stale | i) for i in range(4))
    buffer = bytearray(4)
    pair.wait(pair.right.recv(kept, buffer), *sends)
    assert buffer == b"kept"


def test_discard_forever_drops_what_comes_later(pair: Pair) -> None:
    pair.right.discard(0xAB << 32, 0xFFFFFFFF << 32, forever=True)
    sent = pair.to_right.send(0xAB << 32 | 5, random_bytes(50_000, 1))
    pair.drive(lambda: sent.done)  # taken, by nobody
    for _ in range(300):
        pair.right.progress()
    assert not pair.right.probe(0xAB << 32 | 5)
    assert pair.right.late_count == 1


def test_what_is_discarded_at_once_is_not_late(pair: Pair) -> None:
    for tag in (0xAB << 32, 0xCD << 32):
        pair.to_right.send(tag, random_bytes(8, 1))
        pair.drive(lambda tag=tag: pair.right.probe(tag))
    assert pair.right.discard(0xAB << 32, 0xFFFFFFFF << 32) == 1
    assert pair.right.late_count == 0
    assert pair.right.discard(0xCD << 32, 0xFFFFFFFF << 32, forever=True) == 1
    assert pair.right.late_count == 0


def test_the_route_is_told(pair: Pair) -> None:
    buffer = bytearray(4)
    pair.wait(pair.right.recv(1, buffer), pair.to_right.send(1, b"ping"))
    assert pair.to_right.route == {"ucx": "shared memory", "tcp": "tcp", "inproc": "in-process"}[pair.left.name]


def test_waiting_burns_no_cpu_and_a_message_ends_it(pair: Pair) -> None:
    poller = select.poll()
    for fd, events in pair.right.fds():
        poller.register(fd, events)

    def sleep(timeout_s: float) -> float:
        """Sleep as an engine does; returns how long it really slept."""
        began = time.monotonic()
        while (left := began + timeout_s - time.monotonic()) > 0:
            pair.left.progress()
            if pair.right.progress() or not pair.right.arm():
                if received.done:
                    break
                continue
            poller.poll(left * 1000)
        return time.monotonic() - began

    buffer = bytearray(4)
    received = pair.right.recv(2, buffer)
    pair.wait(pair.left.recv(9, bytearray(1)), pair.to_left.send(9, b"x"))  # connections are made
    cpu = time.process_time()
    sleep(0.5)
    burnt = time.process_time() - cpu
    assert burnt < 0.025, f"{burnt * 1e3:.1f} ms of CPU in 500 ms of waiting"
    sent = pair.to_right.send(2, b"wake")
    assert sleep(5.0) < 1.0
    pair.wait(sent, received)
    assert buffer == b"wake"


def test_a_closed_peer_ends_its_requests(pair: Pair) -> None:
    data = torch.ones(8 << 20, dtype=torch.uint8)
    sent = pair.to_right.send(11, data)
    pair.to_right.close()
    pair.drive(lambda: sent.done)
    with pytest.raises(TransportError):
        pair.to_right.send(11, data)


def test_addresses_of_other_kinds_are_refused(pair: Pair) -> None:
    good = pair.right.address()
    for bad in (b"", b"nonsense" * 30, good[:10], b"X" + good[1:]):
        with pytest.raises(TransportError):
            pair.left.connect(bad)


@needs_ucxx
def test_waiting_for_a_ucx_peer_that_does_not_accept_burns_no_cpu() -> None:
    options = {"TLS": "tcp", "NET_DEVICES": "lo"}
    left, silent = open_transport("ucx", ucx_options=options), open_transport("ucx", ucx_options=options)
    poller = select.poll()
    for fd, events in left.fds():
        poller.register(fd, events)
    left.connect(silent.address()).send(1, bytes(20_000))
    cpu, until = time.process_time(), time.monotonic() + 0.5
    while (left_s := until - time.monotonic()) > 0:
        if not left.progress() and left.arm():
            poller.poll(left_s * 1000)
    burnt = time.process_time() - cpu
    assert burnt < 0.05, f"{burnt * 1e3:.1f} ms of CPU in 500 ms of waiting"
    left.close()
    silent.close()


@needs_ucxx
def test_a_damaged_ucx_address_is_refused() -> None:
    transport = open_transport("ucx")
    address = bytearray(transport.address())
    address[-3] ^= 0x40
    with pytest.raises(TransportError, match="checksum"):
        transport.connect(bytes(address))
    transport.close()


@needs_ucxx
def test_ucx_over_tcp_says_so() -> None:
    options = {"TLS": "tcp", "NET_DEVICES": "lo"}
    left, right = open_transport("ucx", ucx_options=options), open_transport("ucx", ucx_options=options)
    pair = Pair(left, right, left.connect(right.address()), right.connect(left.address()))
    buffer = torch.zeros(100_000, dtype=torch.uint8)
    pair.wait(right.recv(1, buffer), pair.to_right.send(1, torch.ones_like(buffer)))
    assert pair.to_right.route == "tcp"
    left.close()
    right.close()
