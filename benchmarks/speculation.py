"""Measures the gain of a draft model: tokens per second with it and without it.

    python -m benchmarks.speculation [MODEL] [--streams 1,4,16] [--repeats 2]

Models with random weights do not predict each other. So the draft model consists of the model's own first layers,
embedding and head, and the other layers are scaled down in a copy of the model. The scale decides how often the two
agree. The acceptance is measured and reported, so that a figure can be compared with other models of the same
acceptance.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.common.facts import default_model
from benchmarks.common.http_load import tokens_a_second
from benchmarks.common.results import RESULTS, origin, save
from benchmarks.common.servers import Layout, running, stagemesh_spec

DRAFT_LAYERS = 1
SCALES = (0.02, 0.1, 0.3)
"""Scales of the layers that the draft model lacks. With a smaller scale the two models agree more often."""
OUTPUT, PROMPT = 192, 32
GUESSES = 4
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def make_pair(model: Path, out: Path, scale: float) -> tuple[Path, Path]:
    """Makes (target, draft): a copy whose later layers add `scale` times as much, and a model of the first layers."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(model / "model.safetensors")
    target, draft = {}, {}
    for name, tensor in tensors.items():
        found = LAYER.match(name)
        behind = found is not None and int(found[1]) >= DRAFT_LAYERS
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        target[name] = (tensor * scale).to(tensor.dtype) if behind and writes else tensor
        if not behind:
            draft[name] = tensor
    paths = out / f"target-{scale}", out / f"draft-{scale}"
    layers = config["num_hidden_layers"], DRAFT_LAYERS
    for path, weights, count in zip(paths, (target, draft), layers, strict=True):
        path.mkdir(parents=True)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}), encoding="utf-8")
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (path / name).write_bytes((model / name).read_bytes())
    return paths


def metric(url: str, name: str) -> float:
    """Reads a counter of the gateway."""
    with urllib.request.urlopen(url + "/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"stagemesh_{name}_total ")))


def rate_of(url: str, streams: int) -> float:
    """Measures output tokens per second of two successive requests per stream."""
    return asyncio.run(tokens_a_second(url, streams, 2 * streams, PROMPT, OUTPUT))


def measure(target: Path, config: dict[str, Any] | None, streams: list[int], logs: Path) -> dict[int, dict[str, float]]:
    """Measures, by number of streams, tokens per second, guesses per sampled token, and share of accepted guesses."""
    found = {}
    more = ["--speculative-config", json.dumps(config)] if config else []
    with running(stagemesh_spec(Layout(2, 1), *more), target, logs) as server:
        rate_of(server.base_url, 2)  # A warm-up, after which the gateway knows what steps cost.
        for count in streams:
            names = "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"
            before = [metric(server.base_url, name) for name in names]
            rate = rate_of(server.base_url, count)
            guessed, accepted = (metric(server.base_url, n) - b for n, b in zip(names, before, strict=True))
            tokens = 2 * count * OUTPUT
            found[count] = {
                "tokens_per_s": rate,
                "guessed": guessed / tokens,
                "accepted": accepted / guessed if guessed else 0.0,
            }
    return found


def main() -> int:
    """Measures, and writes `results/speculation.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="a Llama checkpoint; default: the seeded 100 M model")
    parser.add_argument("--streams", default="1,4,16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "speculation")
    arguments = parser.parse_args()
    streams = [int(count) for count in arguments.streams.split(",")]
    told = {**origin(f"speculation MODEL --repeats {arguments.repeats}"), "load_before": os.getloadavg()[0]}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.model or default_model(folder)
        for scale in SCALES:
            target, draft = make_pair(model, folder, scale)
            by_model = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": GUESSES}
            ratios: dict[int, list[tuple[float, dict[str, float]]]] = {count: [] for count in streams}
            for _ in range(arguments.repeats):
                plain, guessing = (measure(target, config, streams, folder) for config in (None, by_model))
                for count in streams:
                    ratios[count].append((plain[count]["tokens_per_s"], guessing[count]))
            for count in streams:
                rows.append(
                    {
                        "scale": scale,
                        "streams": count,
                        "plain": statistics.median(rate for rate, _ in ratios[count]),
                        "draft_model": statistics.median(g["tokens_per_s"] for _, g in ratios[count]),
                        "ratio": statistics.median(g["tokens_per_s"] / rate for rate, g in ratios[count]),
                        "guessed": statistics.median(g["guessed"] for _, g in ratios[count]),
                        "accepted": statistics.median(g["accepted"] for _, g in ratios[count]),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    _write(arguments.out, rows, told)
    return 0


def _write(stem: Path, rows: list[dict[str, Any]], told: dict[str, Any]) -> None:
    lines = [
        "# What a draft model brings",
        "",
        f"Written by `python -m benchmarks.speculation` on {told['date']}; {told['machine']['cores']} cores of "
        f"{told['machine']['cpu']}, load {told['load_before']:.1f} before. Two stages of a core each, bfloat16, "
        f"{OUTPUT} tokens an answer, greedy; the draft model is the model's first {DRAFT_LAYERS} layers with its "
        f"embedding and head, up to {GUESSES} guesses at a time.",
        "",
        "| later layers, scaled | streams | tokens/s without | with | ratio | guessed of drawn | accepted of these |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [f"{row[name]:.0f}" for name in ("plain", "draft_model")]
        cells += [f"{row[name]:.2f}" for name in ("ratio", "guessed", "accepted")]
        lines.append(f"| {row['scale']} | {row['streams']} | {' | '.join(cells)} |")
    save(stem, {**told, "rows": rows}, lines)


if __name__ == "__main__":
    sys.exit(main())
