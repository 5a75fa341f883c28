"""A rank group of real processes as its agent drives it, when one of its ranks is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
import uvloop

from stagemesh import process
from stagemesh.config import StageSettings
from stagemesh.errors import StageLost
from stagemesh.stage_worker.control import Kind
from stagemesh.stage_worker.ranks import RankGroup

DEADLINE_S = 20.0


async def talk(group: RankGroup) -> None:
    ends = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends:
        # No session has this number: ranks pass it over.
        await group.run(10**6, b"")
        await asyncio.sleep(0)


def test_messages_to_a_rank_that_was_killed_end_in_a_typed_error_and_the_group_stops() -> None:
    """Also in the moment in which the socket is closed and nobody has looked at the process yet."""

    async def story() -> None:
        settings = StageSettings(tensor_parallel_size=2, device="cpu", transport="tcp", threads=1)
        group = RankGroup(settings, "cpu", "stage test", lambda *frame: None)
        await group.start()
        try:
            os.kill(group._processes[1].pid, signal.SIGKILL)
            with pytest.raises(StageLost):
                await talk(group)
            with pytest.raises(StageLost):
                await group.call(Kind.ACTIVATE, b"", DEADLINE_S)
        finally:
            await group.stop()
        assert all(rank.returncode is not None for rank in group._processes)

    uvloop.run(story())


def priorities(pid: int) -> set[int]:
    """Of all threads of a process."""
    return {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}


def test_a_rank_that_starts_lets_those_that_compute_go_first_and_then_is_their_equal() -> None:
    async def story() -> None:
        settings = StageSettings(tensor_parallel_size=2, device="cpu", transport="auto", threads=2)
        group = RankGroup(settings, "cpu", "stage test", lambda *frame: None)
        starting = asyncio.create_task(group.start())
        try:
            async with asyncio.timeout(DEADLINE_S):
                while len(group._processes) < 2:
                    await asyncio.sleep(0)
            assert [priorities(p.pid) for p in group._processes] == [{process.STARTING_NICE}] * 2
            await starting
            assert [priorities(p.pid) for p in group._processes] == [{0}] * 2
        finally:
            starting.cancel()
            await group.stop()

    before = os.getpriority(os.PRIO_PROCESS, 0)
    process.prefer()
    try:
        if os.getpriority(os.PRIO_PROCESS, 0) != process.PREFERRED_NICE:
            pytest.skip("NOBODY IS PREFERRED HERE: this user may not raise a priority")
        uvloop.run(story())
    finally:
        process._preferred = False
        os.setpriority(os.PRIO_PROCESS, 0, before)
