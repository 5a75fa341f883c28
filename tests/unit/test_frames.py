"""Frames between processes: whole ones come out however they were cut, and what is none is refused at once."""

from __future__ import annotations

import random
import socket
from enum import IntEnum
from typing import Literal

import pytest

from stagemesh.errors import InternalError, QueueFull, StageLost
from stagemesh.processes import messages
from stagemesh.processes.frames import HEADER, MAGIC, MAX_PAYLOAD_BYTES, VERSION, Decoder, pack, parse
from stagemesh.protos.v1 import processes_pb2, worker_pb2
from stagemesh.settings.stage import StageSettings
from stagemesh.stage_worker.messages.control import Kind, error_of, failure_of
from stagemesh.stage_worker.messages.rank_config import RankConfig, RankDescriptors
from stagemesh.stage_worker.rank.control_socket import ControlSocket
from stagemesh.stage_worker.rank.order import OrderReceiver, OrderSender

SEED = 5


class Fruit(IntEnum):
    """Kinds of a language of its own."""

    APPLE = 1
    PEAR = 2


def test_frames_come_out_whole_however_they_were_cut() -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    sent = [
        (rng.choice(list(Fruit)), rng.randrange(1 << 32), rng.randbytes(rng.choice((0, 1, 300)))) for _ in range(200)
    ]
    data = b"".join(pack(*frame) for frame in sent)
    decoder, got = Decoder(Fruit), list[tuple[Fruit, int, bytes]]()
    while data:
        size = rng.choice((1, 5, HEADER.size, 1000))
        got += decoder.feed(data[:size])
        data = data[size:]
    decoder.close()
    assert got == sent


def test_a_large_frame_in_many_pieces_is_put_together_once() -> None:
    payload = bytes(MAX_PAYLOAD_BYTES)
    data, decoder = pack(Fruit.PEAR, 7, payload), Decoder(Fruit)
    pieces = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    assert not any(decoder.feed(piece) for piece in pieces[:-1])
    assert decoder.feed(pieces[-1]) == [(Fruit.PEAR, 7, payload)]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"pid": 17}\n', "does not begin as a frame"),
        (HEADER.pack(MAGIC, VERSION + 1, 1, 0, 0), rf"version {VERSION + 1} came, {VERSION} is understood"),
        (HEADER.pack(MAGIC, VERSION, 9, 0, 0), "kind 9 came; known are 1, 2"),
        (HEADER.pack(MAGIC, VERSION, 1, 0, MAX_PAYLOAD_BYTES + 1), "was announced, .* are allowed"),
    ],
    ids=["foreign", "another version", "unknown kind", "oversized"],
)
def test_what_is_no_frame_is_refused_when_its_header_is_there(data: bytes, why: str) -> None:
    with pytest.raises(InternalError, match=why):
        Decoder(Fruit).feed(data)


def test_the_end_of_a_stream_within_a_frame_is_noticed() -> None:
    decoder = Decoder(Fruit)
    assert decoder.feed(pack(Fruit.APPLE, 1, b"abc")[:-1]) == []
    with pytest.raises(InternalError, match=f"closed within a frame, of which {HEADER.size + 2} bytes had come"):
        decoder.close()


def test_what_does_not_fit_a_frame_is_refused_by_its_sender() -> None:
    with pytest.raises(InternalError, match="does not fit a frame"):
        pack(Fruit.APPLE, 0, bytes(MAX_PAYLOAD_BYTES + 1))


def test_a_payload_of_another_message_is_refused_by_name() -> None:
    with pytest.raises(InternalError, match="cannot be read as LinkBroken"):
        parse(worker_pb2.LinkBroken, b"\xff")


# -- the languages that are spoken in frames ---------------------------------------------------------------------------


def sockets(kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, kind)


