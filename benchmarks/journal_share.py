"""Measures what the journal of sent activations adds to a stage's steps, within one process.

    python -m benchmarks.journal_share [MODEL]

Half of the model's layers compute a step, then the journal stores its output. As in a rank, this is between two steps,
when the caches hold the step's weights. The throughput of whole meshes (`pairs --what journal`) varies by more than
this cost.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.facts import default_model, model_facts
from benchmarks.common.results import RESULTS, origin, save
from stagemesh.stage_worker.kv.journal import Journal
from stagemesh.stage_worker.kv.pool import KvPool
from stagemesh.stage_worker.model.batch import StepBatch
from stagemesh.stage_worker.model.choose import load_shard
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.spec import ShardSpec

PAGE_SIZE = 16
CONTEXT = 160
STEPS = {"decode of 8 rows": (8, 1), "decode of 16 rows": (16, 1), "48 tokens of a prompt": (1, 48),
         "512 tokens of a prompt": (1, 512)}  # fmt: skip
"""Name -> (rows, tokens per row)."""


def measure(model: Path, repeats: int) -> dict[str, Any]:
    """Measures milliseconds of a step, milliseconds of storing its output, and the latter's share of both."""
    torch.set_num_threads(1)
    layers = model_facts(model)["layers"]
    spec = ShardSpec(str(model), 0, layers // 2, "bfloat16", "cpu", page_size=PAGE_SIZE, threads=1)
    shard = load_shard(spec, TensorParallel())
    each = -(-(CONTEXT + repeats + 512) // PAGE_SIZE)
    rows = max(rows for rows, _ in STEPS.values())
    shard.bind_kv(KvPool(shard.kv_layers, rows * each, PAGE_SIZE, shard.dtype, shard.device))
    found = {}
    for name, (count, tokens) in STEPS.items():
        journal = Journal(rows * each, PAGE_SIZE, shard.hidden_size, shard.dtype)
        tables = [list(range(row * each, (row + 1) * each)) for row in range(count)]
        step_s, keep_s = [], []
        for at in range(repeats):
            # Decode continues from page to page. The chunk of a prompt is computed again each time.
            start = CONTEXT + at if tokens == 1 else 0
            ids = torch.randint(5, shard.vocab_size, (count * tokens,))
            batch = StepBatch([start] * count, [tokens] * count, tables, PAGE_SIZE, token_ids=ids)
            shard.prepare(batch)
            began = time.perf_counter()
            output = shard.forward(batch)
            computed = time.perf_counter()
            journal.write(batch, output)
            step_s.append(computed - began)
            keep_s.append(time.perf_counter() - computed)
        step_ms, keep_ms = 1e3 * statistics.median(step_s), 1e3 * statistics.median(keep_s)
        found[name] = {"step_ms": round(step_ms, 3), "journal_ms": round(keep_ms, 4),
                       "share": round(sum(keep_s) / (sum(keep_s) + sum(step_s)), 5)}  # fmt: skip
    return found


def main() -> int:
    """Measures and writes `results/journal-share.*`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="default: a new 100 M model")
    parser.add_argument("--repeats", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or default_model(Path(folder))
        result = {
            **origin(f"journal_share MODEL --repeats {given.repeats}"),
            "model": model_facts(model),
            "steps": measure(model, given.repeats),
        }
    lines = [
        "# What the journal adds to a step",
        "",
        f"`{result['command']}`, {result['date']}, one core of {result['machine']['cpu']}: half of the layers of the "
        f"100 M model, context {CONTEXT}; medians of {given.repeats} steps, and the share that keeping their outputs "
        "is of the time of both.",
        "",
        "| step | computed in, ms | kept in, ms | share |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {r['step_ms']:.2f} | {r['journal_ms']:.3f} | {100 * r['share']:.2f} % |"
            for name, r in result["steps"].items()
        ),
    ]
    save(RESULTS / "journal-share", result, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
