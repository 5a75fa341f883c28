"""A result of an epoch that has passed is dropped, and counted where operators look."""

from __future__ import annotations

import asyncio
from unittest.mock import MagicMock

from prometheus_client import generate_latest

from stagemesh.gateway.drive.loop import BatchLoop, Observers
from stagemesh.gateway.telemetry.metrics import Metrics
from stagemesh.gateway.timing import GatewayTiming
from stagemesh.protos.v1 import stage_pb2, types_pb2


def test_a_result_of_an_earlier_epoch() -> None:
    metrics, ledger = Metrics(), MagicMock()

    async def go() -> None:
        view = types_pb2.PipelineView(pipeline_id="pipeline-0", epoch=5, stages=[types_pb2.StageView()])
        observers = Observers(metrics, MagicMock(), GatewayTiming(), lambda: 0.0)
        loop = BatchLoop(view, ledger, observers, asyncio.Event(), MagicMock(), MagicMock())
        loop.on_result(0, stage_pb2.StepResult(epoch=4, step=1, sequences=[1], positions=[7], tokens=[9]))

    asyncio.run(go())
    assert b"stagemesh_stale_results_total 1.0" in generate_latest(metrics.registry)
    assert not ledger.method_calls
