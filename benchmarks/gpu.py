"""Measures decode and prefill of a stage on one GPU, and compares them with the device's bounds and transformers.

    python -m benchmarks.gpu          # 1 B and 8 B, one stage and two, decode of 1 and 64 rows, 8 K of prompt
    python -m benchmarks.gpu --shapes tiny --device cpu --context 64 --steps 4 --prompt 128     # does it run at all

Weights are random (`--load-format dummy`). Every case runs in a separate process, so that it inherits no memory or
fused functions. Two stages are called in turn in one process, which shows the cost of the split without links. A bound
is the larger of two times: for the bytes that a step must read, at the measured bandwidth of a copy, and for its
operations, at the measured rate of a matrix product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessor

from benchmarks.common.facts import machine, own_versions, today
from benchmarks.common.results import RESULTS
from stagemesh.stage_worker.kv.pool import KvPool
from stagemesh.stage_worker.model.batch import StepBatch
from stagemesh.stage_worker.model.choose import Shard, load_shard
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.spec import ShardSpec

PAGE_SIZE = 16
ROWS = (1, 64)
CASE_TIMEOUT_S = 560
SYSTEMS = ("one stage", "two stages", "one stage eager", "transformers")
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
}
"""Shapes of Llama 3.2 1B and Llama 3.1 8B, and a tiny shape to try this script."""


@dataclass(frozen=True)
class Case:
    """One case, which one process measures."""

    shape: str
    system: str
    device: str
    context: int
    """Number of positions before the first decoded token."""
    steps: int
    prompt: int
    """Number of tokens of the prefill."""
    seed: int


def config_of(shape: str, positions: int) -> LlamaConfig:
    """Returns the shape's configuration, for sequences of up to `positions`."""
    return LlamaConfig(**SHAPES[shape], max_position_embeddings=positions, dtype="bfloat16", rms_norm_eps=1e-5)


# -- bounds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """The measured rates of the device."""

    bytes_s: float
    """Bytes per second that a copy reads and writes."""
    flop_s: float
    """FLOP per second of a bf16 matrix product."""


