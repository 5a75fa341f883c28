"""Orders and sessions of an epoch that has passed, sent to real workers: refused, and counted where operators look."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc.aio
import pytest
from mesh import Mesh, serve

from stagemesh import rpc
from stagemesh.errors import StagemeshError, StaleEpoch
from stagemesh.protocol import PROTOCOL
from stagemesh.protos.v1 import stage_pb2, stage_pb2_grpc

COUNTED_S = 5.0


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """At its second epoch, or a later one."""
    with serve("-pp", "2") as mesh:
        epoch = mesh.epoch()
        mesh.named("stage 1 layers")[0].kill()
        deadline = time.monotonic() + 30
        while mesh.epoch() == epoch or not mesh.ready:
            assert time.monotonic() < deadline, mesh.tail()
            time.sleep(0.02)
        yield mesh


def key(mesh: Mesh, behind: int) -> stage_pb2.PipelineKey:
    return stage_pb2.PipelineKey(pipeline_id="pipeline-0", epoch=mesh.epoch() - behind)


async def assign(stub: Any, at: stage_pb2.PipelineKey) -> None:
    async for _ in stub.Assign(stage_pb2.AssignRequest(key=at, stage=1, num_stages=2)):
        pass


async def activate(stub: Any, at: stage_pb2.PipelineKey) -> None:
    await stub.Activate(stage_pb2.ActivateRequest(key=at))


async def offer(stub: Any, at: stage_pb2.PipelineKey) -> None:
    await stub.OfferLink(stage_pb2.OfferLinkRequest(key=at))


async def session(stub: Any, at: stage_pb2.PipelineKey) -> None:
    opened = stage_pb2.RunOpen(key=at, stage=1, gateway_id="late", instance=1, slot=99, protocol=PROTOCOL)

    async def first() -> Any:
        yield stage_pb2.RunRequest(open=opened)

    async for _ in stub.Run(first()):
        pass


@pytest.mark.parametrize(
    ("kind", "order"), [("assignment", assign), ("activation", activate), ("link", offer), ("session", session)]
)
def test_what_comes_too_late_is_refused_and_counted(
    mesh: Mesh, kind: str, order: Callable[[Any, stage_pb2.PipelineKey], Awaitable[None]]
) -> None:
    seen = mesh.get("/mesh")
    address = next(w["address"] for w in seen["workers"] if w["worker_id"] == "stage-1")
    epoch, before = mesh.epoch(), int(seen["stale_refused"].get(kind, 0))

    async def late() -> StagemeshError:
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(StagemeshError) as caught, rpc.mapped():
                await order(stage_pb2_grpc.StageStub(channel), key(mesh, behind=1))
            return caught.value

    assert isinstance(asyncio.run(late()), StaleEpoch)
    deadline = time.monotonic() + COUNTED_S
    while int(mesh.get("/mesh")["stale_refused"].get(kind, 0)) != before + 1:
        assert time.monotonic() < deadline, mesh.get("/mesh")["stale_refused"]
        time.sleep(0.02)
    assert (mesh.epoch(), mesh.ready) == (epoch, True)
    assert len(mesh.greedy([5, 6, 7], 4)) == 4
