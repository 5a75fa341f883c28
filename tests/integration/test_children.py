"""How `serve` starts a worker, and starts it again when it died: forked from a process that has imported everything."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator

import psutil
import pytest

from stagemesh import process
from stagemesh.errors import ConfigError
from stagemesh.local.children import Child
from stagemesh.local.supervisor import WORKER_IMPORTS
from stagemesh.local.timing import ServeTiming
from stagemesh.processes.launcher import Launcher, LaunchTiming
from stagemesh.processes.orphans import adopt_orphans
from stagemesh.protos.v1.processes_pb2 import Call
from stagemesh.settings.stage import StageSettings

DEADLINE_S = 60.0
SETTINGS = StageSettings(coordinator="127.0.0.1:1", device="cpu", worker_id="test")


@pytest.fixture(autouse=True)
def adopting() -> Iterator[None]:
    """As `serve`, this process is the parent of its descendants' orphans."""
    adopt_orphans()
    yield
    adopt_orphans(False)


def told(
    story: Callable[[Launcher, Child], Awaitable[None]],
    settings: StageSettings = SETTINGS,
    timing: LaunchTiming | None = None,
) -> None:
    """Runs a story of a worker and the launcher that it comes from; nothing of them is left behind it."""

    async def run() -> None:
        imports = Call(function=WORKER_IMPORTS, argument=SETTINGS.model_dump_json().encode())
        launcher = Launcher("", timing or LaunchTiming(), imports=imports, own_groups=True)
        child = Child("stage", "worker test", settings, launcher, ServeTiming(), forked=True)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await story(launcher, child)
        finally:
            child.kill()
            launcher.stop()
        own = psutil.Process()
        deadline = time.monotonic() + DEADLINE_S
        while own.children() and time.monotonic() < deadline:
            launcher.reap()
            await asyncio.sleep(0.01)
        assert not own.children(), "what a worker has started ends with it"

    asyncio.run(run())


async def named(child: Child, title: str) -> psutil.Process:
    """A process of a worker, once it has its title."""
    assert child.process is not None
    while True:
        for found in psutil.Process(child.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # As a zombie, too.
                if title in " ".join(found.cmdline()):
                    return found
        await asyncio.sleep(0.01)


async def start(child: Child) -> float:
    """Starts it, or starts it again behind a SIGKILL, until its rank has its title; seconds that took."""
    began = time.monotonic()
    if child.process is None:
        await child.start()
    else:
        child.process.kill()
        child.process.wait()
        await child.restart()
    await named(child, "rank 0")
    return time.monotonic() - began


def test_a_worker_that_is_started_again_imports_nothing() -> None:
    """It is a child like any other, at its port again, and preferred, as it keeps a lease; its ranks are not."""

    async def story(launcher: Launcher, child: Child) -> None:
        without = Child("stage", "worker test", SETTINGS, launcher, ServeTiming())
        try:
            took_s = [await start(without), await start(child)]
        finally:
            without.kill()
        ports = child.ports
        took_s.append(await start(child))
        print(f"up after {took_s[0]:.2f} s as a new interpreter; forked {took_s[1]:.2f} and {took_s[2]:.2f} s")
        assert took_s[2] < took_s[0] / 2
        assert child.ports == ports
        assert child.process is not None
        agent, forks_ranks = psutil.Process(child.process.pid), await named(child, "forkserver")
        assert agent.ppid() == os.getpid()
        assert os.getpgid(agent.pid) == agent.pid, "Ctrl-C is for `serve` alone"
        assert os.getsid(agent.pid) == os.getsid(0), "between sessions nice values count for nothing"
        assert launcher.forkserver is not None
        assert psutil.Process(launcher.forkserver.pid).num_threads() == forks_ranks.num_threads() == 1
        priorities = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (agent.pid, forks_ranks.pid)]
        ours = os.getpriority(os.PRIO_PROCESS, 0)
        process.prefer()
        preferred = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, ours)
        assert priorities == [preferred, ours]

    told(story)


@pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed: UCX is NOT tested")
@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_workers_are_forked_with_ucx_loaded_if_they_may_use_it(transport: str) -> None:
    settings = SETTINGS.model_copy(update={"transport": transport}).model_dump_json()
    code = "import sys; from stagemesh.stage_worker.main import preload; preload(sys.argv[1].encode(), []); "
    code += "print('ucxx._lib.libucxx' in sys.modules)"
    command = [sys.executable, "-c", code, settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert done.stdout.strip() == str(transport == "auto")


def test_without_the_forkserver_a_worker_goes_on_and_another_can_be_started(caplog: pytest.LogCaptureFixture) -> None:
    async def story(launcher: Launcher, child: Child) -> None:
        await start(child)
        before = child.process
        assert launcher.forkserver is not None
        launcher.forkserver.kill()
        launcher.forkserver.wait()
        launcher.reap()
        rank = await named(child, "rank 0")
        rank.kill()
        while (await named(child, "rank 0")).pid == rank.pid:
            await asyncio.sleep(0.01)
        assert child.alive
        assert child.process is before
        await start(child)
        assert child.alive
        assert child.process is not before

    told(story)
    assert caplog.text.count("the forkserver is gone") == 1


def test_a_forkserver_that_hangs_is_given_up() -> None:
    async def story(launcher: Launcher, child: Child) -> None:
        launcher.begin()
        hangs = launcher.forkserver
        assert hangs is not None
        hangs.send_signal(signal.SIGSTOP)
        await start(child)
        assert hangs.poll() == -signal.SIGKILL

    told(story, timing=LaunchTiming(idle_s=0.5))


def test_a_worker_that_cannot_start_says_why_and_how_it_ended(capfd: pytest.CaptureFixture[str]) -> None:
    async def story(launcher: Launcher, child: Child) -> None:
        with pytest.raises(ConfigError, match=r"did not start \(exit status 2\)"):
            await child.start()

    told(story, SETTINGS.model_copy(update={"device": "cuda"}))
    assert "this machine has no CUDA device" in capfd.readouterr().err
