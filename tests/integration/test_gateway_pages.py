"""The pages of a gateway that was killed are free within 2 s, for whichever gateway asks next."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from mesh import serve

from stagemesh import rpc
from stagemesh.errors import Unavailable
from stagemesh.protocol import PROTOCOL
from stagemesh.protos.v1 import stage_pb2, stage_pb2_grpc


async def open_session(address: str, epoch: int) -> int:
    """Pages that a gateway that comes now gets. Raises Unavailable where others have them."""
    key = stage_pb2.PipelineKey(pipeline_id="pipeline-0", epoch=epoch)
    opened = stage_pb2.RunOpen(key=key, stage=1, gateway_id="next", instance=1, slot=7, protocol=PROTOCOL)
    done = asyncio.Event()

    async def messages() -> AsyncIterator[stage_pb2.RunRequest]:
        yield stage_pb2.RunRequest(open=opened)
        await done.wait()

    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = stage_pb2_grpc.StageStub(channel)
        with rpc.mapped():
            async for response in stub.Run(messages()):
                done.set()
                return int(response.opened.num_pages)
    raise AssertionError("the worker said nothing")


def test_they_are_free_when_it_is_killed() -> None:
    with serve("-pp", "2") as mesh:
        total = mesh.get("/mesh")["gateway"]["total_pages"]
        address = next(w["address"] for w in mesh.get("/mesh")["workers"] if w["worker_id"] == "stage-1")
        epoch = mesh.epoch()
        assert asyncio.run(pages_within(address, epoch, 0.3)) is None, "they are the gateway's while it lives"
        mesh.named("stagemesh gateway")[0].kill()
        took = asyncio.run(pages_within(address, epoch, 2.0))
        assert took is not None
        assert took[0] == total
        print(f"free after {took[1]:.2f} s")
        # The gateway that is started in its place has them, now that the other one is gone.
        mesh.wait_ready()
        assert len(mesh.greedy([5, 6, 7], 4)) == 4


async def pages_within(address: str, epoch: int, seconds: float) -> tuple[int, float] | None:
    """(pages, seconds until they were given); None where they were not."""
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        try:
            return await open_session(address, epoch), time.monotonic() - began
        except Unavailable:
            await asyncio.sleep(0.02)
    return None
