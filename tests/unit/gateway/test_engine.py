"""What the gateway keeps of what the coordinator tells it: the last word, and no more. And what ends it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from stagemesh.errors import CheckpointError
from stagemesh.gateway.engine import MeshEngine
from stagemesh.gateway.telemetry.metrics import Metrics
from stagemesh.gateway.timing import GatewayTiming
from stagemesh.protos.v1 import coordinator_pb2, types_pb2
from stagemesh.settings.gateway import GatewaySettings

UPDATES = 4000
MAX_GROWTH = 2 << 20


def update(loaded: int) -> coordinator_pb2.WatchPipelinesResponse:
    """Of a mesh of eight workers, as it comes from a stream."""
    mesh = types_pb2.MeshView()
    for i in range(8):
        mesh.workers.add(worker_id=f"stage-{i}", loaded_bytes=loaded, total_bytes=UPDATES)
    told = coordinator_pb2.WatchPipelinesResponse(slot=1, mesh=mesh)
    return coordinator_pb2.WatchPipelinesResponse.FromString(told.SerializeToString())


def test_updates_of_the_mesh_take_no_more_and_more_memory() -> None:
    engine = MeshEngine(GatewaySettings(), Metrics(), GatewayTiming())
    process = psutil.Process()
    for loaded in range(UPDATES // 4):
        engine.take(update(loaded))
    before = process.memory_info().rss
    for loaded in range(UPDATES):
        engine.take(update(loaded))
    grown = process.memory_info().rss - before
    print(f"{grown / 2**10:.0f} KiB behind {UPDATES} updates")
    assert grown < MAX_GROWTH
    workers = engine.describe()["workers"]
    assert isinstance(workers, list)
    assert [int(worker["loaded_bytes"]) for worker in workers] == [UPDATES - 1] * 8


def test_a_broken_checkpoint_ends_a_gateway_that_learns_of_it_from_the_coordinator(byte_level_dir: Path) -> None:
    """At once: no worker has loaded anything yet."""
    (byte_level_dir / "tokenizer.json").write_text("{")
    view = types_pb2.PipelineView(pipeline_id="pipeline-0", model=types_pb2.ModelRef(path=str(byte_level_dir)))

    async def ended() -> None:
        engine = MeshEngine(GatewaySettings(coordinator="127.0.0.1:1"), Metrics(), GatewayTiming())
        following = engine.start()
        await asyncio.sleep(0)  # The task begins.
        engine.take(coordinator_pb2.WatchPipelinesResponse(slot=1, pipelines=[view]))
        await asyncio.wait_for(following, 30)

    with pytest.raises(CheckpointError, match=r"tokenizer.json: no tokenizer can be made of it"):
        asyncio.run(ended())
