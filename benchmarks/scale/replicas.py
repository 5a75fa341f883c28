"""Adds a worker to the slowest stage while requests run, and measures the gain in speed.

The slowest stage takes 60 % of a step's time. A step's time grows with its rows, as if arithmetic were the bound and
not the reading of weights. Otherwise a second worker would not help.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.errors import BenchmarkError
from benchmarks.common.http_load import HttpLoad
from benchmarks.common.probe import cpu_seconds, processes, scrape, sums_of
from benchmarks.common.results import machine_line, save
from stagemesh.cli import main as cli

from .mesh import PROMPT_LEN, Shape, SleepMesh, running

SHARES = (0.4, 0.6)
"""Share of a step's time, by stage."""
DOUBLED = 1
GOAL = 1.3
CHANGE_S = 60.0
SETTLE_S = 3.0
"""Pause after a change: running requests stay in their pipeline, and only new ones are distributed."""


async def run(arguments: argparse.Namespace, folder: Path, told: Mapping[str, Any]) -> int:
    """Measures and writes. Returns 1 if it is not `GOAL` times as fast, or if a request failed."""
    row_s = arguments.row_ms / 1e3
    shape = Shape(
        len(SHARES), 0.5e-3, max_num_seqs=arguments.at_once, max_model_len=256,
        row_s=tuple(share * row_s for share in SHARES),
    )  # fmt: skip
    parts: list[dict[str, Any]] = []
    async with running(shape, folder) as mesh:
        load = HttpLoad(mesh.port, arguments.at_once, arguments.max_tokens, PROMPT_LEN, stream=True)
        async with load:
            await asyncio.sleep(SETTLE_S)
            parts.append(await _measure(mesh, 1, arguments.window))
            took_s = await _change(mesh, 2, mesh.add(DOUBLED))
            parts.append(await _measure(mesh, 2, arguments.window))
            for _ in range(arguments.pairs - 1):
                await _change(mesh, 1, _scale(mesh, "1"))
                parts.append(await _measure(mesh, 1, arguments.window))
                await _change(mesh, 2, _scale(mesh, "auto"))
                parts.append(await _measure(mesh, 2, arguments.window))
        failures = load.failures
    alone, doubled = (statistics.median(p["tok_s"] for p in parts if p["pipelines"] == n) for n in (1, 2))
    ratios = [b["tok_s"] / a["tok_s"] for a, b in zip(parts[::2], parts[1::2], strict=True)]
    verdict = not failures and min(ratios) >= GOAL
    lines = [
        "# One more worker for the slowest stage",
        "",
        f"Written by `python -m benchmarks.scale replicas` on {told['date']}. Two stages that sleep {SHARES[0]:.0%} "
        f"and {SHARES[1]:.0%} of {arguments.row_ms:g} ms for each row of a step, everything else real; "
        f"{arguments.at_once} requests at once, {PROMPT_LEN} tokens in, {arguments.max_tokens} out, streamed. A second "
        f"worker is started with `--stage {DOUBLED}` while they run; later `stagemesh scale` takes it away and gives "
        f"it back. {len(failures)} of {len(load.took_s) + len(failures)} requests failed.",
        "",
        f"{doubled / alone:.2f} times as fast (pairs: {', '.join(f'{r:.2f}' for r in ratios)}; must be at least "
        f"{GOAL:g}, and can be {SHARES[1] / SHARES[0]:g}). From the worker's start until both pipelines served: "
        f"{took_s:.1f} s.",
        "",
        machine_line(told["machine"]),
        "",
        "| pipelines | tok/s | shared stage busy | share of all cores |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {p['pipelines']} | {p['tok_s']:.0f} | {p['busy']:.2f} | {p['cpu_share']:.0%} |" for p in parts]
    save(arguments.out, {**told, "held": verdict, "failures": failures[:20], "parts": parts}, lines)
    return 0 if verdict else 1


async def _measure(mesh: SleepMesh, pipelines: int, window_s: float) -> dict[str, Any]:
    await asyncio.sleep(SETTLE_S)
    members = processes(os.getpid())
    before, cpu_before, began = sums_of(scrape(mesh.base_url)), cpu_seconds(members), time.monotonic()
    await asyncio.sleep(window_s)
    after, cpu_after, ended = sums_of(scrape(mesh.base_url)), cpu_seconds(members), time.monotonic()
    mesh.check()
    spent_s = ended - began
    cpu_s = sum(cpu_after[role] - cpu_before[role] for role in cpu_after)
    return {
        "pipelines": pipelines,
        "tok_s": (after["tokens"] - before["tokens"]) / spent_s,
        "busy": (after["stage 0 compute"] - before["stage 0 compute"]) / spent_s,
        "cpu_share": cpu_s / spent_s / len(os.sched_getaffinity(0)),
    }


async def _change(mesh: SleepMesh, pipelines: int, change: Any) -> float:
    """Makes a change, and waits until `pipelines` pipelines serve. Returns the seconds that this took."""
    began = time.monotonic()
    await change
    while True:
        seen = await asyncio.to_thread(_seen, mesh.base_url)
        if len(seen) == pipelines and all(p["state"] == "PIPELINE_STATE_SERVING" for p in seen):
            return time.monotonic() - began
        mesh.check()
        if time.monotonic() - began > CHANGE_S:
            raise BenchmarkError(f"no {pipelines} pipelines after {CHANGE_S:.0f} s: {seen}")
        await asyncio.sleep(0.05)


async def _scale(mesh: SleepMesh, replicas: str) -> None:
    code = await asyncio.to_thread(cli.main, ["scale", str(DOUBLED), replicas, "--url", mesh.base_url])
    if code:
        raise BenchmarkError(f"stagemesh scale {DOUBLED} {replicas} ended with {code}")


def _seen(base_url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(base_url + "/mesh", timeout=10) as response:
        found: list[dict[str, Any]] = json.load(response)["pipelines"]
    return found
