"""The loop puts all decode rows into one step where stages lend each other their cores and that is faster."""

from __future__ import annotations

import asyncio
from unittest.mock import AsyncMock, MagicMock

import pytest

from stagemesh.gateway.drive.ledger import Ledger
from stagemesh.gateway.drive.loop import BatchLoop, Observers
from stagemesh.gateway.schedule.pages import PageAllocator, Shape
from stagemesh.gateway.schedule.scheduler import Scheduler
from stagemesh.gateway.schedule.sequence import Sequence
from stagemesh.gateway.telemetry.metrics import Metrics
from stagemesh.gateway.timing import GatewayTiming
from stagemesh.protos.v1 import stage_pb2, types_pb2

STREAMS = 8


def rows_of_steps(cores: tuple[int, int], gateways: int, row_us: int) -> list[tuple[int, bool]]:
    """(rows, alone) of the last steps of eight streams. A step takes 6 ms and `row_us` a token, alone 0.55 of it."""
    ledger = Ledger(
        lambda shape: Scheduler(
            PageAllocator(len(shape.pages), shape.page_size), steps_in_flight=2, max_num_seqs=16,
            max_num_batched_tokens=64,
        )
    )  # fmt: skip
    found: list[tuple[int, bool]] = []

    async def go() -> None:
        limits = types_pb2.RunLimits(gateways=gateways)
        view = types_pb2.PipelineView(pipeline_id="p", epoch=1, stages=[types_pb2.StageView()] * 2, limits=limits)
        observers = Observers(Metrics(), MagicMock(), GatewayTiming(), lambda: 0.0)
        loop = BatchLoop(view, ledger, observers, asyncio.Event(), MagicMock(), MagicMock())
        opened = [stage_pb2.RunOpened(cores=cores[0], cores_alone=cores[1], kv_generation=1)] * 2
        loop.session.opened = opened
        told: list[stage_pb2.StepPlan] = []
        session = MagicMock(opened=opened, share=1000, shape=Shape(tuple(range(1000)), 16, 2))
        session.open, session.close = AsyncMock(), AsyncMock()
        session.more_cores = loop.session.more_cores
        session.broadcast = lambda request: told.append(request.plan) if request.HasField("plan") else None
        loop.session = session
        await loop.start(MagicMock())
        scheduler = ledger.scheduler
        for i in range(STREAMS):
            sequence = Sequence((i, *range(1, 20 + i)), 0, 400)
            scheduler.add(sequence)
            request = MagicMock(sampling=types_pb2.SamplingParams())
            ledger.live[sequence] = MagicMock(request=request, **{"on_token.return_value": False})
        loop.wake()
        for _ in range(200):
            async with asyncio.timeout(10):
                while not scheduler.out:
                    await asyncio.sleep(0)
            plan = next(iter(scheduler.out.values()))
            sampled = [row for row in plan.rows if row.samples]
            tokens = sum(row.count for row in plan.rows)
            spent_us = int((6000 + row_us * tokens) * (0.55 if plan.alone and cores[1] > cores[0] else 1))
            loop.on_result(
                1,
                stage_pb2.StepResult(
                    epoch=1,
                    step=plan.step,
                    sequences=[row.sequence.ident for row in sampled],
                    positions=[row.start + row.count for row in sampled],
                    tokens=[7] * len(sampled),
                    timing=types_pb2.StepTiming(tokens=tokens, compute_us=spent_us),
                ),
            )
        found.extend((len(plan.sequences), plan.alone) for plan in told)
        await loop.close()

    asyncio.run(go())
    return found[-20:]


def test_all_rows_in_one_step_that_has_all_cores() -> None:
    assert set(rows_of_steps((1, 2), 1, row_us=100)) == {(STREAMS, True)}


@pytest.mark.parametrize(
    ("cores", "gateways", "row_us"),
    [
        ((1, 1), 1, 100),  # stages on machines of their own
        ((0, 0), 1, 100),  # workers of an earlier release
        ((1, 2), 2, 100),  # another gateway has steps on the same cores
        ((1, 2), 1, 3000),  # rows take most of a step, so two of them keep both cores busy
    ],
)
def test_spread_where_that_is_faster(cores: tuple[int, int], gateways: int, row_us: int) -> None:
    assert set(rows_of_steps(cores, gateways, row_us)) == {(STREAMS // 2, False)}
