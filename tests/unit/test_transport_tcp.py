"""What only TCP has to stand: strangers, garbage, torn frames, a full house."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from stagemesh.errors import TransportError
from stagemesh.transport.tcp import frame
from stagemesh.transport.tcp.transport import TcpTransport

SECRET_AT = slice(6, 22)  # in the address


@pytest.fixture
def server() -> Iterator[TcpTransport]:
    transport = TcpTransport(max_frame_bytes=1 << 20, max_unexpected_bytes=100_000)
    yield transport
    transport.close()


def drive(until: Callable[[], bool], *transports: TcpTransport, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not until():
        for transport in transports:
            transport.progress()
        assert time.monotonic() < deadline, "nothing came within the deadline"


def stranger(server: TcpTransport, data: bytes) -> socket.socket:
    sock = socket.create_connection((server.host, server.port), timeout=5)
    sock.sendall(data)
    return sock


def answer(server: TcpTransport, sock: socket.socket) -> str | None:
    """What the server tells before it hangs up."""
    sock.setblocking(False)
    received = bytearray()

    def ended() -> bool:
        try:
            data = sock.recv(1000)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True
        received.extend(data)
        return not data

    drive(ended, server)
    sock.close()
    return frame.unpack_refusal(bytes(received))


def good_preamble(server: TcpTransport) -> bytes:
    return frame.pack_preamble(server.address()[SECRET_AT])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET / HTTP/1.1\r\nHost: me\r\n\r\n", "not a stagemesh peer"),
        (bytes(100), "not a stagemesh peer"),
        (frame.pack_preamble(bytes(16)), "secret is wrong"),
        (struct.pack("<4sB3x16s", b"SMSH", 9, bytes(16)), "frame version 9"),
    ],
    ids=["http", "zeros", "wrong secret", "other version"],
)
def test_a_stranger_is_told_why_and_dropped(server: TcpTransport, data: bytes, why: str) -> None:
    received = server.recv(1, bytearray(4))
    assert why in str(answer(server, stranger(server, data)))
    assert server.refused_count == 1
    assert not received.done


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"X" * 24, "a frame header expected"),
        (frame.pack_header(1, 1 << 62), "over the bound"),
        (frame.pack_header(1, (1 << 20) + 1), "over the bound"),
    ],
    ids=["wrong magic", "huge length", "one byte too many"],
)
def test_garbage_after_a_right_preamble_ends_that_connection_only(server: TcpTransport, data: bytes, why: str) -> None:
    client = TcpTransport()
    peer = client.connect(server.address())
    assert why in str(answer(server, stranger(server, good_preamble(server) + data)))
    buffer = bytearray(4)
    received = server.recv(1, buffer)
    peer.send(1, b"good")
    drive(lambda: received.done, server, client)
    assert buffer == b"good"
    client.close()


ADDRESS = frame.pack_address("127.0.0.1", 7, bytes(16))


@pytest.mark.parametrize(
    "address",
    [ADDRESS[:-9], ADDRESS[:12], b"SMU1" + ADDRESS[4:], ADDRESS + bytes(300), ADDRESS[:-2] + b"\xff\xfe"],
    ids=["no host", "cut", "another transport's", "too long", "no text"],
)
def test_an_address_that_is_none_is_refused(address: bytes) -> None:
    with pytest.raises(TransportError, match="not a TCP address"):
        frame.unpack_address(address)
    assert frame.unpack_address(ADDRESS) == ("127.0.0.1", 7, bytes(16))


@pytest.mark.parametrize("change", [-1, 1], ids=["a byte too few", "a byte too many"])
def test_a_preamble_and_a_header_have_their_size(change: int) -> None:
    for data, unpack in (
        (frame.pack_preamble(bytes(16)), frame.unpack_preamble),
        (frame.pack_header(1, 2), lambda data: frame.unpack_header(data, 10)),
    ):
        with pytest.raises(TransportError, match=f"has 24 bytes, not {24 + change}"):
            unpack((data + b"x")[: 24 + change])


@pytest.mark.parametrize("data", [b"", b"SMNO", bytes(64), b"HTTP/1.1 400 Bad Request" + bytes(64)])
def test_what_is_no_refusal_is_none(data: bytes) -> None:
    assert frame.unpack_refusal(data) is None


def test_a_frame_in_single_bytes_is_put_together(server: TcpTransport) -> None:
    buffer = bytearray(5)
    received = server.recv(77, buffer)
    sock = stranger(server, b"")
    for i in good_preamble(server) + frame.pack_header(77, 5) + b"hello":
        sock.sendall(bytes([i]))
        server.progress()
    drive(lambda: received.done, server)
    assert buffer == b"hello"
    sock.close()


def test_many_frames_in_one_segment_are_taken_apart(server: TcpTransport) -> None:
    buffers = [bytearray(i) for i in range(60)]
    received = [server.recv(i, buffer) for i, buffer in enumerate(buffers)]
    data = b"".join(frame.pack_header(i, i) + bytes([i]) * i for i in range(60))
    sock = stranger(server, good_preamble(server) + data)
    drive(lambda: all(r.done for r in received), server)
    assert [bytes(b) for b in buffers] == [bytes([i]) * i for i in range(60)]
    sock.close()


def test_a_connection_that_breaks_inside_a_frame_fails_its_receive(server: TcpTransport) -> None:
    received = server.recv(5, bytearray(1000))
    stranger(server, good_preamble(server) + frame.pack_header(5, 1000) + bytes(400)).close()
    drive(lambda: received.done, server)
    assert "middle of a message" in str(received.error)


def test_a_receive_cancelled_inside_its_frame_is_not_written_further(server: TcpTransport) -> None:
    buffer = bytearray(1000)
    received = server.recv(5, buffer)
    sock = stranger(server, good_preamble(server) + frame.pack_header(5, 1000) + b"a" * 400)
    drive(lambda: buffer[399] == ord("a"), server)
    received.cancel()
    assert received.done
    sock.sendall(b"b" * 600 + frame.pack_header(6, 2) + b"ok")
    after = bytearray(2)
    later = server.recv(6, after)
    drive(lambda: later.done, server)
    assert bytes(buffer) == b"a" * 400 + bytes(600)
    assert after == b"ok"
    sock.close()


def test_frames_that_nobody_asked_for_are_held_up_to_the_bound(server: TcpTransport) -> None:
    """Ten frames of 40 kB against a bound of 100 kB: the sender stalls, memory does not grow, nothing is lost."""
    client = TcpTransport()
    peer = client.connect(server.address())
    data = [torch.full((40_000,), i, dtype=torch.uint8) for i in range(10)]
    for i in range(10):
        peer.send(i, data[i])
    drive(lambda: server.probe(1) and server.probe(2), server, client)
    for _ in range(500):
        server.progress()
        client.progress()
    assert [server.probe(i) for i in range(10)] == [True] * 3 + [False] * 7  # two held, the third waits at the door
    for i in range(10):
        buffer = torch.zeros_like(data[i])
        received = server.recv(i, buffer)
        drive(lambda r=received: r.done, server, client)  # type: ignore[misc]
        assert torch.equal(buffer, data[i])
    client.close()


def test_discarding_makes_room_for_the_next_frame(server: TcpTransport) -> None:
    client = TcpTransport()
    peer = client.connect(server.address())
    for i in range(4):
        peer.send(i, bytes(60_000))
    buffer = bytearray(60_000)
    drive(lambda: server.probe(0) and server.probe(1), server, client)
    last = server.recv(3, buffer)
    dropped = 0
    deadline = time.monotonic() + 5
    while not last.done and time.monotonic() < deadline:
        dropped += sum(server.discard(i, (1 << 64) - 1) for i in range(3))
        server.progress()
        client.progress()
    assert last.done
    assert dropped == 3
    client.close()


def test_strangers_that_stay_silent_do_not_keep_others_out(server: TcpTransport) -> None:
    silent = [stranger(server, b"") for _ in range(100)]
    client = TcpTransport()
    peer = client.connect(server.address())
    buffer = bytearray(2)
    received = server.recv(1, buffer)
    peer.send(1, b"me")
    drive(lambda: received.done, server, client)
    assert server.refused_count >= 30
    for sock in silent:
        sock.close()
    client.close()


def test_nobody_listens() -> None:
    gone, client = TcpTransport(), TcpTransport()
    address = gone.address()
    gone.close()
    peer = client.connect(address)
    drive(lambda: peer.error is not None, client)
    assert "cannot be reached" in str(peer.error)
    with pytest.raises(TransportError):
        peer.send(1, b"")
    client.close()


def test_a_host_that_does_not_answer_ends_at_the_deadline() -> None:
    client = TcpTransport()
    blocked = socket.socket()
    blocked.bind(("127.0.0.1", 0))
    blocked.listen(0)
    fillers = []
    for _ in range(3):  # the backlog is full: a further connection is left without an answer
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(blocked.getsockname())
        fillers.append(filler)
    address = bytearray(client.address())
    address[4:6] = struct.pack("<H", blocked.getsockname()[1])
    peer = client.connect(bytes(address), timeout_s=0.2)
    sent = peer.send(1, b"x" * 20_000)

    def over() -> bool:
        client.arm()
        return peer.error is not None

    drive(over, client)
    assert "0.2 s" in str(peer.error)
    assert sent.done
    assert sent.error is not None
    for sock in (blocked, *fillers):
        sock.close()
    client.close()


def test_the_advertised_host_is_in_the_address() -> None:
    transport = TcpTransport("127.0.0.1", advertise="localhost")
    client = TcpTransport()
    peer = client.connect(transport.address())
    buffer = bytearray(2)
    received = transport.recv(1, buffer)
    peer.send(1, b"hi")
    drive(lambda: received.done, transport, client)
    assert transport.address().endswith(b"localhost")
    transport.close()
    drive(lambda: peer.error is not None, client)
    client.close()
