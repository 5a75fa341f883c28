"""Orders and sessions while a worker's ranks are started anew."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import MagicMock

import pytest

from stagemesh.errors import StaleEpoch, Unavailable
from stagemesh.protos.v1 import stage_pb2
from stagemesh.settings.stage import StageSettings
from stagemesh.stage_worker.agent.gateway_session import GatewaySession
from stagemesh.stage_worker.agent.rank_group import RankGroup
from stagemesh.stage_worker.agent.service import Agent
from stagemesh.stage_worker.messages.control import HEADER, Kind, pack_error


def group(lost: str | None = None) -> RankGroup:
    """Whose ranks are not up; or are lost."""
    starter: Any = MagicMock()
    made = RankGroup(StageSettings(), "cpu", "stage 0", lambda *_: None, starter)
    if lost is not None:
        made.lost.set_result(lost)
    return made


def test_a_session_of_ranks_that_died_ends_without_asking_those_that_are_being_started() -> None:
    async def go() -> None:
        agent = Agent(StageSettings(), "w")
        session = agent.sessions[5] = GatewaySession(5, stage_pb2.RunOpen(), group("killed"))
        agent.ranks = group()
        await agent._close(session)
        assert not agent.sessions
        assert not session.outbox.empty()

    asyncio.run(go())


def test_orders_are_to_come_again_when_the_ranks_are_up() -> None:
    async def go() -> None:
        agent = Agent(StageSettings(), "w")
        agent.ranks = group()
        key = stage_pb2.PipelineKey(pipeline_id="pipeline-0", epoch=1)
        with pytest.raises(Unavailable, match="are being started"):
            await agent.release(stage_pb2.ReleaseRequest(key=key), None)
        with pytest.raises(Unavailable, match="are being started"):
            await agent.connect_link(stage_pb2.ConnectLinkRequest(key=key), None)

    asyncio.run(go())


def test_late_frames_are_counted() -> None:
    async def go() -> None:
        agent = Agent(StageSettings(), "w")
        agent.on_frame(0, Kind.LATE_FRAMES, 3, b"")
        agent.on_frame(1, Kind.LATE_FRAMES, 1, b"")
        assert agent.stale_refused == {"frame": 4}

    asyncio.run(go())


def test_a_plan_of_an_earlier_epoch_is_counted_and_ends_its_session() -> None:
    async def go() -> None:
        agent = Agent(StageSettings(), "w")
        session = agent.sessions[5] = GatewaySession(5, stage_pb2.RunOpen(), group())
        ended = pack_error(5, StaleEpoch("plan of epoch 1"))
        agent.on_frame(0, Kind.SESSION_ENDED, 5, ended[HEADER.size :])
        assert agent.stale_refused == {"plan": 1}
        assert isinstance(session.outbox.get_nowait(), StaleEpoch)

    asyncio.run(go())
