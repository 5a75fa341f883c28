"""Orders and sessions while a worker's ranks are started anew."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import MagicMock

import pytest

from stagemesh.errors import InternalError, StaleEpoch, Unavailable
from stagemesh.protos.v1 import stage_pb2, worker_pb2
from stagemesh.settings.stage import StageSettings
from stagemesh.stage_worker.agent.gateway_session import GatewaySession
from stagemesh.stage_worker.agent.rank_group import RankGroup
from stagemesh.stage_worker.agent.service import Agent
from stagemesh.stage_worker.messages.control import Kind, failure_of
from stagemesh.stage_worker.messages.rank_config import RankConfig
from stagemesh.stage_worker.timing import StageTiming

TIMING = StageTiming()


def agent() -> Agent:
    return Agent(StageSettings(), "w", TIMING, MagicMock())


def group(lost: str | None = None) -> RankGroup:
    """Whose ranks are not up; or are lost."""
    launcher: Any = MagicMock()
    configs = RankConfig.of_worker("stage 0", StageSettings(), "cpu")
    made = RankGroup(configs, "nothing:run", lambda *_: None, launcher, TIMING)
    if lost is not None:
        made.lost.set_result(lost)
    return made


def test_a_session_of_ranks_that_died_ends_without_asking_those_that_are_being_started() -> None:
    async def go() -> None:
        worker = agent()
        session = worker.sessions[5] = GatewaySession(5, stage_pb2.RunOpen(), group("killed"))
        worker.ranks = group()
        await worker.close_session(session)
        assert not worker.sessions
        assert not session.outbox.empty()

    asyncio.run(go())


def test_orders_are_to_come_again_when_the_ranks_are_up() -> None:
    async def go() -> None:
        worker = agent()
        worker.ranks = group()
        key = stage_pb2.PipelineKey(pipeline_id="pipeline-0", epoch=1)
        with pytest.raises(Unavailable, match="are being started"):
            await worker.Release(stage_pb2.ReleaseRequest(key=key), None)
        with pytest.raises(Unavailable, match="are being started"):
            await worker.ConnectLink(stage_pb2.ConnectLinkRequest(key=key), None)

    asyncio.run(go())


def test_late_frames_are_counted() -> None:
    async def go() -> None:
        worker = agent()
        for rank, count in ((0, 3), (1, 1)):
            worker.on_frame(rank, Kind.LATE_FRAMES, 0, worker_pb2.LateFrames(count=count).SerializeToString())
        assert worker.stale_refused == {"frame": 4}

    asyncio.run(go())


def test_a_plan_of_an_earlier_epoch_is_counted_and_ends_its_session() -> None:
    async def go() -> None:
        worker = agent()
        session = worker.sessions[5] = GatewaySession(5, stage_pb2.RunOpen(), group())
        failure = failure_of(StaleEpoch("plan of epoch 1"))
        worker.on_frame(0, Kind.SESSION_ENDED, 5, failure.SerializeToString())
        assert worker.stale_refused == {"plan": 1}
        assert isinstance(session.outbox.get_nowait(), StaleEpoch)

    asyncio.run(go())


@pytest.mark.parametrize("kind", [Kind.SESSION_ENDED, Kind.PROGRESS, Kind.LATE_FRAMES, Kind.LINK_BROKEN])
def test_what_a_rank_says_and_nobody_can_read_is_refused_by_name(kind: Kind) -> None:
    async def go() -> None:
        worker = agent()
        worker.progress[1] = {}
        with pytest.raises(InternalError, match="cannot be read as"):
            worker.on_frame(0, kind, 1, b"\xff")

    asyncio.run(go())
