"""Tokens per second of each kind of model through a mesh of two stages, beside a dense Llama.

    python -m benchmarks.models [--only NAMES] [--streams 1 8 16] [--rounds 3]
    python -m benchmarks.models --weights [--rounds 3]

Each model has about 100 million weights that a token uses, dummy ones. 128 tokens in, 64 out. A server of its own is
started for each model in each round, in turn, and ratios are within a round. `--weights`: one stream of a Llama of 1 B
in bf16 and in fewer bits instead.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.facts import default_model
from benchmarks.common.http_load import tokens_a_second
from benchmarks.common.kinds import KINDS, write_config
from benchmarks.common.results import RESULTS, machine_line, origin, save
from benchmarks.common.servers import Layout, running, stagemesh_spec

PROMPT, OUTPUT = 128, 64
ONE_B: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
}
BITS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "int8": ("--quantization=int8",),
    "fp8": ("--quantization=fp8",),
    "int4": ("--quantization=int4",),
}


def write_model(dense: Path, folder: Path, name: str, **changes: Any) -> Path:
    """Makes a folder with a config of `KINDS`, and the tokenizer of the dense model."""
    folder.mkdir()
    write_config(name, folder, **changes)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / file).write_bytes((dense / file).read_bytes())
    return folder


def measure(model: Path, streams: Sequence[int], logs: Path, options: Sequence[str]) -> list[float]:
    """Tokens per second of a new server, by number of streams."""
    with running(stagemesh_spec(Layout(2, 1), "--load-format=dummy", *options), model, logs) as server:
        asyncio.run(tokens_a_second(server.base_url, streams[-1], streams[-1], PROMPT, 8))
        return [asyncio.run(tokens_a_second(server.base_url, n, max(4, 2 * n), PROMPT, OUTPUT)) for n in streams]


def rounds(models: Mapping[str, tuple[Path, Sequence[str]]], streams: Sequence[int], count: int, logs: Path) -> Any:
    """Measures all models in turn, `count` times. Returns name -> for each round, rates by streams."""
    found: dict[str, list[list[float]]] = {name: [] for name in models}
    for _ in range(count):
        for name, (model, options) in models.items():
            found[name].append(measure(model, streams, logs, options))
            print(name, [round(rate, 1) for rate in found[name][-1]], flush=True)
    return found


def page(told: Any, found: dict[str, list[list[float]]], streams: Sequence[int]) -> list[str]:
    """The result as Markdown. The first model is what the others are compared with."""
    base = next(iter(found))
    lines = [
        f"# Kinds of models beside {base}",
        "",
        f"Written by `{told['command']}` on {told['date']}: output tokens per second over two stages of a core each, "
        f"{PROMPT} tokens in and {OUTPUT} out, and in brackets the ratio to {base} in the same round. Medians.",
        "",
        machine_line(told["machine"]),
        "",
        f"| model | {' | '.join(f'{n} at once' for n in streams)} |",
        f"| --- |{' ---: |' * len(streams)}",
    ]
    for name, runs in found.items():
        cells = []
        for at in range(len(streams)):
            ratio = statistics.median(run[at] / other[at] for run, other in zip(runs, found[base], strict=True))
            cells.append(f"{statistics.median(run[at] for run in runs):.0f} ({ratio:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Measures, and writes `results/models.json` and `.md`, or `results/weights.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(KINDS))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stagemesh-models-") as scratch:
        folder = Path(scratch)
        dense = default_model(folder)
        models: dict[str, tuple[Path, Sequence[str]]] = {}
        if args.weights:
            streams = [1]
            one_b = write_model(dense, folder / "one_b", "llama", **ONE_B)
            models = {name: (one_b, options) for name, options in BITS.items()}
        else:
            streams = args.streams
            for at, name in enumerate(["llama", *(name for name in args.only if name != "llama")]):
                models[name] = write_model(dense, folder / f"model{at}", name), ()
        found = rounds(models, streams, args.rounds, folder)
    name = "weights" if args.weights else "models"
    told = origin(f"models{' --weights' if args.weights else ''} --rounds {args.rounds}")
    save(RESULTS / name, {**told, "streams": streams, "measured": found}, page(told, found, streams))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
