"""Measures what clients see when parts of a mesh are killed, stopped or drained while streams run.

    python -m benchmarks.recovery MODEL [--what rank,agent,hang,coordinator,gateway,drain,repartition,scale,nothing]
                                   [--times 50] [--streams 20] [--tokens 256] [--standbys 1] [--burners 0]

Streams run all the time. Each repeats one of a fixed set of requests, and its tokens are compared with those of an
undisturbed run. A disturbance is made when every stream has started and a standby has loaded its weights. For each
kind, the table shows failed requests, wrong tokens, the time until the gateway knew of the loss (`lost`), the time from
then to the next token (`recovered`), and the longest pause of any stream. In the row `nothing`, nothing is done for a
second. A loss that is reported then is a false alarm, and also in the rows of the coordinator, of moved layers and of
`scale`. `scale` gives a stage a second worker, waits until both pipelines run requests, and removes the worker. Burners
are processes that compute beside the mesh. Clients use gRPC. If the gateway is killed, they use HTTP, and resume their
streams at the next gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import facts
from benchmarks.common.errors import BenchmarkError
from benchmarks.common.results import RESULTS
from stagemesh import Client

from .mesh import BACK_S, HARMLESS, KINDS, PLANNED, Mesh, bring_back, disturb, serving
from .streams import SEED, ResumingStream, make_streams

SPEED_S = 4.0
"""Seconds for which the undisturbed speed is measured, before and after."""


async def tokens_a_second(mesh: Mesh, streams: Sequence[ResumingStream]) -> float:
    """Measures the undisturbed speed of all streams together."""
    await asyncio.to_thread(mesh.wait_whole)
    before, began = sum(s.tokens for s in streams), time.monotonic()
    await asyncio.sleep(SPEED_S)
    return (sum(s.tokens for s in streams) - before) / (time.monotonic() - began)


async def measure(
    mesh: Mesh, kind: str, times: int, streams: list[ResumingStream]
) -> tuple[list[dict[str, float]], list[float], list[float]]:
    """Makes `times` disturbances. Returns the figures of each, the longest pause of each stream in each, and tokens per
    second before and after."""
    rng, stop, figures, pauses = random.Random(SEED), asyncio.Event(), [], list[float]()
    async with Client(mesh.grpc_address) as client:
        # Only streams over HTTP can be resumed at another gateway.
        runs = (s.run_http(mesh.url, stop) if kind == "gateway" else s.run(client, stop) for s in streams)
        running = [asyncio.create_task(run) for run in runs]
        speeds = [await tokens_a_second(mesh, streams)]
        for _ in range(times):
            await asyncio.to_thread(mesh.wait_whole)
            before = [s.tokens for s in streams]
            while any(s.tokens <= at for s, at in zip(streams, before, strict=True)):
                await asyncio.sleep(0.05)
            # With this pause, disturbances happen at different moments of a step.
            await asyncio.sleep(rng.random() * 0.2)
            for stream in streams:
                stream.pause_s = 0.0
            began_at = await asyncio.to_thread(disturb, mesh, kind, rng)
            figures.append(await after(mesh, kind, streams, began_at))
            pauses += [stream.pause_s for stream in streams]
            if kind == "drain":
                await asyncio.to_thread(bring_back, mesh)
        speeds.append(await tokens_a_second(mesh, streams))
        stop.set()
        await asyncio.wait(running, timeout=BACK_S)
    return figures, pauses, speeds


async def after(mesh: Mesh, kind: str, streams: Sequence[ResumingStream], began_at: float) -> dict[str, float]:
    """Waits until every stream continues. Returns the figures of the disturbance."""
    told: dict[str, float] = {}
    deadline = time.monotonic() + BACK_S
    while kind not in ("coordinator", "gateway", "scale", "nothing"):
        new = [e for e in (await asyncio.to_thread(mesh.get))["events"] if e["at"] >= began_at]
        ends = [e for e in new if e["event"] in ("recovered", "moved")]
        if ends and kind in PLANNED:
            told = {"paused_s": ends[-1]["duration_ms"] / 1000, "pages": ends[-1].get("pages_copied", 0),
                    "hard_way": float(any(e["event"] == "lost" for e in new))}  # fmt: skip
            break
        if ends:
            lost = next(e for e in new if e["event"] == "lost")
            told = {"known_s": lost["at"] - began_at, "recovered_s": ends[-1]["duration_ms"] / 1000,
                    "replayed_tokens": ends[-1]["replayed_tokens"]}  # fmt: skip
            break
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{kind}: not recovered within {BACK_S:g} s")
        await asyncio.sleep(0.05)
    before = [s.tokens for s in streams]
    while any(s.tokens <= at for s, at in zip(streams, before, strict=True)):
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{kind}: a stream stands still")
        await asyncio.sleep(0.02)
    return {**told, "pause_s": max(s.pause_s for s in streams)}


def spread(values: list[float]) -> dict[str, float]:
    """Returns p50, p99 (the maximum of fewer than 100 values) and the maximum."""
    ordered = sorted(values)
    pick = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.99)]
    return {"p50": round(pick[0], 3), "p99": round(pick[1], 3), "max": round(ordered[-1], 3)}


async def run(given: argparse.Namespace, kinds: Mapping[str, int], write: Callable[[dict[str, Any]], None]) -> None:
    """Measures all kinds, each on a new mesh. Results are written after each kind."""
    results: dict[str, Any] = {}
    logs: Path | None = given.logs
    for kind, times in kinds.items():
        with (
            tempfile.TemporaryDirectory(prefix="stagemesh-recovery-") as folder,
            serving(given.model, Path(folder), given.standbys, (logs or Path(folder)) / f"{kind}.log") as mesh,
        ):
            seen = await asyncio.to_thread(mesh.wait_whole)
            mesh.first_layers = seen["pipelines"][0]["stages"][0]["layers"]["last"]
            streams = make_streams(given.streams, given.tokens)
            async with Client(mesh.grpc_address) as client:
                await asyncio.gather(*(stream.run(client, None) for stream in streams))
            for stream in streams:
                stream.finished = stream.tokens = 0
            known, began_at = mesh.alarms(), time.monotonic()
            figures, pauses, speeds = await measure(mesh, kind, times, streams)
            alarms, seconds = mesh.alarms() - known, time.monotonic() - began_at
        results[kind] = {
            "times": len(figures),
            "seconds": round(seconds),
            "requests": sum(s.finished for s in streams),
            "failed": sum(len(s.failed) for s in streams),
            "errors": sorted({e for s in streams for e in s.failed})[:5],
            "wrong": sum(s.wrong for s in streams),
            **({"false_alarms": alarms} if kind in HARMLESS else {}),
            **{key: spread([f[key] for f in figures]) for key in figures[0]},
            "stream_pause_s": spread(pauses),
            "tokens_a_second": {"before": round(speeds[0]), "after": round(speeds[1])},
            "worst": sorted(figures, key=lambda f: f["pause_s"])[-5:],
            **({"asked_again": sum(s.asked_again for s in streams)} if kind == "gateway" else {}),
        }
        print(kind, json.dumps(results[kind]), flush=True)
        write(results)


@contextmanager
def burning(count: int) -> Iterator[None]:
    """Runs `count` processes that compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def table(results: dict[str, Any]) -> list[str]:
    """Returns the results as a Markdown table."""
    lines = [
        "| what | times | requests | failed | wrong tokens | known, s: p50 / p99 | next token after, s "
        "| no step planned, s | pause of a stream, s | longest of all streams, s | tokens computed again, p50 "
        "| tokens a second before, after |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, r in results.items():
        alarms = f", {r['false_alarms']} false alarms in {r['seconds']} s" if "false_alarms" in r else ""
        cells = [kind + alarms, r["times"], r["requests"], r["failed"], r["wrong"]]
        for key in ("known_s", "recovered_s", "paused_s", "stream_pause_s", "pause_s"):
            cells.append(f"{r[key]['p50']:.2f} / {r[key]['p99']:.2f}" if key in r else "-")
        cells.append(f"{r['replayed_tokens']['p50']:.0f}" if "replayed_tokens" in r else "-")
        cells.append("{before}, {after}".format(**r["tokens_a_second"]))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> int:
    """Measures and writes `results/recovery.*`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--what", default=",".join(KINDS), help="kinds; rank=200: one of them so many times")
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--standbys", type=int, default=1)
    parser.add_argument("--logs", type=Path, help="a folder for the mesh's own words")
    parser.add_argument("--burners", type=int, default=0, help="processes that compute beside it")
    parser.add_argument("--name", default="recovery", help="of the files under results")
    given = parser.parse_args()
    # SIGTERM must end the mesh, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    kinds = {kind: int(times or given.times) for kind, _, times in (w.partition("=") for w in given.what.split(","))}
    if unknown := kinds.keys() - set(KINDS):
        parser.error(f"{', '.join(unknown)}: not of {', '.join(KINDS)}")
    told: dict[str, Any] = {}

    def write(results: dict[str, Any]) -> None:
        told.update(results)
        write_files(given, results)

    with burning(given.burners):
        asyncio.run(run(given, kinds, write))
    return 0 if not any(r["failed"] or r["wrong"] for r in told.values()) else 1


def write_files(given: argparse.Namespace, results: dict[str, Any]) -> None:
    """Writes JSON and Markdown. Keeps rows of the file that were measured on this machine."""
    command = (
        f"python -m benchmarks.recovery MODEL --what {given.what} --times {given.times} --streams {given.streams} "
        f"--tokens {given.tokens} --standbys {given.standbys} --burners {given.burners} --name {given.name}"
    )
    suffix = "" if given.standbys else " without a standby"
    machine, path = facts.machine(), RESULTS / f"{given.name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    rows: dict[str, Any] = before["results"] if before.get("machine") == machine else {}
    versions = facts.own_versions()
    made = {"command": command, "date": facts.today(), "commit": versions.pop("commit", "")}
    rows |= {kind + suffix: {**made, **row} for kind, row in results.items()}
    about = {"machine": machine, "versions": versions, "seed": SEED}
    path.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")
    commands = sorted({row["command"] for row in rows.values()})
    idle = all(kind.startswith("nothing") for kind in rows)
    text = [
        "# What clients see while nothing is done" if idle else "# What clients see of a loss", "",
        f"Two stages; streams of {given.tokens} tokens, greedy and seeded, each compared token by token with a run in "
        f"which nothing happened. {machine['cores']} cores, {machine['cpu']}, which the streams' client shares.",
        "", "Written by", "", *(f"- `{c}`" for c in commands), "",
        *table(rows), "",
        "`known`: from the kill to the gateway's `lost`. `next token after`: from there to the first token that "
        "crossed all stages. `no step planned`: while layers change hands. `pause of a stream`: the longest time "
        "between two of its messages; in the row `nothing`, within a second in which nothing is done.", "",
    ]  # fmt: skip
    (RESULTS / f"{given.name}.md").write_text("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())
