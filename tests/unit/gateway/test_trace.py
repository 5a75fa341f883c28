"""The recorder behind POST /trace: nothing while nobody asks, whole steps when somebody does, bounds, its route."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from stagemesh.errors import DeadlineExceeded, InvalidRequest, QueueFull
from stagemesh.gateway.api.http.app import build_app
from stagemesh.gateway.schedule.plan import Plan, Row
from stagemesh.gateway.schedule.sequence import Sequence
from stagemesh.gateway.telemetry.trace import MAX_OPEN, MAX_STEPS, STAGE_COLUMNS, Recorder, now_us
from stagemesh.protos.v1 import stage_pb2, types_pb2

VIEW = types_pb2.PipelineView(
    pipeline_id="p0",
    epoch=3,
    model=types_pb2.ModelRef(name="m"),
    stages=[
        types_pb2.StageView(stage=i, worker_id=f"w{i}", layers=types_pb2.LayerRange(first=2 * i, last=2 * i + 2))
        for i in range(2)
    ],
)


def plan(step: int) -> Plan:
    """A prefill chunk of five tokens and a decode row."""
    new = Sequence((7,) * 9, 0, 4, ident=1)
    old = Sequence((7,) * 3, 0, 4, log=[9], ident=2)
    return Plan(step, [Row(new, 0, 5, [], samples=False), Row(old, 3, 1, [], samples=True)])


def result(step: int, stage: int) -> stage_pb2.StepResult:
    """What a stage says of a step; the last one brings the decode row's token."""
    timing = types_pb2.StepTiming(
        plan_arrived_us=10 + stage, input_complete_us=20, began_us=30, output_us=40, ended_us=50, result_sent_us=60,
        wait_input_us=1, compute_us=2, wait_send_us=3, compute_cpu_us=4, draft_us=5,
    )  # fmt: skip
    tokens: dict[str, Any] = {"sequences": [2], "positions": [4], "tokens": [8]} if stage == 1 else {}
    return stage_pb2.StepResult(step=step, epoch=3, timing=timing, **tokens)


def run_step(recorder: Recorder, step: int, stages: tuple[int, ...] = (0, 1)) -> None:
    """One step as the batch loop tells it; results come in the order of `stages`."""
    recorder.sent(VIEW, plan(step), now_us())
    for stage in stages:
        recorder.result(VIEW, stage, result(step, stage))
        if stage == 1:
            recorder.delivered(VIEW, step)


async def capture(recorder: Recorder, steps: int, wait_s: float, act: Callable[[], None]) -> dict[str, Any]:
    """A capture during which `act` is called."""
    task = asyncio.create_task(recorder.capture(steps, wait_s))
    while not recorder.active:
        await asyncio.sleep(0)
    act()
    return await task


def test_a_step_is_recorded_with_what_every_stage_said() -> None:
    recorder = Recorder()

    def act() -> None:
        # A step that was out before is not known; the first stage's result may be the last to come.
        recorder.result(VIEW, 1, result(1, 1))
        recorder.delivered(VIEW, 1)
        run_step(recorder, 2)
        run_step(recorder, 3, stages=(1, 0))

    answer = json.loads(json.dumps(asyncio.run(capture(recorder, 2, 5, act))))
    assert [s["step"] for s in answer["steps"]] == [2, 3]
    assert not recorder.active
    for step in answer["steps"]:
        assert (step["tokens"], step["prefill_tokens"], step["sequences"], step["sampled"]) == (6, 5, [1, 2], [2])
        assert step["planned_us"] <= step["sent_us"] <= step["received_us"] <= step["delivered_us"]
        for stage, values in enumerate(step["stages"]):
            told = dict(zip(answer["stage_columns"], values, strict=True))
            assert tuple(told) == STAGE_COLUMNS
            assert told["plan_arrived_us"] == 10 + stage
            assert (told["began_us"], told["output_us"], told["ended_us"]) == (30, 40, 50)
            assert step["sent_us"] <= told["result_received_us"] <= now_us()
    (pipeline,) = answer["pipelines"]
    assert [s["layers"] for s in pipeline["stages"]] == [[0, 2], [2, 4]]


