"""A probe: a token that crosses all stages of an epoch which runs no request yet."""

from __future__ import annotations

import asyncio
from typing import cast
from unittest.mock import AsyncMock, MagicMock

from prefix_world import make

from stagemesh.gateway.drive.ledger import Ledger
from stagemesh.gateway.drive.loop import BatchLoop, Observers
from stagemesh.gateway.schedule.pages import Shape
from stagemesh.gateway.session.session import Session
from stagemesh.gateway.session.slot_lease import SlotLease
from stagemesh.gateway.timing import GatewayTiming
from stagemesh.protos.v1 import stage_pb2, types_pb2


def test_an_epoch_serves_after_the_first_step_and_has_the_page_back_after_the_second() -> None:
    async def go() -> None:
        stages = [types_pb2.StageView(stage=0), types_pb2.StageView(stage=1)]
        view = types_pb2.PipelineView(pipeline_id="pipeline-0", epoch=5, stages=stages)
        ledger = Ledger(lambda shape: make(pages=len(shape.pages)))
        on_crossed = MagicMock()
        observers = Observers(MagicMock(), MagicMock(active=False), GatewayTiming(), lambda: 0.0)
        loop = BatchLoop(view, ledger, observers, asyncio.Event(), on_crossed, MagicMock())
        session = MagicMock(share=4, shape=Shape(tuple(range(4)), 4, 3), stages_kv=[], open=AsyncMock())
        session.close = session.hear_out = AsyncMock()
        loop.session = cast(Session, session)
        await loop.start(SlotLease("g", lambda: None))
        assert loop.probe()
        assert ledger.scheduler.pages.num_free == 3
        plans = [call.args[0].plan for call in session.broadcast.call_args_list if call.args[0].HasField("plan")]
        first, second = (plan.step for plan in plans)

        def told(stage: int, step: int) -> None:
            loop.on_result(stage, stage_pb2.StepResult(epoch=5, step=step))

        told(0, first)
        assert not loop.crossed, "the first stage alone"
        told(1, first)
        assert loop.crossed
        assert ledger.scheduler.pages.num_free == 3, "the second step still writes"
        told(1, second)
        assert ledger.scheduler.pages.num_free == 4
        on_crossed.assert_called_once_with(loop)
        await loop.close()

    asyncio.run(go())
