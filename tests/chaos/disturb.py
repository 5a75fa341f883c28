"""A mesh of three stages whose streams are disturbed, and what must hold of them afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import streams
from mesh import Mesh

SEED = 23
STREAMS = 16
MAX_TOKENS = 400
PLANNED_S = 1.0
"""Longest pause of a stream behind something planned: a tenth of a second on cores that do nothing else, and never as
long as making a loss good."""
COMMON = ("-pp", "3", "--max-model-len", "1024")


def rank_of(mesh: Mesh, stage: int, timeout_s: float = 10) -> psutil.Process:
    """The rank that holds a stage now; after a loss the standby may, and for a moment nobody does."""
    deadline = time.monotonic() + timeout_s
    while len(found := mesh.named(f"stage {stage} layers")) != 1:
        assert time.monotonic() < deadline, f"stage {stage} is held by {len(found)} ranks"
        time.sleep(0.01)
    return found[0]


def agent_of(mesh: Mesh, stage: int) -> psutil.Process:
    """Its agent."""
    agent = mesh.agent_of(rank_of(mesh, stage))
    assert agent is not None
    return agent


async def until(check: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Waits for something to hold."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.01)


async def disturbed(
    mesh: Mesh,
    disturb: Callable[[list[streams.Stream]], object],
    count: int = STREAMS,
    max_tokens: int = MAX_TOKENS,
) -> list[streams.Stream]:
    """All streams, with `disturb` in their midst."""
    told = streams.make(count, max_tokens, SEED)
    running = asyncio.create_task(streams.run_all(mesh.grpc_address, told))
    await until(lambda: all(s.length > 8 for s in told), "every stream has begun")
    assert not any(s.ended for s in told)
    await asyncio.to_thread(disturb, told)
    await asyncio.wait_for(running, 120)
    return told


def check(told: list[streams.Stream], expected: list[streams.Stream]) -> None:
    """No error, and no other token."""
    for stream, other in zip(told, expected, strict=True):
        assert stream.error is None, stream.error
        assert stream.tokens == other.tokens, f"{stream.params}: other tokens"
        assert stream.finished == other.finished


def wait_longer(mesh: Mesh, told: list[streams.Stream], epoch: int, timeout_s: float = 30) -> None:
    """Until a later epoch serves, and each stream has gone on."""
    deadline = time.monotonic() + timeout_s
    while mesh.epoch() <= epoch or not mesh.ready:
        assert time.monotonic() < deadline, "not recovered"
        time.sleep(0.01)
    before = [s.length for s in told]
    while any(s.length <= length and not s.ended for s, length in zip(told, before, strict=True)):
        assert time.monotonic() < deadline, "a stream stands still"
        time.sleep(0.01)


def stagemesh(*args: str, status: int = 0) -> str:
    """Runs the command; what it printed."""
    command = [sys.executable, "-m", "stagemesh.cli.main", *args]
    # It waits for the mesh to be whole, and a rank that is stopped within the first step of its life may take 30 s.
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def end_worker(mesh: Mesh, worker_id: str) -> None:
    """Ends a worker that was drained: it comes back as one that may hold a stage."""
    address = next((w["address"] for w in mesh.get("/mesh")["workers"] if w["worker_id"] == worker_id), "")
    port = int(address.rsplit(":", 1)[1]) if address else -1
    for process in mesh.children():
        with contextlib.suppress(psutil.Error):
            if any(c.laddr.port == port for c in process.net_connections() if c.status == psutil.CONN_LISTEN):
                process.kill()


def counts(mesh: Mesh) -> list[int]:
    """Layers of the stages."""
    stages = mesh.get("/mesh")["pipelines"][0]["stages"]
    return [s["layers"]["last"] - s["layers"]["first"] for s in stages]


def holders(mesh: Mesh) -> list[str]:
    """The workers of the stages, in order."""
    return [stage["worker_id"] for stage in mesh.get("/mesh")["pipelines"][0]["stages"]]
