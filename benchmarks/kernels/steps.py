"""Seconds of a decode step through the compiled kernels on one core, of each kind of model beside a dense Llama.

    python -m benchmarks.kernels.steps [--rows 1 4 8 16] [--rounds 5] [--only NAMES]

All models have about 100 million weights that a token uses, dummy ones. A step's floor is that of Llama's of as many
rows, plus the bytes of the further experts that it touches at the rate at which the core streams weights. The models
take turns within a round, so that what else the machine does hits all alike. Times are of the thread, not of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.kinds import COMMON, HIDDEN, KINDS, LAYERS, write_config
from benchmarks.common.results import RESULTS, machine_line, origin, save
from stagemesh.stage_worker.kv.pool import KvPool
from stagemesh.stage_worker.model.batch import StepBatch
from stagemesh.stage_worker.model.choose import kernel_model
from stagemesh.stage_worker.model.spec import ShardSpec
from stagemesh.stage_worker.native.shard import NativeShard

PAGE_SIZE, CONTEXT, STEPS = 16, 128, 4


class Model:
    """One kind in memory, whole."""

    def __init__(self, name: str, most_rows: int) -> None:
        self.kind = KINDS[name]
        with tempfile.TemporaryDirectory() as folder:
            write_config(name, Path(folder))
            spec = ShardSpec(folder, 0, LAYERS, "bfloat16", load_format="dummy", page_size=PAGE_SIZE)
            self.shard = NativeShard(spec, kernel_model(spec), None)
        self._pages = -(-(CONTEXT + STEPS + 1) // PAGE_SIZE)
        self.shard.bind_kv(KvPool(self.shard.kv_layers, most_rows * self._pages, PAGE_SIZE, self.shard.dtype, "cpu"))

    def seconds(self, rows: int) -> float:
        """Thread seconds of one decode step of `rows` rows, each of another token."""
        generator = torch.Generator().manual_seed(rows)
        tables = [list(range(at * self._pages, (at + 1) * self._pages)) for at in range(rows)]
        times = []
        for step in range(STEPS):
            ids = torch.randint(0, COMMON["vocab_size"], (rows,), generator=generator)
            batch = StepBatch(
                [CONTEXT + step] * rows, [1] * rows, tables, PAGE_SIZE, ids, logit_rows=torch.arange(rows)
            )
            started = time.thread_time()
            self.shard.forward(batch)
            times.append(time.thread_time() - started)
        return min(times)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in all layers."""
        width = self.kind.settings.get("moe_intermediate_size", 0)
        return 3 * width * HIDDEN * LAYERS * 2


def further(model: Model, rows: int) -> float:
    """Bytes of the experts that a step of this many rows uses beyond one row's, if each row chooses at random."""
    experts, used = model.kind.experts, model.kind.used
    if not experts:
        return 0.0
    return (experts * (1 - (1 - used / experts) ** rows) - used) * model.expert_bytes


def measure(models: dict[str, Model], rows: list[int], rounds: int) -> dict[str, dict[int, float]]:
    """Median seconds of a step, for each model and number of rows."""
    times: dict[str, dict[int, list[float]]] = {name: {m: [] for m in rows} for name in models}
    for _ in range(rounds):
        for m in rows:
            for name, model in models.items():
                times[name][m].append(model.seconds(m))
    return {name: {m: statistics.median(some) for m, some in of.items()} for name, of in times.items()}


def page(told: Any, found: dict[str, dict[int, float]], floors: dict[str, dict[int, float]], rate: float) -> list[str]:
    """The result as Markdown."""
    rows = list(found["llama"])
    lines = [
        "# Decode steps of kinds of models",
        "",
        f"Written by `{told['command']}` on {told['date']}: milliseconds of a decode step of 12 layers and the head on "
        f"one core after {CONTEXT} tokens; in brackets the ratio to Llama's step, and the ratio to the floor, which "
        "is Llama's step plus the bytes of the further experts that rows use if they choose at random. Medians.",
        "",
        f"- The core streams {rate / 1e9:.1f} GB/s of Llama's weights.",
        machine_line(told["machine"]),
        "",
        f"| model | {' | '.join(f'{m} rows' for m in rows)} |",
        f"| --- |{' ---: |' * len(rows)}",
    ]
    for name, times in found.items():
        cells = [
            f"{times[m] * 1e3:.2f} ({times[m] / found['llama'][m]:.2f}, {times[m] / floors[name][m]:.2f})" for m in rows
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Measures, and writes `results/steps.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(KINDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = ["llama", *(name for name in args.only if name != "llama")]
    models = {name: Model(name, max(args.rows)) for name in wanted}
    found = measure(models, args.rows, args.rounds)
    dense = models["llama"].shard
    # But for the embedding, of which rows are read.
    rate = (dense.weight_bytes - COMMON["vocab_size"] * HIDDEN * 2) / min(found["llama"].values())
    floors = {name: {m: found["llama"][m] + further(models[name], m) / rate for m in args.rows} for name in found}
    told = origin(f"kernels.steps --rounds {args.rounds}")
    save(RESULTS / "steps", {**told, "seconds": found, "floors": floors}, page(told, found, floors, rate))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
