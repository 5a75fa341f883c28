"""What `serve` does with a service that died: it is started again, and its start is in nobody's way."""

from __future__ import annotations

import asyncio
import os
import time

import psutil
import pytest

from stagemesh import process
from stagemesh.config import StageSettings
from stagemesh.local.children import Child
from stagemesh.process import BEHIND_S

DEADLINE_S = 60.0


def nice(pid: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, pid)


def test_a_worker_that_is_started_again_imports_behind_those_that_compute() -> None:
    """It comes back at its port, and in front of them: it keeps a lease."""

    async def story() -> None:
        settings = StageSettings(coordinator="127.0.0.1:1", device="cpu", worker_id="test")
        child = Child("stage", "worker test", settings, stands_back=True)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await child.start()
                child.pin_ports()
                assert child.process is not None
                before, ports = child.process, child.ports
                assert nice(before.pid) == process.PREFERRED_NICE
                before.kill()
                before.wait()
                again = asyncio.create_task(child.restart())
                while child.process is before:
                    await asyncio.sleep(0)
                assert nice(child.process.pid) == process.STARTING_NICE
                assert process.session_nice(child.process.pid) in (process.STARTING_NICE, None)
                await again
                assert (child.ports, nice(child.process.pid)) == (ports, process.PREFERRED_NICE)
                began = time.monotonic()
                while process.session_nice(child.process.pid) == process.STARTING_NICE:
                    await asyncio.sleep(0.01)
                assert process.session_nice(child.process.pid) in (0, None)
                assert time.monotonic() - began < BEHIND_S + 0.5, "on a busy machine it would never be there"
                while not (started := psutil.Process(child.process.pid).children(recursive=True)) or any(
                    nice(each.pid) != 0 for each in started
                ):
                    await asyncio.sleep(0.01)
        finally:
            child.kill()

    before = nice(0)
    process.prefer()
    preferred = nice(0) == process.PREFERRED_NICE
    os.setpriority(os.PRIO_PROCESS, 0, before)
    if not preferred:
        pytest.skip("NOBODY IS PREFERRED HERE: this user may not raise a priority")
    asyncio.run(story())
