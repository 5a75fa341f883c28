"""How a mesh grows: stages whose compute is a sleep of a stated length, everything else real.

    python benchmarks/scale.py grid [--stages 1,2,4] [--at-once 1,8,64] [--step-ms 20,3]
    python benchmarks/scale.py many [--requests 20000]
    python benchmarks/scale.py replicas
    python benchmarks/scale.py partition

`grid`: the pipeline's efficiency against the requests at once and the number of stages, and what gateway and
coordinator cost a step, a token and a worker. `many`: a run of short requests that must end as fast as it began, in the
same memory. `replicas`: a second worker for the slowest stage while requests run. `partition`: how long the coordinator
takes to place 400 layers on 1,000 workers of five kinds.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import facts
import scale_many
import scale_partition
import scale_replicas
import scale_report
from http_load import HttpLoad
from probe import cpu_seconds, processes, scrape, sums_of
from sleep_mesh import PROMPT_LEN, Shape, SleepMesh, running
from vllm_venv import BenchmarkError

from stagemesh.errors import StagemeshError

RAMP_DEADLINE_S = 120.0
POLL_S = 0.1


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement: P stages, n requests at once, in steady state. Seconds of CPU are of the window."""

    stages: int
    step_ms: float
    at_once: int
    steps_in_flight: int
    """How many the mesh allows."""
    stream: bool
    window_s: float
    tok_s: float
    steps_s: float
    busiest: float
    """Share of the window that the busiest stage was in a step."""
    cpu_s: dict[str, float]
    cpu_share: float
    """Of all cores, by the mesh and the client together: near 1, the machine and not the mesh is the bound."""
    idle_cpu: dict[str, float]
    """CPU seconds a second by role, of the same mesh without requests."""
    load_before: float

    @property
    def efficiency(self) -> float:
        """Steps a second beside the ideal pipeline's: one each sleep where there are requests enough to fill it."""
        return self.steps_s * self.step_ms / 1e3 / self.ideal_busy

    @property
    def rows(self) -> float:
        """Rows a step, on average."""
        return self.tok_s / self.steps_s

    @property
    def ideal_busy(self) -> float:
        """What share of the time a stage would compute in an ideal pipeline."""
        return min(1.0, self.at_once / self.stages)

    def busy_cpu_s(self, role: str) -> float:
        """CPU seconds of the roles that begin so, over what they would have used idle."""
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
    """CPU seconds a second of each role, while no request runs."""
    members = processes(os.getpid())
    before = cpu_seconds(members)
    await asyncio.sleep(seconds)
    return {role: (spent - before[role]) / seconds for role, spent in cpu_seconds(members).items()}


async def _sums(mesh: SleepMesh) -> dict[str, float]:
    return sums_of(await asyncio.to_thread(scrape, mesh.base_url))


async def _until_running(mesh: SleepMesh, load: HttpLoad, at_once: int) -> None:
    """Until every request runs and has had two tokens on average."""
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
    """Until the requests whose client went away have ended."""
    async with asyncio.timeout(RAMP_DEADLINE_S):
        while (await _sums(mesh))["running"]:
            await asyncio.sleep(POLL_S)


async def grid(arguments: argparse.Namespace, folder: Path) -> list[Point]:
    """Every combination, one mesh for each number of stages and length of a step."""
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


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _milliseconds(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _arguments(argv: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How a mesh grows, with stages that sleep instead of computing.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    each = kinds.add_parser("grid", help="efficiency by stages and requests at once")
    each.add_argument("--stages", type=_numbers, default=[1, 2, 4, 8, 16, 32])
    each.add_argument("--at-once", type=_numbers, default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    each.add_argument("--step-ms", type=_milliseconds, default=[20.0, 3.0], help="milliseconds of each stage's sleep")
    each.add_argument("--window", type=float, default=8.0, help="seconds that each point is measured for")
    each.add_argument("--stream", action="store_true", help="clients read tokens as they come; else whole answers")
    many = kinds.add_parser("many", help="many short requests: same speed and memory at the end")
    many.add_argument("--requests", type=int, default=20000)
    many.add_argument("--at-once", type=int, default=32)
    many.add_argument("--max-tokens", type=int, default=4)
    many.add_argument("--step-ms", type=float, default=1.0)
    many.add_argument("--stream", action="store_true")
    replicas = kinds.add_parser("replicas", help="a second worker for the slowest stage while requests run")
    replicas.add_argument("--at-once", type=int, default=64)
    replicas.add_argument("--max-tokens", type=int, default=100)
    replicas.add_argument("--row-ms", type=float, default=4.0, help="milliseconds of a row over both stages")
    replicas.add_argument("--window", type=float, default=8.0, help="seconds that each point is measured for")
    replicas.add_argument("--pairs", type=int, default=3)
    kinds.add_parser("partition", help="placing 400 layers on 1,000 workers")
    partition = kinds.choices["partition"]
    outs = ((each, "scale"), (many, "scale-many"), (replicas, "scale-replicas"), (partition, "scale-partition"))
    for kind, name in outs:
        kind.add_argument("--out", type=Path, default=facts.RESULTS / name, help="results, without suffix")
    return parser.parse_args(None if argv is None else list(argv))


def main(argv: Iterable[str] | None = None) -> int:
    """The command line. 0: measured, and what must hold held; 1: it did not; 2: it could not be measured."""
    arguments = _arguments(argv)
    told = {"date": facts.today(), "machine": facts.machine(), "versions": facts.own_versions()}
    told["command"] = "python benchmarks/scale.py " + " ".join(sys.argv[1:] if argv is None else list(argv))
    try:
        with tempfile.TemporaryDirectory(prefix="stagemesh-scale-") as scratch:
            if arguments.kind == "grid":
                points = asyncio.run(grid(arguments, Path(scratch)))
                return scale_report.write_grid(arguments.out, points, told)
            if arguments.kind == "many":
                return asyncio.run(scale_many.run(arguments, Path(scratch), told))
            if arguments.kind == "replicas":
                return asyncio.run(scale_replicas.run(arguments, Path(scratch), told))
            return scale_partition.run(arguments.out, told)
    except (BenchmarkError, StagemeshError, TimeoutError, RuntimeError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
