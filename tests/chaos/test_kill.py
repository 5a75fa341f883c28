"""kill -9 of each kind of process under load: what was accepted is finished, the mesh comes back, nothing is left.

Figures of many kills of a larger model: `python -m benchmarks.recovery`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from typing import Any

import psutil
import pytest
from load import Load
from mesh import Mesh, serve

SEED = 11
CLIENTS = 12
BACK_S = 15.0
TYPED_S = 2.0
ROLES = {
    "coordinator": "stagemesh coordinator",
    "agent": "stagemesh stage 1",
    "rank": "layers",
    "one of two ranks": "rank 1",
    "forkserver": "stagemesh stage 1 forkserver",
    "gateway": "stagemesh gateway",
}
UNNOTICED = ("coordinator", "forkserver")


def shared_memory() -> set[str]:
    """What lies in shared memory: POSIX segments by name, System V ones by key and id."""
    listed = subprocess.run(["ipcs", "-m"], capture_output=True, text=True, check=True).stdout
    sysv = {" ".join(line.split()[:2]) for line in listed.splitlines() if line.startswith("0x")}
    return {f"posix {name}" for name in os.listdir("/dev/shm")} | {f"sysv {entry}" for entry in sysv}


def candidates(mesh: Mesh, role: str) -> list[psutil.Process]:
    """Processes of a role, by their titles; an agent's name is also the beginning of its forkserver's and ranks'."""
    found = mesh.named(ROLES[role])
    return [p for p in found if role != "agent" or not {"rank", "forkserver"} & set(" ".join(p.cmdline()).split())]


async def wait_until(what: str, check: Any, timeout_s: float) -> float:
    """Polls `check` until it holds; seconds that took."""
    began = time.monotonic()
    while not await asyncio.to_thread(check):
        assert time.monotonic() - began < timeout_s, f"{what}: not within {timeout_s} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def kill_once(mesh: Mesh, role: str, load: Load, count: int) -> dict[str, float]:
    """Kills, then checks what clients saw; figures in seconds. `count`: processes of the whole mesh."""
    before = load.finished()
    await wait_until("requests finish", lambda: load.finished() >= before + 3, 30)
    await wait_until("load", lambda: len(load.live()) >= CLIENTS // 2, 20)
    epoch = mesh.epoch()
    await wait_until(f"a {role} that has its title", lambda: candidates(mesh, role), BACK_S)
    target = candidates(mesh, role)[-1]
    live, killed_at = load.live(), time.monotonic()
    target.send_signal(signal.SIGKILL)
    if role in UNNOTICED:
        # Nobody notices: what runs goes on, and new requests are served while it is away.
        began = load.finished()
        await wait_until(f"requests finish without a {role}", lambda: load.finished() >= began + 3, 30)
        assert not [e for e in load.endings if e.error is not None and e.ended > killed_at]
        await wait_until(f"the {role} is back", lambda: len(mesh.children()) == count, BACK_S)
        back_s = time.monotonic() - killed_at
        assert mesh.epoch() == epoch, f"a {role}'s restart must not change a running pipeline"
    else:
        if role == "gateway":
            await wait_until("every live request ends", lambda: all(e.ended for e in live), TYPED_S)
        else:
            if (said := await asyncio.to_thread(mesh.health))[0] != 200:
                assert said[0] == 503, said
                assert said[1], "a 503 must say why"
            await wait_until("every live request ends", lambda: all(e.ended for e in live), BACK_S)
            # One that had no token yet may have come while there was nothing to make a pipeline of: never accepted.
            assert {(e.error.reason, e.tokens) for e in live if e.error is not None} <= {("UNAVAILABLE", 0)}
        began = load.finished()
        await wait_until("the mesh serves again", lambda: load.finished() > began and mesh.ready, BACK_S)
        back_s = time.monotonic() - killed_at
        if role != "gateway":
            assert mesh.epoch() > epoch, "a new epoch fences the old one"
    await wait_until("as many processes as before", lambda: len(mesh.children()) == count, BACK_S)
    ends = [e.ended - killed_at for e in live]
    return {
        "back_s": round(back_s, 2),
        "last_ended_s": round(max(ends), 3),
        "failed": sum(e.error is not None for e in live),
    }


async def kill_repeatedly(mesh: Mesh, role: str, times: int) -> list[dict[str, float]]:
    load = Load(mesh.grpc_address, CLIENTS, SEED, max_tokens=32)
    running = asyncio.create_task(load.run())
    try:
        count = len(mesh.children())
        return [await kill_once(mesh, role, load, count) for _ in range(times)]
    finally:
        load.stopping = True
        await asyncio.wait_for(running, 60)


IN_CI = ("coordinator", "rank", "forkserver", "gateway")


@pytest.mark.parametrize("role", [pytest.param(r, marks=() if r in IN_CI else pytest.mark.slow) for r in ROLES])
def test_a_killed_process_comes_back(role: str) -> None:
    before = shared_memory()
    print(f"seed {SEED}")
    with serve("-pp", "2", "-tp", "2,1" if role == "one of two ranks" else "1") as mesh:
        print(role, asyncio.run(kill_repeatedly(mesh, role, 2)))
        # Work that was cut off must not hold pages.
        mesh.check_pages_are_free()
    assert shared_memory() <= before


def test_the_supervisor_killed_leaves_nothing() -> None:
    before = shared_memory()
    with serve("-pp", "2") as mesh:
        children = mesh.children()
        mesh.process.kill()
        _, alive = psutil.wait_procs(children, timeout=5)
        for process in alive:
            process.kill()
        assert not alive, f"orphans: {alive}"
    assert shared_memory() <= before


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_everything_within_five_seconds(sig: signal.Signals) -> None:
    with serve("-pp", "2") as mesh:
        titles = [" ".join(p.cmdline()) for p in mesh.children()]
        ranks = ("stagemesh stage 0 layers 0-3 rank 0", "stagemesh stage 1 layers 4-7 rank 0")
        for wanted in ("stagemesh coordinator", "stagemesh stage 1", "stagemesh gateway", *ranks):
            assert any(wanted in title for title in titles), f"{wanted!r} names no process: {titles}"
        assert mesh.stop(sig) < 5.0