@pytest.mark.parametrize(
    "data",
    [
        pack(messages.Kind.FORK, 0, processes_pb2.Call(function="a:b").SerializeToString())[:-1],
        pack(messages.Kind.FORK, 0) * 2,
        pack(messages.Kind.FORK, 0, b"\xff"),
        pack(messages.Kind.LISTENING, 0),
        b"[]",
    ],
    ids=["cut", "two at once", "no call in it", "no call at all", "foreign"],
)
def test_a_forkserver_refuses_what_is_no_call(data: bytes) -> None:
    ours, theirs = sockets(socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(data)
        with pytest.raises(InternalError):
            messages.receive_call(theirs)


def test_a_call_that_does_not_fit_is_refused_by_its_sender() -> None:
    ours, theirs = sockets(socket.SOCK_SEQPACKET)
    with ours, theirs:
        for call, fds in ((processes_pb2.Call(argument=bytes(1 << 16)), []), (processes_pb2.Call(), [0] * 254)):
            with pytest.raises(InternalError, match="does not fit"):
                messages.send_call(ours, messages.Kind.RUN, call, fds)


ANSWERS = {
    messages.Kind.FORKED: processes_pb2.Forked(pid=17),
    messages.Kind.LISTENING: processes_pb2.Listening(ports={"port": 1}),
}


@pytest.mark.parametrize("expected", ANSWERS)
@pytest.mark.parametrize("came", ANSWERS)
def test_answers_of_children_are_not_taken_for_each_other(expected: messages.Kind, came: messages.Kind) -> None:
    data = messages.pack_message(came, ANSWERS[came])
    if expected is came:
        assert messages.unpack(expected, type(ANSWERS[expected]), data) == ANSWERS[came]
        with pytest.raises(InternalError, match="closed within a frame"):
            messages.unpack(expected, type(ANSWERS[expected]), data[:-1])
    else:
        with pytest.raises(InternalError, match="was expected"):
            messages.unpack(expected, type(ANSWERS[expected]), data)


def read_to_the_end(reader: ControlSocket) -> None:
    while not reader.closed:
        reader.receive()


def test_a_rank_refuses_foreign_bytes_and_notices_a_frame_that_is_cut() -> None:
    for data, why in (
        (b"RUN 5 now please", "does not begin as a frame"),
        (pack(Kind.RUN, 1, b"abc")[:-1], "closed within"),
    ):
        ours, theirs = sockets()
        reader = ControlSocket(theirs, write_timeout_s=1)
        with theirs:
            ours.sendall(data)
            ours.close()
            with pytest.raises(InternalError, match=why):
                read_to_the_end(reader)


def test_orders_come_as_they_were_given_and_nothing_else_is_one() -> None:
    ours, theirs = sockets()
    with ours, theirs:
        sender = OrderSender([control := ControlSocket(ours, write_timeout_s=1)])
        receiver = OrderReceiver(ControlSocket(theirs, write_timeout_s=1), timeout_s=1)
        sender.run_step(7, 1 << 40, [3, 1])
        sender.take_call(9)
        assert receiver.current() == (Kind.ORDER_STEP, 7, worker_pb2.StepOrder(step=1 << 40, tokens=[3, 1]))
        receiver.done()
        assert receiver.current() == (Kind.ORDER_CALL, 9, worker_pb2.StepOrder())
        receiver.done()
        control.send(Kind.SHUTDOWN, 0)
        with pytest.raises(InternalError, match="SHUTDOWN, which is no order"):
            receiver.current()


def test_errors_come_over_as_they_were() -> None:
    error = error_of(failure_of(QueueFull("full", retry_after_s=0.0)))
    assert (type(error), error.message, error.retry_after_s) == (QueueFull, "full", 0.0)
    assert error_of(failure_of(StageLost("gone"))).retry_after_s is None
    unknown = error_of(failure_of(RuntimeError("oops")))
    assert (type(unknown), unknown.message) == (InternalError, "RuntimeError: oops")


# -- what a rank is started with ---------------------------------------------------------------------------------------

GROUP = StageSettings(tensor_parallel_size=3, cpu_list="0-1|2|4,6", time_scale=2.0)
RANK_0 = RankConfig.of_worker("stage 0", GROUP, "cpu")[0].pack()


def test_a_rank_is_told_who_it_is() -> None:
    configs = RankConfig.of_worker("stage 0", GROUP, "cpu")
    assert [config.cpus for config in configs] == [(0, 1), (2,), (4, 6)]
    assert [RankConfig.unpack(config.pack()) for config in configs] == configs


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (RANK_0[:-1], "cannot be read"),
        (b'{"pipeline_id": "p"}', "settings"),
        (RANK_0.replace(b'"tensor_parallel_size"', b'"heat":5,"tensor_parallel_size"'), "heat"),
        (RANK_0.replace(b'"rank":0', b'"rank":3'), "rank 3 .* group of 3"),
    ],
    ids=["cut", "another message", "unknown setting", "no such rank"],
)
def test_a_rank_refuses_to_start_as_what_it_does_not_understand(start: bytes, why: str) -> None:
    with pytest.raises(InternalError, match=why):
        RankConfig.unpack(start)


@pytest.mark.parametrize(("device", "size"), [("cpu", 1), ("cpu", 3), ("cuda", 1), ("cuda", 3)])
def test_descriptors_come_to_where_they_belong(device: Literal["cpu", "cuda"], size: int) -> None:
    """A rank gets them under other numbers."""
    settings = StageSettings(tensor_parallel_size=size)
    for config in RankConfig.of_worker("stage 0", settings, device):
        orders = () if size == 1 else (4, 5) if config.rank == 0 else (4,)
        handed = RankDescriptors(3, 8, 6, 7, orders)
        got = RankDescriptors.of(config, [fd + 100 for fd in handed.in_order])
        assert (got.control, got.heartbeats, got.orders) == (103, 108, tuple(fd + 100 for fd in orders))
        assert (got.exchange, got.store) == (106, 107)
        for fds in (handed.in_order[:-1], [*handed.in_order, 9]):
            with pytest.raises(InternalError, match=f"{len(fds)} descriptors came for rank {config.rank} of {size}"):
                RankDescriptors.of(config, fds)
