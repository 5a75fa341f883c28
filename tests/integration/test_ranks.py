"""A rank group of real processes as its agent drives it, when one of its ranks is killed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import Awaitable, Callable

import psutil
import pytest
import uvloop
from starving import starving, waited_s

from stagemesh import process
from stagemesh.errors import StageLost, StagemeshError
from stagemesh.processes.launcher import Launcher, LaunchTiming
from stagemesh.protos.v1 import stage_pb2, worker_pb2
from stagemesh.settings.stage import StageSettings
from stagemesh.stage_worker.agent.rank_group import RankGroup
from stagemesh.stage_worker.main import RANK, rank_launcher
from stagemesh.stage_worker.messages.control import Kind
from stagemesh.stage_worker.messages.rank_config import RankConfig
from stagemesh.stage_worker.timing import StageTiming

DEADLINE_S = 20.0
TIMING = StageTiming()


async def talk(group: RankGroup) -> None:
    ends = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends:
        # No session has this number: ranks pass it over.
        await group.run(10**6, b"")
        await asyncio.sleep(0)


def started(
    story: Callable[[Launcher, Callable[[], RankGroup]], Awaitable[None]],
    device: str = "cpu",
    ranks: int = 1,
    timing: LaunchTiming | None = None,
    transport: str = "auto",
) -> None:
    """Runs a story of groups of ranks that one launcher starts; nothing of them is left behind it."""

    async def run() -> None:
        settings = StageSettings.model_validate({"tensor_parallel_size": ranks, "transport": transport, "threads": 1})
        configs = RankConfig.of_worker("stage test", settings, "cpu")
        of_device = RankConfig.of_worker("stage test", settings, device)
        launcher, groups = rank_launcher(of_device, timing or LaunchTiming()), list[RankGroup]()

        def make() -> RankGroup:
            groups.append(RankGroup(configs, RANK, lambda *frame: None, launcher, TIMING))
            return groups[-1]

        try:
            async with asyncio.timeout(2 * DEADLINE_S):
                await story(launcher, make)
        finally:
            for group in groups:
                await group.stop()
            launcher.stop()
        assert not psutil.Process().children(), "whoever starts a process reaps it"
        assert all(rank.returncode is not None for group in groups for rank in group.processes)

    uvloop.run(run())


async def rank_of(group: RankGroup) -> psutil.Process:
    """Starts a group; its rank."""
    await group.start()
    return psutil.Process(group.processes[0].pid)


def forkserver_of(launcher: Launcher) -> psutil.Process:
    """From which ranks are forked."""
    assert launcher.forkserver is not None
    return psutil.Process(launcher.forkserver.pid)


def test_messages_to_a_rank_that_was_killed_end_in_a_typed_error_and_the_group_stops() -> None:
    """Also in the moment in which the socket is closed and nobody has looked at the process yet."""

    async def story(launcher: Launcher, make: Callable[[], RankGroup]) -> None:
        group = make()
        await group.start()
        group.processes[1].kill()
        with pytest.raises(StageLost):
            await talk(group)
        with pytest.raises(StageLost):
            await group.call(Kind.ACTIVATE, stage_pb2.ActivateRequest(), stage_pb2.ActivateResponse, DEADLINE_S)

    started(story, ranks=2, transport="tcp")


def test_what_every_rank_says_against_an_order_is_heard_of_once() -> None:
    async def story(launcher: Launcher, make: Callable[[], RankGroup]) -> None:
        untaken: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: untaken.append(context))
        group = make()
        await group.start()
        with pytest.raises(StagemeshError, match="does not hold stage"):
            await group.call(Kind.ACTIVATE, stage_pb2.ActivateRequest(), stage_pb2.ActivateResponse, DEADLINE_S)
        # As its request, an order that cannot be read is refused; the rank goes on.
        unreadable = worker_pb2.LinkBroken(pipeline_id="\x7f")
        with pytest.raises(StagemeshError, match="cannot be read as ActivateRequest"):
            await group.call(Kind.ACTIVATE, unreadable, stage_pb2.ActivateResponse, DEADLINE_S)
        gc.collect()
        assert not untaken
        assert not group.lost.done()

    started(story, ranks=2, transport="tcp")


def test_a_rank_that_is_started_again_need_not_import_what_the_first_did() -> None:
    async def story(launcher: Launcher, make: Callable[[], RankGroup]) -> None:
        took_s = []
        parents = set()
        for how in (signal.SIGKILL, signal.SIGABRT, signal.SIGKILL):
            group, began = make(), time.monotonic()
            rank = await rank_of(group)
            took_s.append(time.monotonic() - began)
            # A fork copies the thread that forks, and nothing that others do.
            assert forkserver_of(launcher).num_threads() == 1
            parents.add(forkserver_of(launcher).pid)
            rank.send_signal(how)
            assert how.name in await group.lost
            await group.stop()
        assert len(parents) == 1
        print("up after", took_s)
        assert max(took_s[1:]) < took_s[0] / 2

    started(story)


def test_ranks_go_on_without_their_forkserver_and_the_next_ones_have_another() -> None:
    async def story(launcher: Launcher, make: Callable[[], RankGroup]) -> None:
        group = make()
        rank = await rank_of(group)
        first = forkserver_of(launcher)
        first.kill()
        while launcher.forkserver is None or launcher.forkserver.pid == first.pid:
            await asyncio.sleep(0.01)
        assert not group.lost.done()
        rank.kill()
        assert "SIGKILL" in await group.lost
        await group.stop()
        await make().start()
        assert forkserver_of(launcher) != first

    started(story)


def test_a_forkserver_that_hangs_is_given_up() -> None:
    async def story(launcher: Launcher, make: Callable[[], RankGroup]) -> None:
        group = make()
        rank, forkserver = await rank_of(group), forkserver_of(launcher)
        forkserver.send_signal(signal.SIGSTOP)
        rank.kill()
        await group.lost
        await group.stop()
        began = time.monotonic()
        with pytest.raises(StageLost, match="stage test forkserver forked no child, and does not go on"):
            await make().start()
        assert time.monotonic() - began < DEADLINE_S
        assert not psutil.pid_exists(forkserver.pid)
        again = make()
        await again.start()
        assert forkserver_of(launcher) != forkserver

    started(story, timing=LaunchTiming(idle_s=0.5))


def test_a_forkserver_that_is_killed_while_it_imports_is_the_loss_of_a_group_like_any_other() -> None:
    async def story(launcher: Launcher, make: Callable[[], RankGroup]) -> None:
        files = len(os.listdir("/proc/self/fd"))
        group = make()
        starting = asyncio.create_task(group.start())
        while launcher.forkserver is None:
            await asyncio.sleep(0)
        forkserver_of(launcher).kill()
        with pytest.raises(StageLost, match="was killed by SIGKILL"):
            await starting
        await group.stop()
        assert len(os.listdir("/proc/self/fd")) <= files
        again = make()
        await again.start()

    started(story)


def test_a_start_that_is_called_off_leaves_no_error_that_nobody_took() -> None:
    """SIGTERM while the ranks are on their way up."""

    async def story(launcher: Launcher, make: Callable[[], RankGroup]) -> None:
        untaken: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: untaken.append(context))
        group = make()
        starting = asyncio.create_task(group.start())
        while not group.processes:
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)
        assert not group.up
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        del starting
        await group.stop()
        gc.collect()
        assert not untaken

    started(story)


def test_a_rank_without_a_core_is_not_lost_and_one_that_hangs_is(caplog: pytest.LogCaptureFixture) -> None:
    async def story(launcher: Launcher, make: Callable[[], RankGroup]) -> None:
        group = make()
        rank = await rank_of(group)
        before_s = waited_s(rank.pid)
        with starving(rank.pid):
            began = time.monotonic()
            # Longer than any time in which it had promised to be heard of, and many times so.
            while waited_s(rank.pid) - before_s < 5 and time.monotonic() - began < DEADLINE_S:
                await asyncio.sleep(0.1)
                assert not group.lost.done(), group.lost.result()
            assert waited_s(rank.pid) - before_s > 5
        rank.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        await asyncio.wait([group.lost])
        assert "did not go on" in group.lost.result()
        print(f"a stopped rank is noticed after {time.monotonic() - began:.2f} s")
        assert time.monotonic() - began < 2

    started(story)
    assert caplog.text.count("hangs: ") == 1


def test_an_agent_that_is_not_preferred_leaves_its_children_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one without the right to it is that was started with a lower priority: it may not raise theirs."""

    def refuse(*_: int) -> None:
        raise PermissionError

    before = os.getpriority(os.PRIO_PROCESS, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "setpriority", refuse)
        launcher = Launcher("test", LaunchTiming())
        process.prefer()
        child = launcher.spawn("time:sleep", b"", [])
    assert os.getpriority(os.PRIO_PROCESS, 0) == os.getpriority(os.PRIO_PROCESS, child.pid) == before
    child.kill()
    child.wait(DEADLINE_S)


def test_on_cuda_devices_each_rank_is_an_interpreter_of_its_own() -> None:
    async def story(launcher: Launcher, make: Callable[[], RankGroup]) -> None:
        await make().start()
        assert launcher.forkserver is None

    started(story, device="cuda")


def priorities(pid: int) -> set[int]:
    """Of all threads of a process."""
    return {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}


def test_neither_the_forkserver_nor_ranks_are_preferred_as_their_agent_is() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)

    async def story(launcher: Launcher, make: Callable[[], RankGroup]) -> None:
        process.prefer()
        if os.getpriority(os.PRIO_PROCESS, 0) != process.PREFERRED_NICE:
            pytest.skip("NOBODY IS PREFERRED HERE: this user may not raise a priority")
        group = make()
        starting = asyncio.create_task(group.start())
        try:
            async with asyncio.timeout(DEADLINE_S):
                while launcher.forkserver is None:
                    await asyncio.sleep(0)
                assert priorities(launcher.forkserver.pid) == {before}
                await starting
            assert [priorities(p.pid) for p in group.processes] == [{before}] * 2
        finally:
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting

    try:
        started(story, ranks=2)
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)
