"""A pipeline whose steps do not come back is given up; not by a gateway that was itself not run."""

from __future__ import annotations

import asyncio
from unittest.mock import MagicMock

import pytest

from stagemesh.gateway.drive.session import LOOK_S, STEP_SLACK_S, BatchLoop
from stagemesh.protos.v1 import types_pb2


@pytest.fixture
def loop() -> BatchLoop:
    """One whose steps take next to nothing, with a step out."""

    async def make() -> BatchLoop:
        view = types_pb2.PipelineView(pipeline_id="pipeline-0", epoch=5, stages=[types_pb2.StageView()])
        work = MagicMock(recovering=False)
        work.expected_s.return_value = 0.001
        return BatchLoop(view, work, MagicMock(), MagicMock(), MagicMock(), MagicMock(), MagicMock())

    made = asyncio.run(make())
    made.crossed = True
    return made


def look(loop: BatchLoop, monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", lambda: now)
        loop._check_deadline()


def test_a_step_that_does_not_come_back(loop: BatchLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    look(loop, monkeypatch, now)
    loop._sent_at = {1: now}
    while loop.lost is None:
        now += LOOK_S
        assert now < 1000 + 2 * STEP_SLACK_S
        look(loop, monkeypatch, now)
    assert now > 1000 + STEP_SLACK_S
    assert loop.stuck


def test_a_gateway_that_was_stopped_blames_nobody(loop: BatchLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    look(loop, monkeypatch, now)
    loop._sent_at = {1: now}
    for _ in range(5):
        now += 60
        look(loop, monkeypatch, now)
    look(loop, monkeypatch, now + LOOK_S)
    assert loop.lost is None