def test_nothing_is_kept_while_nobody_asks() -> None:
    recorder = Recorder()
    for step in range(10):
        run_step(recorder, step)
    assert recorder.open_steps == 0
    with pytest.raises(DeadlineExceeded, match=r"no step was run within 0\.05 s: send requests"):
        asyncio.run(recorder.capture(1, 0.05))
    assert not recorder.active


def test_a_capture_ends_at_its_time_with_what_there_is() -> None:
    recorder = Recorder()
    answer = asyncio.run(capture(recorder, 5, 0.05, lambda: run_step(recorder, 1)))
    assert len(answer["steps"]) == 1


def test_steps_that_never_come_back_are_bounded() -> None:
    recorder = Recorder()

    def act() -> None:
        for step in range(MAX_OPEN + 50):
            recorder.sent(VIEW, plan(step), now_us())
        assert recorder.open_steps == MAX_OPEN
        run_step(recorder, 10_000)

    assert len(asyncio.run(capture(recorder, 1, 5, act))["steps"]) == 1
    assert recorder.open_steps == 0


@pytest.mark.parametrize(("steps", "wait_s"), [(0, 1), (-1, 1), (MAX_STEPS + 1, 1), (1, 0), (1, 301), (1, -2)])
def test_bounds_are_said(steps: int, wait_s: float) -> None:
    with pytest.raises(InvalidRequest, match=f"{MAX_STEPS}|300 seconds"):
        asyncio.run(Recorder().capture(steps, wait_s))


def test_one_capture_at_a_time() -> None:
    async def go() -> None:
        recorder = Recorder()
        first = asyncio.create_task(recorder.capture(1, 30))
        while not recorder.active:
            await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await recorder.capture(1, 30)
        # Whoever asked goes away: the next one may.
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        with pytest.raises(DeadlineExceeded):
            await recorder.capture(1, 0.01)

    asyncio.run(go())


def test_the_route(make_served: Callable[..., Any]) -> None:
    served = make_served(api_key="key")
    recorder = Recorder()
    served.app = build_app(served.engine, served.settings, served.metrics, served.timing, recorder)
    auth = {"authorization": "Bearer key"}

    async def go() -> None:
        async with served.http() as url, httpx.AsyncClient(base_url=url, timeout=30) as http:
            assert (await http.post("/trace?steps=1")).status_code == 401
            assert (await http.get("/trace", headers=auth)).status_code == 405
            for query, words in (
                ("steps=5000", "between 1 and 4096"),
                ("steps=0", "between 1 and 4096"),
                ("steps=two", "steps is 'two'; it must be a number"),
                ("steps=1.5", "whole number"),
                ("timeout=1e9", "at most 300 seconds"),
                ("timeout=nan", "must be a number"),
                ("step=5", "unknown parameter 'step'; known: steps, timeout"),
            ):
                answer = await http.post(f"/trace?{query}", headers=auth)
                assert answer.status_code == 400, query
                assert words in answer.json()["error"]["message"]
            late = await http.post("/trace?timeout=0.05", headers=auth)
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
            asked = asyncio.create_task(http.post("/trace?steps=2", headers=auth))
            async with asyncio.timeout(10):
                while not recorder.active:
                    await asyncio.sleep(0.01)
            assert (await http.post("/trace?steps=2", headers=auth)).status_code == 429
            run_step(recorder, 1)
            run_step(recorder, 2)
            assert [s["step"] for s in (await asked).json()["steps"]] == [1, 2]
            # A client that goes away ends its capture: the next need not wait for the timeout.
            gone = asyncio.create_task(http.post("/trace?steps=2", headers=auth))
            async with asyncio.timeout(10):
                while not recorder.active:
                    await asyncio.sleep(0.01)
                gone.cancel()
                while recorder.active:
                    await asyncio.sleep(0.01)

    asyncio.run(go())
