"""Runs many short requests. The last ones must be as fast as the first ones, in the same memory."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.http_load import HttpLoad
from benchmarks.common.probe import processes
from benchmarks.common.results import machine_line, save

from .mesh import PROMPT_LEN, Shape, running

PARTS = 10
SAMPLE_S = 0.5
SLOWEST_END = 0.95
"""Least ratio of the last part's requests per second to the median part's."""
MOST_GROWTH_MIB = 4.0
"""Largest growth of the gateway's resident memory after the second part. The first part fills caches."""
STAGES = 2


async def run(arguments: argparse.Namespace, folder: Path, told: Mapping[str, Any]) -> int:
    """Measures and writes. Returns 1 if the end was too slow, if memory grew too much, or if a request failed."""
    shape = Shape(STAGES, arguments.step_ms / 1e3, max_num_seqs=arguments.at_once, max_model_len=256)
    rss: list[tuple[float, dict[str, float]]] = []
    async with running(shape, folder) as mesh:
        members = processes(os.getpid())
        load = HttpLoad(
            mesh.port, arguments.at_once, arguments.max_tokens, PROMPT_LEN, arguments.stream, arguments.requests
        )
        began = time.monotonic()
        async with load:
            finished = asyncio.create_task(load.done())
            while not finished.done():
                rss.append((time.monotonic(), _rss_mib(members)))
                mesh.check()
                await asyncio.wait([finished], timeout=SAMPLE_S)
            finished.result()
        rss.append((time.monotonic(), _rss_mib(members)))
    parts = split(load, rss, began)
    typical = sorted(part["requests_s"] for part in parts)[len(parts) // 2]
    slowest_end = parts[-1]["requests_s"] / typical
    growth = parts[-1]["rss_mib"]["gateway"] - parts[1]["rss_mib"]["gateway"]
    verdict = not load.failures and slowest_end >= SLOWEST_END and growth <= MOST_GROWTH_MIB
    lines = [
        f"# {arguments.requests:,} short requests",
        "",
        f"Written by `python -m benchmarks.scale many` on {told['date']}. {STAGES} stages that sleep "
        f"{arguments.step_ms:g} ms, {arguments.at_once} requests at once, {PROMPT_LEN} tokens in, "
        f"{arguments.max_tokens} out{', streamed' if arguments.stream else ''}; {len(load.failures)} failed.",
        "",
        f"The last tenth ran at {slowest_end:.2f} of the median tenth's rate (must be at least {SLOWEST_END:g}), and "
        f"the gateway grew by {growth:.1f} MiB after the second tenth (must be at most {MOST_GROWTH_MIB:g}).",
        "",
        machine_line(told["machine"]),
        "",
        "| requests | requests/s | p50, ms | p99, ms | RSS of gateway, MiB | of all workers |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for part in parts:
        workers = sum(mib for role, mib in part["rss_mib"].items() if "stage" in role)
        lines.append(
            f"| {part['until']:,} | {part['requests_s']:.0f} | {part['p50_ms']:.1f} | {part['p99_ms']:.1f} | "
            f"{part['rss_mib']['gateway']:.1f} | {workers:.1f} |"
        )
    whole = {**told, "held": verdict, "failures": load.failures[:20], "parts": parts}
    save(arguments.out, whole, lines)
    return 0 if verdict else 1


def split(load: HttpLoad, rss: list[tuple[float, dict[str, float]]], began: float) -> list[dict[str, Any]]:
    """Divides the requests into tenths. Returns rate, latency, and memory at the end of each."""
    size = max(1, len(load.ended_at) // PARTS)
    parts: list[dict[str, Any]] = []
    for part in range(PARTS):
        ended = load.ended_at[part * size : (part + 1) * size]
        if not ended:
            break
        took = sorted(load.took_s[part * size : (part + 1) * size])
        memory = next((mib for at, mib in rss if at >= ended[-1]), rss[-1][1])
        parts.append(
            {
                "until": part * size + len(ended),
                "requests_s": len(ended) / (ended[-1] - began),
                "p50_ms": took[len(took) // 2] * 1e3,
                "p99_ms": took[int(len(took) * 0.99)] * 1e3,
                "rss_mib": memory,
            }
        )
        began = ended[-1]
    return parts


def _rss_mib(members: list[tuple[str, psutil.Process]]) -> dict[str, float]:
    held: dict[str, float] = {}
    for role, process in members:
        held[role] = held.get(role, 0.0) + process.memory_info().rss / 2**20
    return held
