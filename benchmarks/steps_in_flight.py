<<<<<<< HEAD
"""Measures how many decode steps in flight are fastest, by --steps-in-flight, model and streams.

    python -m benchmarks.steps_in_flight [--models llama,mixtral,gpt_oss] [--steps 1] [--other CHECKOUT]

Tokens per second depend on what else runs on the machine. The processor time of ranks depends on it less.

Two stages of a core each, 32 tokens in and 64 out. The models have 100 M active weights, in a dense MLP, in 2 of 8
experts or in 4 of 32; the weights are random ("dummy"). A server of its own is started for each setting, in turn.
=======
"""Seconds of a decode step through the compiled kernels on one core, of each kind of model beside a dense Llama.

<<<<<<<< HEAD:benchmarks/steps.py
    python -m benchmarks.steps [--rows 1 4 8 16] [--rounds 5] [--only NAMES]
========
    python -m benchmarks.steps_in_flight [--models llama,mixtral,gpt_oss] [--steps 1] [--streams 8,16] [--other CHECKOUT]
>>>>>>>> 8895cb8 (The benchmark of steps in flight has its own name):benchmarks/steps_in_flight.py

All models have about 100 million weights that a token uses, dummy ones. A step's floor is that of Llama's of as many
rows, plus the bytes of the further experts that it touches at the rate at which the core streams weights. The models
take turns within a round, so that what else the machine does hits all alike. Times are of the thread, not of the clock.
>>>>>>> 8895cb8 (The benchmark of steps in flight has its own name)
"""

from __future__ import annotations

import argparse
<<<<<<< HEAD
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
=======
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stagemesh.stage_worker.kv.pool import KvPool
from stagemesh.stage_worker.model.batch import StepBatch
from stagemesh.stage_worker.model.choose import kernel_model
from stagemesh.stage_worker.model.spec import ShardSpec
from stagemesh.stage_worker.native.shard import NativeShard

PAGE_SIZE, CONTEXT, STEPS = 16, 128, 4
LAYERS, HIDDEN, WIDTH = 12, 768, 2048
COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": WIDTH,
    "vocab_size": 16384,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Kind:
    """One model. `experts` of which a token uses `used`; 0 for a dense model."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    experts: int = 0
    used: int = 0


def _mixture(model_type: str, experts: int, used: int, **settings: Any) -> Kind:
    width = WIDTH // used
    sizes = {"intermediate_size": width, "moe_intermediate_size": width, "num_experts_per_tok": used}
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), experts)
    return Kind(model_type, {**sizes, **counts, **settings}, experts, used)


KINDS = {
    "llama": Kind("llama"),
    "gemma2": Kind("gemma2", {"query_pre_attn_scalar": 64}),
    "gpt_neox": Kind("gpt_neox", {"intermediate_size": 2560, "rotary_pct": 0.25, "num_key_value_heads": 12}),
    "phi3": Kind("phi3"),
    "olmo2": Kind("olmo2"),
    "granite": Kind("granite"),
    "mixtral 8x2": _mixture("mixtral", 8, 2),
    "qwen3_moe 8x2": _mixture("qwen3_moe", 8, 2, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]),
    "gpt_oss 32x4": _mixture("gpt_oss", 32, 4),
    "deepseek_v3 32x4": _mixture(
        "deepseek_v3",
        32,
        4,
        first_k_dense_replace=0,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        num_key_value_heads=12,
        moe_intermediate_size=416,
    ),
}


class Model:
    """One kind in memory, whole."""

    def __init__(self, kind: Kind, most_rows: int) -> None:
        self.kind = kind
        settings = {**COMMON, **kind.settings}
        if kind.model_type == "deepseek_v3":
            settings.pop("head_dim")
        with tempfile.TemporaryDirectory() as folder:
            CONFIG_MAPPING[kind.model_type](**settings, dtype="bfloat16").save_pretrained(folder)
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


def touched(kind: Kind, rows: int) -> float:
    """Experts that a step of this many rows uses, if each row chooses at random."""
    return kind.experts * (1 - (1 - kind.used / kind.experts) ** rows)


def measure(models: dict[str, Model], rows: list[int], rounds: int) -> dict[str, dict[int, float]]:
    """Median seconds of a step, for each model and number of rows."""
    times: dict[str, dict[int, list[float]]] = {name: {m: [] for m in rows} for name in models}
    for _ in range(rounds):
        for m in rows:
            for name, model in models.items():
                times[name][m].append(model.seconds(m))
    return {name: {m: statistics.median(some) for m, some in of.items()} for name, of in times.items()}


def main() -> int:
<<<<<<<< HEAD:benchmarks/steps.py
    """Prints a table in Markdown, and the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(KINDS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = ["llama", *(name for name in args.only if name != "llama")]
    models = {name: Model(KINDS[name], max(args.rows)) for name in wanted}
    found = measure(models, args.rows, args.rounds)
    dense = models["llama"].shard
    matrices = dense.weight_bytes - COMMON["vocab_size"] * HIDDEN * 2  # But for the embedding, of which rows are read.
    rate = matrices / min(found["llama"].values())
    print(f"One core streams {rate / 1e9:.1f} GB/s of Llama's weights.\n")
    print("| model | " + " | ".join(f"{m} rows, ms | of llama | of floor" for m in args.rows) + " |")
    print("| --- |" + " ---: | ---: | ---: |" * len(args.rows))
    for name, times in found.items():
        cells = []
        for m in args.rows:
            floor = found["llama"][m]
            if models[name].kind.experts:
                further = touched(models[name].kind, m) - models[name].kind.used
                floor += further * models[name].expert_bytes / rate
            cells.append(f"{times[m] * 1e3:.2f} | {times[m] / found['llama'][m]:.2f} | {times[m] / floor:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))
========
>>>>>>> 8895cb8 (The benchmark of steps in flight has its own name)
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
<<<<<<< HEAD
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
=======
>>>>>>>> 8895cb8 (The benchmark of steps in flight has its own name):benchmarks/steps_in_flight.py
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
>>>>>>> 8895cb8 (The benchmark of steps in flight has its own name)