def measure_rates(device: str) -> Rates:
    """Measures the best of several copies and matrix products, large enough to fill the device."""
    big = device != "cpu"
    source = torch.empty((2 << 30) if big else (64 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = min(timed(lambda: target.copy_(source), device) for _ in range(10))
    size = 8192 if big else 512
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    product_s = min(timed(lambda: left @ right, device) for _ in range(10))
    return Rates(2 * source.numel() / copy_s, 2 * size**3 / product_s)


def timed(work: Callable[[], object], device: str) -> float:
    """Returns the seconds until the device has done `work`."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def wait(device: str) -> None:
    """Waits until the device has finished."""
    if device != "cpu":
        torch.cuda.synchronize()


def bound_s(shape: str, rates: Rates, rows: int, tokens: int, context: int) -> float:
    """Returns the least seconds of a step with `rows` sequences of `tokens` new positions each, after `context`."""
    s = SHAPES[shape]
    hidden, heads, head_dim, layers = s["hidden_size"], s["num_attention_heads"], s["head_dim"], s["num_hidden_layers"]
    kv_dim = s["num_key_value_heads"] * head_dim
    layer = hidden * (2 * heads * head_dim + 2 * kv_dim + 3 * s["intermediate_size"])
    head = hidden * s["vocab_size"]
    # Each new position sees the context and, on average, half of the new ones.
    seen = context + (tokens + 1) / 2
    flop = 2 * rows * (tokens * layers * (layer + 2 * heads * head_dim * seen) + head)
    read = 2 * (layers * layer + head) + 2 * rows * layers * 2 * kv_dim * (context + tokens)
    return max(read / rates.bytes_s, flop / rates.flop_s)


# -- systems --------------------------------------------------------------------------------------------------------


def run_case(case: Case) -> dict[str, float]:
    """Returns milliseconds of "decode 1", "decode 64" and "prefill", or the rates."""
    torch.manual_seed(case.seed)
    if case.system == "rates":
        return asdict(measure_rates(case.device))
    return run_transformers(case) if case.system == "transformers" else run_stages(case)


def run_stages(case: Case) -> dict[str, float]:
    """Measures stagemesh's shards."""
    positions = max(case.context + 2 * case.steps + 1, case.prompt)
    pages = max(ROWS[-1] * -(-(case.context + 2 * case.steps) // PAGE_SIZE), -(-case.prompt // PAGE_SIZE))
    layers = SHAPES[case.shape]["num_hidden_layers"]
    bounds = [0, layers // 2, layers] if case.system == "two stages" else [0, layers]
    shards: list[Shard] = []
    with tempfile.TemporaryDirectory() as folder:
        config_of(case.shape, positions).save_pretrained(folder)
        for first, last in pairwise(bounds):
            spec = ShardSpec(
                folder,
                first,
                last,
                "bfloat16",
                case.device,
                load_format="dummy",
                seed=case.seed,
                page_size=PAGE_SIZE,
                # On a CPU, the compiled kernels would replace the code that this measures.
                enforce_eager=case.device == "cpu" or case.system.endswith("eager"),
            )
            shards.append(load_shard(spec, TensorParallel()))
            print(f"{case.shape}: layers {first}-{last - 1} are loaded", file=sys.stderr)
    for shard in shards:
        shard.bind_kv(KvPool(shard.kv_layers, pages, PAGE_SIZE, shard.dtype, shard.device))
    found = {f"decode {rows}": 1e3 * decode_s(shards, case, rows) for rows in ROWS}
    tokens = torch.randint(SHAPES[case.shape]["vocab_size"], (case.prompt,), device=case.device)
    table = list(range(-(-case.prompt // PAGE_SIZE)))
    last_row = torch.tensor([case.prompt - 1], device=case.device)

    def prefill() -> object:
        return run_step(shards, [0], [case.prompt], [table], tokens, last_row)

    prefill()
    found["prefill"] = 1e3 * statistics.median(timed(prefill, case.device) for _ in range(3))
    return found


def decode_s(shards: list[Shard], case: Case, rows: int) -> float:
    """Returns seconds per step. Each step uses the tokens of the previous one, without waiting in between."""
    each = -(-(case.context + 2 * case.steps) // PAGE_SIZE)
    tables = [list(range(row * each, (row + 1) * each)) for row in range(rows)]
    wanted = torch.arange(rows, device=case.device)
    tokens = torch.ones(rows, dtype=torch.int64, device=case.device)

    def steps(start: int) -> None:
        nonlocal tokens
        for at in range(start, start + case.steps):
            tokens = run_step(shards, [at] * rows, [1] * rows, tables, tokens, wanted).argmax(-1)

    steps(case.context)  # This compiles and captures.
    return timed(lambda: steps(case.context + case.steps), case.device) / case.steps


def run_step(
    shards: list[Shard],
    starts: list[int],
    counts: list[int],
    tables: list[list[int]],
    tokens: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Returns logits [R, V] of one step through all stages."""
    out: torch.Tensor | None = None
    for shard in shards:
        batch = StepBatch(starts, counts, tables, PAGE_SIZE, token_ids=tokens, hidden=out, logit_rows=wanted)
        shard.prepare(batch)
        out = shard.forward(batch)
    assert out is not None
    return out


class Clock(LogitsProcessor):  # type: ignore[misc]
    """Records the time of each step's logits."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns the scores unchanged."""
        wait(self._device)
        self.seconds.append(time.perf_counter())
        return scores


def run_transformers(case: Case) -> dict[str, float]:
    """Measures `generate` with a static cache. On a GPU, transformers compiles its decode step."""
    config = config_of(case.shape, max(case.context + case.steps, case.prompt) + 8)
    with torch.device(case.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def generate(rows: int, prompt: int, steps: int) -> list[float]:
        ids = torch.randint(config.vocab_size, (rows, prompt), device=case.device)
        clock = Clock(case.device)
        wait(case.device)
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            cache_implementation="static",
            logits_processor=[clock],
            pad_token_id=0,
        )
        times = [began, *clock.seconds]
        return [after - before for before, after in pairwise(times)]

    found = {}
    for rows in ROWS:
        generate(rows, case.context, case.steps)
        found[f"decode {rows}"] = 1e3 * statistics.median(generate(rows, case.context, case.steps)[2:])
    generate(1, case.prompt, 1)
    found["prefill"] = 1e3 * statistics.median(generate(1, case.prompt, 1)[0] for _ in range(3))
    return found


# -- the whole ------------------------------------------------------------------------------------------------------


def run_apart(case: Case) -> dict[str, float] | str:
    """Runs a case in a separate process. Returns its figures, or the end of its error."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(asdict(case))]
    try:
        ran = subprocess.run(command, stdout=subprocess.PIPE, timeout=CASE_TIMEOUT_S, text=True, check=True)
    except subprocess.SubprocessError as e:
        return f"{type(e).__name__}: {e}"[-300:]
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def table_of(result: dict[str, Any]) -> str:
    """Returns the result as Markdown."""
    lines = [
        f"{result['device_name']}, {result['date']}; copy {result['rates']['bytes_s'] / 1e9:.0f} GB/s, "
        f"bf16 product {result['rates']['flop_s'] / 1e12:.1f} TFLOP/s. Decode after {result['context']} positions; "
        f"prefill of {result['prompt']} tokens. Milliseconds a step, and the bound's share of them.",
        "",
        "| shape | step | bound | " + " | ".join(SYSTEMS) + " |",
        "| --- | --- | --- |" + " --- |" * len(SYSTEMS),
    ]
    for shape, systems in result["systems"].items():
        for step, least in result["bounds_ms"][shape].items():
            cells = []
            for system in SYSTEMS:
                found = systems.get(system)
                if found is None:
                    cells.append("")
                elif isinstance(found, str):
                    cells.append("failed")
                else:
                    cells.append(f"{found[step]:.2f} ({100 * least / found[step]:.0f} %)")
            lines.append(f"| {shape} | {step} | {least:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measures, prints the table, writes it and the JSON. Returns 1 if a case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--shapes", default="1b,8b", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="some of these")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder for gpu.json and gpu.md; default: results/")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(Case(**json.loads(args.case)))))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --device cpu --shapes tiny shows that the script runs")
    shapes = args.shapes.split(",")
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        parser.error(f"no shape {unknown[0]!r}: use some of {', '.join(SHAPES)}")
    wanted = args.systems.split(",")
    if unknown := [name for name in wanted if name not in SYSTEMS]:
        parser.error(f"no system {unknown[0]!r}: use some of {', '.join(SYSTEMS)}")
    print(f"seed {args.seed}")

    def case_of(shape: str, system: str) -> Case:
        return Case(shape, system, args.device, args.context, args.steps, args.prompt, args.seed)

    rates = run_apart(case_of(shapes[0], "rates"))
    if isinstance(rates, str):
        print(f"the device's own rates could not be measured: {rates}", file=sys.stderr)
        return 1
    known = Rates(**rates)
    middle = args.context + args.steps + args.steps // 2
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "date": today(),
        "device_name": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "machine": machine(),
        "versions": own_versions(),
        "context": args.context,
        "prompt": args.prompt,
        "steps": args.steps,
        "rates": rates,
        "bounds_ms": {
            shape: {f"decode {rows}": 1e3 * bound_s(shape, known, rows, 1, middle) for rows in ROWS}
            | {"prefill": 1e3 * bound_s(shape, known, 1, args.prompt, 0)}
            for shape in shapes
        },
        "systems": {},
    }
    out = args.out or RESULTS
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    for shape in shapes:
        result["systems"][shape] = {}
        for system in wanted:
            found = run_apart(case_of(shape, system))
            failed |= isinstance(found, str)
            print(f"{shape}, {system}: {found}", flush=True)
            result["systems"][shape][system] = found
            # Results are written after each case, so that a later failure does not lose them.
            (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            (out / "gpu.md").write_text(table_of(result), encoding="utf-8")
    print(table_of(result))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
