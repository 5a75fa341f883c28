"""Measures a pipeline's efficiency and its services' CPU time, by concurrent requests and stages."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
from pathlib import Path

from benchmarks.common.http_load import HttpLoad
from benchmarks.common.probe import cpu_seconds, processes, scrape, sums_of

from .mesh import PROMPT_LEN, Shape, SleepMesh, running

RAMP_DEADLINE_S = 120.0
POLL_S = 0.1


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement of P stages with n concurrent requests, in steady state. CPU seconds are those of the window."""

    stages: int
    step_ms: float
    at_once: int
    steps_in_flight: int
    """Number of concurrent steps that the mesh allows."""
    stream: bool
    window_s: float
    tok_s: float
    steps_s: float
    busiest: float
    """Share of the window in which the busiest stage was in a step."""
    cpu_s: dict[str, float]
    cpu_share: float
    """Share of all cores that mesh and client use. Near 1, the machine is the bound, not the mesh."""
    idle_cpu: dict[str, float]
    """CPU seconds per second by role, of the same mesh without requests."""
    load_before: float

    @property
    def efficiency(self) -> float:
        """Steps per second divided by those of an ideal pipeline, which when full runs one step in a sleep's time."""
        return self.steps_s * self.step_ms / 1e3 / self.ideal_busy

    @property
    def rows(self) -> float:
        """Mean number of rows per step."""
        return self.tok_s / self.steps_s

    @property
    def ideal_busy(self) -> float:
        """Share of the time in which a stage of an ideal pipeline would compute."""
        return min(1.0, self.at_once / self.stages)

    def busy_cpu_s(self, role: str) -> float:
        """Returns the CPU seconds of roles whose name begins with `role`, minus their idle use."""
        return sum(
            max(0.0, seconds - self.idle_cpu.get(name, 0.0) * self.window_s)
            for name, seconds in self.cpu_s.items()
            if name.startswith(role)
        )


async def measure(mesh: SleepMesh, at_once: int, window_s: float, stream: bool, idle_cpu: dict[str, float]) -> Point:
    """Starts `at_once` requests that outlast the window, waits until all generate, and counts over the window."""
    shape = mesh.shape
    load_before = os.getloadavg()[0]
    longest = shape.max_model_len - PROMPT_LEN
    async with HttpLoad(mesh.port, at_once, longest, PROMPT_LEN, stream) as load:
        await _until_running(mesh, load, at_once)
        members = processes(os.getpid())
        loop = asyncio.get_running_loop()
        before, cpu_before, began = await _sums(mesh), cpu_seconds(members), loop.time()
        await asyncio.sleep(window_s)
        after, cpu_after, ended = await _sums(mesh), cpu_seconds(members), loop.time()
        load.check()
    mesh.check()
    await _until_idle(mesh)
    spent_s = ended - began
    delta = {name: value - before.get(name, 0.0) for name, value in after.items()}
    cpu_s = {role: cpu_after[role] - cpu_before[role] for role in cpu_after}
    last = str(shape.stages - 1)
    return Point(
        stages=shape.stages,
        step_ms=shape.step_s * 1e3,
        at_once=at_once,
        steps_in_flight=mesh.steps_in_flight,
        stream=stream,
        window_s=spent_s,
        tok_s=delta["tokens"] / spent_s,
        steps_s=delta[f"steps {last}"] / spent_s,
        busiest=max(delta[f"stage {stage} compute"] for stage in range(shape.stages)) / spent_s,
        cpu_s=cpu_s,
        cpu_share=sum(cpu_s.values()) / spent_s / len(os.sched_getaffinity(0)),
        idle_cpu=idle_cpu,
        load_before=load_before,
    )


async def idle(seconds: float) -> dict[str, float]:
    """Measures CPU seconds per second of each role, while no request runs."""
    members = processes(os.getpid())
    before = cpu_seconds(members)
    await asyncio.sleep(seconds)
    return {role: (spent - before[role]) / seconds for role, spent in cpu_seconds(members).items()}


async def _sums(mesh: SleepMesh) -> dict[str, float]:
    return sums_of(await asyncio.to_thread(scrape, mesh.base_url))


async def _until_running(mesh: SleepMesh, load: HttpLoad, at_once: int) -> None:
    """Waits until every request runs and has had two tokens on average."""
    start = (await _sums(mesh))["tokens"]
    async with asyncio.timeout(RAMP_DEADLINE_S):
        while True:
            sums = await _sums(mesh)
            if sums["running"] >= at_once and sums["tokens"] - start >= 2 * at_once:
                return
            load.check()
            mesh.check()
            await asyncio.sleep(POLL_S)


async def _until_idle(mesh: SleepMesh) -> None:
    """Waits until the requests whose clients went away have ended."""
    async with asyncio.timeout(RAMP_DEADLINE_S):
        while (await _sums(mesh))["running"]:
            await asyncio.sleep(POLL_S)


async def grid(arguments: argparse.Namespace, folder: Path) -> list[Point]:
    """Measures every combination, with one mesh for each number of stages and length of a step."""
    points: list[Point] = []
    for step_ms in arguments.step_ms:
        for stages in arguments.stages:
            shape = Shape(stages, step_ms / 1e3, max_num_seqs=max(arguments.at_once))
            async with running(shape, folder) as mesh:
                print(f"{stages} stages of {step_ms:g} ms: ready after {mesh.start_s:.1f} s", flush=True)
                idle_cpu = await idle(arguments.window)
                for at_once in arguments.at_once:
                    point = await measure(mesh, at_once, arguments.window, arguments.stream, idle_cpu)
                    points.append(point)
                    print(
                        f"  {at_once} at once: {point.tok_s:.1f} tok/s, {point.rows:.1f} rows a step, "
                        f"{point.efficiency:.3f} of the ideal, busiest stage {point.busiest:.2f}, "
                        f"{point.cpu_share:.0%} of the cores",
                        flush=True,
                    )
    return points
