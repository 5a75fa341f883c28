"""Compares this checkout with another one of the project, in turn on one machine: A B A B.

    python -m benchmarks.beside OTHER [--rounds 5] [--model MODEL]

OTHER is the root of a checkout with its own environment (`make install` there). Each round measures both, in changing
order. It measures the time until the first token, tokens per second with 16 concurrent requests and with one, and the
longest pause of a stream when a rank is killed, a worker is drained, and layers move. The ratio is of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common.facts import ROOT, default_model, machine
from benchmarks.common.http_load import tokens_a_second
from benchmarks.common.results import RESULTS, machine_line, origin, save
from benchmarks.common.servers import Layout, running, stagemesh_spec
from benchmarks.recovery.__main__ import measure
from benchmarks.recovery.mesh import serving
from benchmarks.recovery.streams import SEED, make_streams
from stagemesh import Client

PROMPT, OUTPUT = 128, 64
LOADS = {"16 at once": (16, 64), "1 at once": (1, 8)}
"""(concurrent requests, total requests)."""
PAUSES = {"rank": "a rank is killed", "drain": "a worker is drained", "repartition": "layers move"}
TIMES, STREAMS, TOKENS = 6, 8, 256
FIGURES = {"start": "s", **dict.fromkeys(LOADS, "tok/s"), **dict.fromkeys(PAUSES.values(), "ms")}
MORE_IS_BETTER = set(LOADS)


def throughput(python: str, model: Path, folder: Path) -> dict[str, float]:
    """Measures start (s) and rates (tokens/s) of a new server, after a warm-up."""
    spec = stagemesh_spec(Layout(2, 1))
    spec = replace(spec, command=[python, *spec.command[1:]])
    with running(spec, model, folder) as server:
        found = {"start": server.start_s}
        asyncio.run(tokens_a_second(server.base_url, 16, 16, PROMPT, OUTPUT))
        for name, (at_once, requests) in LOADS.items():
            found[name] = asyncio.run(tokens_a_second(server.base_url, at_once, requests, PROMPT, OUTPUT))
    return found


def pauses(python: str, model: Path, folder: Path, kind: str) -> float:
    """Measures the longest pause of any stream at each disturbance. Returns the median in milliseconds."""
    with serving(model, folder, 1, folder / f"{kind}.log", python=python) as mesh:
        seen = mesh.wait_whole()
        mesh.first_layers = seen["pipelines"][0]["stages"][0]["layers"]["last"]
        streams = make_streams(STREAMS, TOKENS)

        async def disturbed() -> float:
            async with Client(mesh.grpc_address) as client:
                await asyncio.gather(*(stream.run(client, None) for stream in streams))
            figures, _, _ = await measure(mesh, kind, TIMES, streams)
            return statistics.median(figure["pause_s"] for figure in figures)

        return 1000 * asyncio.run(disturbed())


def measured(root: Path, model: Path) -> dict[str, float]:
    """Measures all figures of one checkout."""
    python = str(root / ".venv" / "bin" / "python")
    with tempfile.TemporaryDirectory(prefix="stagemesh-beside-") as folder:
        found = throughput(python, model, Path(folder))
        for kind, name in PAUSES.items():
            found[name] = pauses(python, model, Path(folder), kind)
    return found


def table(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> list[str]:
    """Returns the figures as a Markdown table."""
    lines = ["| what | this checkout, each round | the other one | ratio of the medians |", "| --- | --- | --- | --- |"]
    for name, unit in FIGURES.items():
        digits = 2 if unit == "s" else 0
        cells = [", ".join(f"{value:.{digits}f}" for value in values[name]) for values in (ours, theirs)]
        ratio = statistics.median(ours[name]) / statistics.median(theirs[name])
        wanted = "more" if name in MORE_IS_BETTER else "less"
        lines.append(f"| {name}, {unit} | {cells[0]} | {cells[1]} | {ratio:.2f} ({wanted} is better) |")
    return lines


def main() -> int:
    """Measures, and writes `results/beside.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout's root")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a Llama checkpoint; default: the seeded 100 M model")
    given = parser.parse_args()
    os.environ["PYTHONSAFEPATH"] = "1"  # Otherwise the other one's Python would import the code in the current folder.
    roots = {"ours": ROOT, "theirs": given.other}
    commit = subprocess.run(
        ["git", "-C", str(given.other), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    found: dict[str, dict[str, list[float]]] = {who: defaultdict(list) for who in roots}
    random.seed(SEED)
    with tempfile.TemporaryDirectory(prefix="stagemesh-beside-") as folder:
        model = given.model or default_model(Path(folder))
        for number in range(given.rounds):
            for who in list(roots) if number % 2 else list(roots)[::-1]:
                for name, value in measured(roots[who], model).items():
                    found[who][name].append(round(value, 3))
                print(who, {name: values[-1] for name, values in found[who].items()}, flush=True)
    told = origin(f"beside OTHER --rounds {given.rounds}")
    load = f"Two stages of the 100 M model; {PROMPT} tokens in, {OUTPUT} out."
    about = f"Pauses: the longest of {STREAMS} streams, the median of {TIMES} in each round, with a standby."
    lines = [
        *(f"# Beside {commit}", "", f"- Written by `{told['command']}` on {told['date']}.", machine_line(machine())),
        *("", f"{load} {about}", "", *table(found["ours"], found["theirs"]), ""),
    ]
    save(RESULTS / "beside", {**told, "other": commit, "figures": found}, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
