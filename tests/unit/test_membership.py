"""A worker's standing with its coordinator: what it says when nobody answers, and how late it runs."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import grpc.aio
import pytest

from stagemesh.processes.cpu import CpuUse
from stagemesh.protos.v1 import coordinator_pb2, coordinator_pb2_grpc, worker_pb2
from stagemesh.settings.stage import StageSettings
from stagemesh.stage_worker.agent.lateness import Lateness
from stagemesh.stage_worker.agent.membership import Membership
from stagemesh.stage_worker.agent.rank_group import RankGroup
from stagemesh.stage_worker.agent.service import Agent
from stagemesh.stage_worker.timing import StageTiming

DEADLINE_S = 20.0
GROUP = cast(RankGroup, SimpleNamespace(size=1, ready=[worker_pb2.RankReady(addresses={"tcp": b"x"})]))


def told(address: str, story: Callable[[], Awaitable[None]], timing: StageTiming) -> None:
    """Registers a worker at an address for as long as a story goes on."""

    async def run() -> None:
        settings = StageSettings(coordinator=address)
        membership = Membership(settings, Agent(settings, "w", timing, MagicMock()), "w", "127.0.0.1:1", timing)
        membership.register(GROUP, incarnation=7)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await story()
        finally:
            await membership.stop()

    asyncio.run(run())


@pytest.mark.parametrize("answers", [False, True], ids=["nobody listens", "nobody answers"])
def test_a_worker_without_a_coordinator_says_so_soon_and_less_and_less_often(
    answers: bool, caplog: pytest.LogCaptureFixture
) -> None:
    timing = StageTiming(silence_s=0.2, coordinator_call_s=5.0)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        if answers:
            sock.listen()  # Connections are made, and never taken.
        address = f"127.0.0.1:{sock.getsockname()[1]}"

        async def three_warnings() -> None:
            while len(caplog.records) < 3:
                await asyncio.sleep(0.01)

        with caplog.at_level(logging.WARNING):
            told(address, three_warnings, timing)
    at = [record.created for record in caplog.records]
    assert at[2] - at[1] > 1.5 * (at[1] - at[0])
    for record in caplog.records:
        assert f"the coordinator at {address}" in record.getMessage()
        assert "See that it runs, that --coordinator names it" in record.getMessage()
        assert re.search("cannot be reached: |does not answer", record.getMessage())


class Coordinator(coordinator_pb2_grpc.CoordinatorServicer):
    """Takes any worker, and keeps what it says."""

    def __init__(self) -> None:
        self.said: list[coordinator_pb2.KeepAliveRequest] = []

    async def Register(self, request: Any, context: Any) -> coordinator_pb2.RegisterResponse:
        return coordinator_pb2.RegisterResponse(lease_ms=600, renew_ms=20)

    async def KeepAlive(
        self, requests: AsyncIterator[coordinator_pb2.KeepAliveRequest], context: Any
    ) -> AsyncIterator[coordinator_pb2.KeepAliveResponse]:
        async for request in requests:
            self.said.append(request)
            yield coordinator_pb2.KeepAliveResponse(known=True)


def test_renewals_say_how_late_the_worker_runs_and_forget_it_again(caplog: pytest.LogCaptureFixture) -> None:
    timing = StageTiming(lateness_half_life_s=0.1, silence_s=0.3)

    async def story() -> None:
        coordinator, server = Coordinator(), grpc.aio.server()
        coordinator_pb2_grpc.add_CoordinatorServicer_to_server(coordinator, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        settings = StageSettings(coordinator=f"127.0.0.1:{port}")
        membership = Membership(settings, Agent(settings, "w", timing, MagicMock()), "w", "127.0.0.1:1", timing)
        membership.register(GROUP, incarnation=7)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await until(lambda: any(said.late_ms < 100 for said in coordinator.said))
                time.sleep(0.6)  # noqa: ASYNC251 - the process is not run
                await until(lambda: coordinator.said[-1].late_ms > 500)
                await until(lambda: coordinator.said[-1].late_ms < 250)
        finally:
            await membership.stop()
            await server.stop(0)

    asyncio.run(story())
    assert not [r for r in caplog.records if r.name.startswith("stagemesh")], "one that is registered is not silent"


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.005)


def test_lateness_is_the_longest_of_late_by_the_clock_or_the_kernel_and_decays() -> None:
    now = 100.0
    passed_and_starved_s = [(0.15, 0.0), (1.15, 0.0), (0.15, 0.0), (0.15, 2.0), (2.0, 0.0)]
    uses = iter([CpuUse(starved_s=starved_s) for _, starved_s in passed_and_starved_s])
    lateness = Lateness(2.0, SimpleNamespace(read=lambda passed_s: next(uses)), clock=lambda: now)
    late_s = []
    for passed_s, _ in passed_and_starved_s:
        now += passed_s
        late_s.append(lateness.note(0.15))
    assert late_s == pytest.approx([0.0, 1.0, 0.5 ** (0.15 / 2), 2.0, 1.85])
    now += 2.0
    uses = iter([CpuUse()])
    assert lateness.note(2.0) == pytest.approx(0.925)
