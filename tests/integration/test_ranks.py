"""A rank group of real processes as its agent drives it, when one of its ranks is killed."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Awaitable, Callable

import psutil
import pytest
import uvloop

from stagemesh import process
from stagemesh.errors import StageLost, StagemeshError
from stagemesh.settings.stage import StageSettings
from stagemesh.stage_worker.agent.rank_group import RankGroup
from stagemesh.stage_worker.agent.rank_starter import RankStarter, make_starter
from stagemesh.stage_worker.messages.control import Kind

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
        starter = make_starter("cpu")
        group = RankGroup(settings, "cpu", "stage test", lambda *frame: None, starter)
        await group.start()
        try:
            os.kill(group._processes[1].pid, signal.SIGKILL)
            with pytest.raises(StageLost):
                await talk(group)
            with pytest.raises(StageLost):
                await group.call(Kind.ACTIVATE, b"", DEADLINE_S)
        finally:
            await group.stop()
            starter.stop()
        assert all(rank.returncode is not None for rank in group._processes)

    uvloop.run(story())


def test_what_every_rank_says_against_an_order_is_heard_of_once() -> None:
    async def story() -> None:
        untaken: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: untaken.append(context))
        settings = StageSettings(tensor_parallel_size=2, device="cpu", transport="tcp", threads=1)
        starter = make_starter("cpu")
        group = RankGroup(settings, "cpu", "stage test", lambda *frame: None, starter)
        await group.start()
        try:
            with pytest.raises(StagemeshError):
                await group.call(Kind.ACTIVATE, b"\xff", DEADLINE_S)
            gc.collect()
            assert not untaken
        finally:
            await group.stop()
            starter.stop()

    uvloop.run(story())


def started(story: Callable[[RankStarter, Callable[[], RankGroup]], Awaitable[None]], device: str = "cpu") -> None:
    """Runs a story of groups of one rank that one starter starts; nothing of them is left behind it."""

    async def run() -> None:
        settings = StageSettings(tensor_parallel_size=1, device="cpu", transport="auto", threads=1)
        starter, groups = make_starter(device), list[RankGroup]()

        def make() -> RankGroup:
            groups.append(RankGroup(settings, "cpu", "stage test", lambda *frame: None, starter))
            return groups[-1]

        try:
            async with asyncio.timeout(2 * DEADLINE_S):
                await story(starter, make)
        finally:
            for group in groups:
                await group.stop()
            starter.stop()
        assert not psutil.Process().children(), "whoever starts a process reaps it"

    uvloop.run(run())


async def forked(group: RankGroup) -> tuple[psutil.Process, psutil.Process]:
    """Starts a group; its rank, and the zygote that has forked it."""
    await group.start()
    rank = psutil.Process(group._processes[0].pid)
    zygote = rank.parent()
    assert zygote is not None
    return rank, zygote


def test_a_rank_that_is_started_again_need_not_import_what_the_first_did() -> None:
    async def story(starter: RankStarter, make: Callable[[], RankGroup]) -> None:
        took_s = []
        parents = set()
        for how in (signal.SIGKILL, signal.SIGABRT, signal.SIGKILL):
            group, began = make(), time.monotonic()
            rank, zygote = await forked(group)
            took_s.append(time.monotonic() - began)
            # A fork copies the thread that forks, and nothing that others do.
            assert zygote.num_threads() == 1
            parents.add(zygote.pid)
            rank.send_signal(how)
            assert how.name in await group.lost
            await group.stop()
        assert len(parents) == 1
        print("up after", took_s)
        assert max(took_s[1:]) < took_s[0] / 2

    started(story)


def test_ranks_end_with_their_zygote_and_the_next_ones_have_another() -> None:
    async def story(starter: RankStarter, make: Callable[[], RankGroup]) -> None:
        group = make()
        rank, zygote = await forked(group)
        zygote.kill()
        assert "SIGKILL" in await group.lost
        assert psutil.wait_procs([rank], timeout=5)[1] == [], "it ends with its parent"
        await group.stop()
        again = make()
        await again.start()
        assert psutil.Process(again._processes[0].pid).parent() != zygote

    started(story)


def test_a_zygote_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagemesh.stage_worker.agent.rank_starter.NEXT_S", 0.5)

    async def story(starter: RankStarter, make: Callable[[], RankGroup]) -> None:
        group = make()
        rank, zygote = await forked(group)
        zygote.send_signal(signal.SIGSTOP)
        rank.kill()
        await group.lost
        await group.stop()
        began = time.monotonic()
        with pytest.raises(StageLost, match=r"forked no rank within 0\.5 s"):
            await make().start()
        assert time.monotonic() - began < DEADLINE_S
        assert not psutil.pid_exists(zygote.pid)
        again = make()
        await again.start()
        assert psutil.Process(again._processes[0].pid).parent() != zygote

    started(story)


def test_a_zygote_that_is_killed_while_it_imports_is_the_loss_of_a_group_like_any_other() -> None:
    async def story(starter: RankStarter, make: Callable[[], RankGroup]) -> None:
        files = len(os.listdir("/proc/self/fd"))
        group = make()
        starting = asyncio.create_task(group.start())
        while not (children := psutil.Process().children()):
            await asyncio.sleep(0)
        children[0].kill()
        with pytest.raises(StageLost, match="was killed by SIGKILL"):
            await starting
        await group.stop()
        assert len(os.listdir("/proc/self/fd")) <= files
        again = make()
        await again.start()

    started(story)


def test_a_start_that_is_called_off_leaves_no_error_that_nobody_took() -> None:
    """SIGTERM while the ranks are on their way up."""

    async def story(starter: RankStarter, make: Callable[[], RankGroup]) -> None:
        untaken: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: untaken.append(context))
        group = make()
        starting = asyncio.create_task(group.start())
        while not group._calls:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        del starting
        await group.stop()
        gc.collect()
        assert not untaken

    started(story)


def test_an_agent_that_is_not_preferred_leaves_its_children_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one without the right to it is that was started with a lower priority: it may not raise theirs."""

    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    monkeypatch.setattr(process, "_nice_before", None)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    process.prefer()
    process.not_prefer(os.getpid())
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_on_cuda_devices_each_rank_is_an_interpreter_of_its_own() -> None:
    async def story(starter: RankStarter, make: Callable[[], RankGroup]) -> None:
        group = make()
        await group.start()
        assert psutil.Process(group._processes[0].pid).parent() == psutil.Process()

    started(story, device="cuda")


def priorities(pid: int) -> set[int]:
    """Of all threads of a process."""
    return {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}


def test_neither_the_zygote_nor_ranks_are_preferred_as_their_agent_is() -> None:
    async def story() -> None:
        settings = StageSettings(tensor_parallel_size=2, device="cpu", transport="auto", threads=2)
        starter = make_starter("cpu")
        group = RankGroup(settings, "cpu", "stage test", lambda *frame: None, starter)
        starting = asyncio.create_task(group.start())
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not (children := psutil.Process().children()):
                    await asyncio.sleep(0)
                (zygote,) = children
                assert priorities(zygote.pid) == {0}
                await starting
            assert [priorities(p.pid) for p in group._processes] == [{0}] * 2
        finally:
            starting.cancel()
            await group.stop()
            starter.stop()

    before = os.getpriority(os.PRIO_PROCESS, 0)
    process.prefer()
    try:
        if os.getpriority(os.PRIO_PROCESS, 0) != process.PREFERRED_NICE:
            pytest.skip("NOBODY IS PREFERRED HERE: this user may not raise a priority")
        uvloop.run(story())
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)
