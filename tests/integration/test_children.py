"""How `serve` starts a worker, and starts it again when it died: forked from a process that has imported everything."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator

import psutil
import pytest

from stagemesh import process
from stagemesh.errors import ConfigError
from stagemesh.local.children import Child, environment, flags
from stagemesh.local.forking import ForkServer
from stagemesh.settings.stage import StageSettings

DEADLINE_S = 60.0
SETTINGS = StageSettings(coordinator="127.0.0.1:1", device="cpu", worker_id="test")


@pytest.fixture(autouse=True)
def adopting() -> Iterator[None]:
    """As `serve`, this process is the parent of its descendants' orphans."""
    process.adopt_orphans()
    try:
        yield
    finally:
        ctypes.CDLL(None).prctl(process.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def told(story: Callable[[ForkServer, Child], Awaitable[None]], settings: StageSettings = SETTINGS) -> None:
    """Runs a story of a worker and the forkserver that it comes from; nothing of them is left behind it."""

    async def run() -> None:
        forkserver = ForkServer(["stage", *flags(SETTINGS)], environment())
        child = Child("stage", "worker test", settings, forkserver=forkserver)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await story(forkserver, child)
        finally:
            child.kill()
            forkserver.end()
        own = psutil.Process()
        deadline = time.monotonic() + DEADLINE_S
        while own.children() and time.monotonic() < deadline:
            process.reap_orphans(())
            await asyncio.sleep(0.01)
        assert not own.children(), "what a worker has started ends with it"

    asyncio.run(run())


async def zygote_of(child: Child) -> psutil.Process:
    """Of a worker that is up."""
    assert child.process is not None
    while not (found := psutil.Process(child.process.pid).children()):
        await asyncio.sleep(0.01)
    return found[0]


async def start(child: Child) -> float:
    """Starts it, or starts it again behind a SIGKILL, until its ranks are up; seconds that took."""
    began = time.monotonic()
    if child.process is None:
        await child.start()
        child.pin_ports()
    else:
        child.process.kill()
        child.process.wait()
        await child.restart()
    while not any(map(is_rank, (await zygote_of(child)).children())):
        await asyncio.sleep(0.01)
    return time.monotonic() - began


def is_rank(found: psutil.Process) -> bool:
    """Importing torch starts a process of its own for a moment (`ldconfig`), which has no threads."""
    try:
        return found.num_threads() > 1
    except psutil.NoSuchProcess:
        return False


def test_a_worker_that_is_started_again_imports_nothing() -> None:
    """It is a child like any other, at its port again, and preferred, as it keeps a lease; its ranks are not."""

    async def story(forkserver: ForkServer, child: Child) -> None:
        without = Child("stage", "worker test", SETTINGS)
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
        agent, zygote = psutil.Process(child.process.pid), await zygote_of(child)
        assert agent.ppid() == os.getpid()
        assert os.getpgid(agent.pid) == agent.pid, "Ctrl-C is for `serve` alone"
        assert os.getsid(agent.pid) == os.getsid(0), "between sessions nice values count for nothing"
        assert psutil.Process(forkserver.process.pid).num_threads() == zygote.num_threads() == 1
        priorities = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (agent.pid, zygote.pid)]
        ours = os.getpriority(os.PRIO_PROCESS, 0)
        process.prefer()
        preferred = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, ours)
        assert priorities == [preferred, ours]

    told(story)


def test_without_the_forkserver_a_worker_goes_on_and_another_can_be_started(caplog: pytest.LogCaptureFixture) -> None:
    async def story(forkserver: ForkServer, child: Child) -> None:
        await start(child)
        before = child.process
        forkserver.process.kill()
        forkserver.process.wait()
        zygote = await zygote_of(child)
        zygote.children()[0].kill()
        while not zygote.children():
            await asyncio.sleep(0.01)
        assert child.alive
        assert child.process is before
        await start(child)
        assert child.alive
        assert child.process is not before

    told(story)
    assert caplog.text.count("the forkserver is gone") == 1


def test_a_forkserver_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagemesh.local.forking.FIRST_S", 0.5)

    async def story(forkserver: ForkServer, child: Child) -> None:
        forkserver.process.send_signal(signal.SIGSTOP)
        await start(child)
        assert forkserver.process.poll() == -signal.SIGKILL

    told(story)


def test_a_worker_that_cannot_start_says_why_and_how_it_ended(capfd: pytest.CaptureFixture[str]) -> None:
    async def story(forkserver: ForkServer, child: Child) -> None:
        with pytest.raises(ConfigError, match=r"did not start \(exit status 2\)"):
            await child.start()

    told(story, SETTINGS.model_copy(update={"device": "cuda"}))
    assert "this machine has no CUDA device" in capfd.readouterr().err
