"""A process that sends to a rank through shared memory dies within a send: the rank hears nobody from then on."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import signal
import time

import grpc
import pytest
import streams
from disturb import SEED, check, disturbed
from mesh import Mesh
from ucx_flood import Sender, start

from stagemesh.protos.v1 import stage_pb2, stage_pb2_grpc, types_pb2
from stagemesh.stage_worker.timing import StageTiming
from stagemesh.transport import open_transport
from stagemesh.transport.base import Peer, Transport

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed: UCX is NOT tested"
)
STAGE, TAG = 1, 7
MORE_THAN_THE_QUEUE = 400
BLOCKED_S = 0.2


def offered(mesh: Mesh, sender: bytes) -> bytes:
    """Has a stage make the receiving end of a link, which watches its sender; the rank's address."""
    view = mesh.get("/mesh")
    held = view["pipelines"][0]["stages"][STAGE]
    offer = stage_pb2.OfferLinkRequest(
        key=stage_pb2.PipelineKey(pipeline_id="pipeline-0", epoch=int(view["pipelines"][0]["epoch"])),
        stage=STAGE,
        transport="ucx",
        sender_addresses=[sender],
        nonces=[int.from_bytes(os.urandom(4))],
        copy=types_pb2.KvCopy(index=100, layers=types_pb2.LayerRange(**held["layers"])),
    )
    address = next(w["address"] for w in view["workers"] if w["worker_id"] == held["worker_id"])
    with grpc.insecure_channel(address) as channel:
        return bytes(stage_pb2_grpc.StageStub(channel).OfferLink(offer, timeout=5).receiver_addresses[0])


def blocked(transport: Transport, rank: Peer) -> bool:
    """Whether the rank's queue is full, and stays so."""
    sent = [rank.send(TAG, bytearray(8)) for _ in range(MORE_THAN_THE_QUEUE)]
    ends = time.monotonic() + BLOCKED_S
    while time.monotonic() < ends:
        transport.progress()
        if all(request.done for request in sent):
            return False
    return True


def die_within_a_send(mesh: Mesh, sender: Sender) -> None:
    """What the sender sends nobody asked for. It is stopped again and again until that blocks others, then killed."""
    rng, transport = random.Random(SEED), open_transport("ucx")
    try:
        address = offered(mesh, sender.address)
        rank = transport.connect(address)
        sender.send_to(address)
        # The link is given up then; by that time the rank shall have been told.
        ends = time.monotonic() + StageTiming().link_s - 1
        while time.monotonic() < ends:
            time.sleep(rng.random() * 0.01)
            sender.process.send_signal(signal.SIGSTOP)
            if blocked(transport, rank):
                return
            sender.process.send_signal(signal.SIGCONT)
        raise AssertionError("the sender was never stopped within a send")
    finally:
        sender.end()
        transport.close()


def test_a_rank_that_was_made_deaf_is_replaced(mesh: Mesh, expected: list[streams.Stream]) -> None:
    print("seed", SEED)
    sender = start(TAG, 64 << 10)
    told = asyncio.run(disturbed(mesh, lambda _: die_within_a_send(mesh, sender)))
    check(told, expected)
    print(f"longest pause: {max(s.longest_s for s in told):.2f} s")
    assert max(s.longest_s for s in told) < 5.0
    said = mesh.log.read_text()
    assert "hears nothing" in said
    assert "not answered" not in said
    mesh.check_pages_are_free()
