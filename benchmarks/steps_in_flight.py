"""Measures how many decode steps in flight are fastest, by --steps-in-flight, model and streams.

    python -m benchmarks.steps_in_flight [--models llama,mixtral,gpt_oss] [--steps 1] [--other CHECKOUT]

Tokens per second depend on what else runs on the machine. The processor time of ranks depends on it less.

Two stages of a core each, 32 tokens in and 64 out. The models have 100 M active weights, in a dense MLP, in 2 of 8
experts or in 4 of 32; the weights are random ("dummy"). A server of its own is started for each setting, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common.facts import default_model
from benchmarks.common.http_load import tokens_a_second
from benchmarks.common.probe import cpu_seconds, processes
from benchmarks.common.results import RESULTS, machine_line, origin, save
from benchmarks.common.servers import Layout, RunningServer, running, stagemesh_spec

PROMPT, OUTPUT = 32, 64
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "intermediate_size": 1024,
        "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
    },
    "gpt_oss": {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "intermediate_size": 512, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "rope_scaling": None, "sliding_window": 128,
    },
}  # fmt: skip
"""What differs from the dense model."""


def write_model(dense: Path, name: str) -> Path:
    """Makes a folder with the configuration of a model, and the tokenizer of the dense one."""
    folder = dense.parent / name
    folder.mkdir()
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **MODELS[name]}), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / file).write_bytes((dense / file).read_bytes())
    return folder


@dataclass(frozen=True)
class Setting:
    """A server to measure."""

    label: str
    python: str
    options: tuple[str, ...]

    def measure(self, model: Path, streams: list[int], logs: Path) -> list[tuple[float, float]]:
        """Measures a new server. Returns tokens per second and CPU seconds of ranks per 1,000 tokens, by streams."""
        spec = stagemesh_spec(Layout(2, 1), "--load-format=dummy", *self.options)
        spec = replace(spec, command=[self.python, *spec.command[1:]], environment={"PYTHONSAFEPATH": "1"})
        with running(spec, model, logs) as server:
            # The gateway learns what steps cost, alone and beside others.
            asyncio.run(tokens_a_second(server.base_url, 1, 1, PROMPT, OUTPUT))
            asyncio.run(tokens_a_second(server.base_url, streams[0], 2 * streams[0], PROMPT, OUTPUT))
            found = []
            for n in streams:
                before = rank_seconds(server)
                rate = asyncio.run(tokens_a_second(server.base_url, n, 3 * n, PROMPT, OUTPUT))
                found.append((rate, (rank_seconds(server) - before) * 1000 / (3 * n * OUTPUT)))
            return found


def rank_seconds(server: RunningServer) -> float:
    """Returns the CPU seconds of all ranks so far."""
    spent = cpu_seconds(processes(server.process.pid))
    return sum(seconds for role, seconds in spent.items() if role.startswith("rank"))


def main() -> int:
    """Measures, and writes `results/steps-in-flight.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", default="1")
    parser.add_argument("--streams", default="8,16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--other", type=Path, help="another checkout with its .venv, measured with its own default")
    parser.add_argument("--out", type=Path, default=RESULTS / "steps-in-flight")
    given = parser.parse_args()
    streams = [int(part) for part in given.streams.split(",")]
    settings = [Setting("default", sys.executable, ())]
    settings += [Setting(steps, sys.executable, (f"--steps-in-flight={steps}",)) for steps in given.steps.split(",")]
    if given.other:
        settings.append(Setting("other checkout", str(given.other / ".venv/bin/python"), ()))
    found: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}
    with tempfile.TemporaryDirectory(prefix="stagemesh-steps-") as folder:
        dense = default_model(Path(folder))
        for name in given.models.split(","):
            model, of_model = write_model(dense, name), found.setdefault(name, {s.label: [] for s in settings})
            for _ in range(given.repeats):
                for setting in settings:
                    of_model[setting.label].append(setting.measure(model, streams, Path(folder)))
                    print(name, setting.label, of_model[setting.label][-1], flush=True)
    told = origin(f"steps_in_flight --models {given.models} --steps {given.steps} --repeats {given.repeats}")
    save(given.out, {**told, "streams": streams, "measured": found}, _page(told, found, streams))
    return 0


def _page(told: Any, found: dict[str, dict[str, list[list[tuple[float, float]]]]], streams: list[int]) -> list[str]:
    head = [f"{n} streams" for n in streams]
    lines = [
        "# Decode steps in flight",
        "",
        f"Written by `{told['command']}` on {told['date']}: output tokens per second over two stages of a core each, "
        f"and in brackets CPU seconds of the ranks per 1,000 tokens. {PROMPT} tokens in, {OUTPUT} out; medians, each "
        "setting in turn.",
        "",
        machine_line(told["machine"]),
        "",
        f"| model | steps in flight | {' | '.join(head)} |",
        f"| --- | --- | {' | '.join('---' for _ in head)} |",
    ]
    for name, of_model in found.items():
        for label, runs in of_model.items():
            cells = []
            for each in zip(*runs, strict=True):
                rate, cpu_s = (statistics.median(values) for values in zip(*each, strict=True))
                cells.append(f"{rate:.0f} ({cpu_s:.2f})")
            lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
