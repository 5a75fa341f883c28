"""A gateway hears of pages that have come when every rank has its part of them."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest

from stagemesh.protos.v1 import stage_pb2
from stagemesh.settings.stage import StageSettings
from stagemesh.stage_worker.agent.gateway_session import GatewaySession
from stagemesh.stage_worker.agent.service import Agent
from stagemesh.stage_worker.messages.control import Kind
from stagemesh.stage_worker.timing import StageTiming


class Ranks:
    """As many as are asked for."""

    size = 2


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_when_the_last_rank_has_them(order: list[int]) -> None:
    agent = Agent(StageSettings(), "w", StageTiming(), MagicMock())
    session = agent.sessions[5] = GatewaySession(5, stage_pb2.RunOpen(), Ranks())  # type: ignore[arg-type]
    first, second = (stage_pb2.PagesCopied(index=0, number=n).SerializeToString() for n in (1, 2))
    agent.on_frame(order[0], Kind.PAGES_COPIED, 5, first)
    agent.on_frame(order[0], Kind.PAGES_COPIED, 5, second)
    assert session.outbox.empty(), "another rank has not"
    agent.on_frame(order[1], Kind.PAGES_COPIED, 5, first)
    told = session.outbox.get_nowait()
    assert isinstance(told, bytes)
    assert stage_pb2.RunResponse.FromString(told).copied.number == 1
    assert session.outbox.empty()
    agent.on_frame(0, Kind.PAGES_COPIED, 6, first)  # a session that is over
