"""Measures the memory (PSS) of ranks while they load a checkpoint of 1 GB and after it, and how long a load takes.

    python -m benchmarks.memory [--other OTHER] [--model MODEL] [--rounds 5]

`stagemesh serve -pp 2` runs through compiled kernels, and through transformers' modules (--enforce-eager). Each rank is
looked at from its start until some seconds after the first token. The seconds of a load are of a process that does
nothing else, with the file in the page cache. OTHER is the root of another checkout with its own environment (`make
install` there), to compare with, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.common.facts import ROOT, default_model, machine, model_facts
from benchmarks.common.probe import processes, pss_mib
from benchmarks.common.results import RESULTS, machine_line, origin, save
from benchmarks.common.servers import Layout, running, stagemesh_spec

EVERY_S, AFTER_S = 0.02, 3.0
LOAD_DEADLINE_S = 300.0
GOAL_MIB = 350
PATHS = {"compiled kernels": (), "--enforce-eager": ("--enforce-eager",)}

# Prints the bytes of the weights, and the seconds of the load.
LOAD = """
import json, sys, time
import torch
from stagemesh.stage_worker.model.choose import import_for, load_shard
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.spec import ShardSpec

torch.set_num_threads(1)
spec = ShardSpec(**json.loads(sys.argv[1]))
import_for(spec)
began = time.perf_counter()
shard = load_shard(spec, TensorParallel())
print(json.dumps([shard.weight_bytes, time.perf_counter() - began]))
"""


@dataclass
class Ranks:
    """Samples of the PSS of each rank, by role: (time, MiB)."""

    samples: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Samples the ranks among this process's descendants while the block runs."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(EVERY_S):
                for role, process in processes(os.getpid()):
                    if role.startswith("rank"):
                        self.samples[role].append((time.monotonic(), pss_mib(process)))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def figures(self, ready: float) -> dict[str, dict[str, float]]:
        """Returns the most until the time `ready`, and the median after it, for each rank."""
        return {
            role: {
                "loading": max(mib for at, mib in samples if at <= ready),
                "after": statistics.median(mib for at, mib in samples if at > ready),
            }
            for role, samples in sorted(self.samples.items())
        }


def memory(python: str, model: Path, options: Sequence[str]) -> dict[str, dict[str, float]]:
    """Serves the model in two stages. Returns the figures of each rank, in MiB."""
    spec = stagemesh_spec(Layout(2, 1), *options)
    spec, ranks = replace(spec, command=[python, *spec.command[1:]]), Ranks()
    logs = tempfile.TemporaryDirectory(prefix="stagemesh-memory-")
    with logs as folder, ranks.watched(), running(spec, model, Path(folder)):
        ready = time.monotonic()
        time.sleep(AFTER_S)
    return ranks.figures(ready)


def load(python: str, model: Path, first: int, last: int, eager: bool) -> tuple[float, float]:
    """Loads layers [first, last). Returns MiB of weights, and seconds."""
    spec = {"model_dir": str(model), "first": first, "last": last, "enforce_eager": eager}
    command = [python, "-c", LOAD, json.dumps(spec)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=LOAD_DEADLINE_S)
    weight_bytes, seconds = json.loads(done.stdout)
    return weight_bytes / 2**20, seconds


def measured(roots: Mapping[str, Path], model: Path, rounds: int) -> list[dict[str, Any]]:
    """Measures each path of each checkout. Returns a row for each path and rank."""
    layers = model_facts(model)["layers"]
    half = layers // 2
    ranges = {"rank 0 of stage 0": (0, half), "rank 0 of stage 1": (half, layers)}
    split = f"--layer-partition={half},{layers - half}"
    pythons = {who: str(root / ".venv" / "bin" / "python") for who, root in roots.items()}
    rows = []
    for path, options in PATHS.items():
        shares = dict[str, float]()
        found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for _ in range(rounds):
            for who, python in pythons.items():
                for role, figures in memory(python, model, [*options, split]).items():
                    for name, mib in figures.items():
                        found[role, who][name].append(round(mib))
                for role, (first, last) in ranges.items():
                    shares[role], seconds = load(python, model, first, last, eager=bool(options))
                    found[role, who]["load_s"].append(round(seconds, 3))
        for role, share in shares.items():
            rows.append({"path": path, "rank": role, "share": share, **{who: found[role, who] for who in roots}})
            print(rows[-1], flush=True)
    return rows


def table(rows: Sequence[Mapping[str, Any]], roots: Mapping[str, str]) -> list[str]:
    """Returns the rows as a Markdown table."""
    lines = [
        "| path | rank | its share, MiB | checkout | most while loading, MiB | after, MiB | a load takes, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for who, commit in roots.items():
            share, most = row["share"], [max(row[who][name]) for name in ("loading", "after")]
            cells = [f"{mib} (share + {mib - share:.0f})" for mib in most]
            begin = f"| {row['path']} | {row['rank']} | {share:.0f} | {commit} "
            lines.append(f"{begin}| {' | '.join(cells)} | {statistics.median(row[who]['load_s']):.2f} |")
    return lines


def main() -> int:
    """Measures, and writes `results/memory.*`. Returns 1 if a rank of this checkout is above the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="another checkout's root")
    parser.add_argument("--model", type=Path, help="a Llama checkpoint; default: a new one of 1 GB")
    parser.add_argument("--rounds", type=int, default=5, help="starts and loads of each kind")
    given = parser.parse_args()
    os.environ["PYTHONSAFEPATH"] = "1"  # Otherwise the other one's Python would import the code in the current folder.
    roots, names = {"ours": ROOT}, {"ours": "this one"}
    if given.other is not None:
        command = ["git", "-C", str(given.other), "rev-parse", "--short", "HEAD"]
        names["theirs"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        roots["theirs"] = given.other
    with tempfile.TemporaryDirectory(prefix="stagemesh-memory-") as folder:
        model = given.model or default_model(Path(folder), "500m")
        size_gb = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9
        rows = measured(roots, model, given.rounds)
    told = origin(f"memory{' --other OTHER' if given.other else ''} --rounds {given.rounds}")
    lines = [
        "# Memory of ranks",
        "",
        f"- Written by `{told['command']}` on {told['date']}.",
        machine_line(machine()),
        "",
        f"PSS of each rank of `stagemesh serve -pp 2` on a checkpoint of {size_gb:.2f} GB in bf16, the most of "
        f"{given.rounds} starts; and the median seconds of as many loads. The goal is the share + {GOAL_MIB} MiB.",
        "",
        *table(rows, names),
    ]
    save(RESULTS / "memory", {**told, "rows": rows}, lines)
    most = max(max(row["ours"]["loading"] + row["ours"]["after"]) - row["share"] for row in rows)
    return int(most > GOAL_MIB)


if __name__ == "__main__":
    sys.exit(main())
