"""What a comparison leaves behind: medians and ratios over the repeats, as JSON for tools and Markdown for readers."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """One client run against one server: what `vllm bench serve` measured, times in milliseconds."""

    row: str
    system: str
    repeat: int
    start_s: float
    completed: int
    failed: int
    output_tok_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    input_tokens: int
    output_tokens: int
    duration_s: float
    load_before: float
    """The machine's one-minute load average before the server started: other work shows here."""


@dataclass(frozen=True)
class Metric:
    """A column of the table. `field` names a field of Run."""

    field: str
    title: str
    digits: int


METRICS = (
    Metric("output_tok_s", "output tok/s", 0),
    Metric("ttft_p50_ms", "TTFT p50, ms", 0),
    Metric("ttft_p99_ms", "TTFT p99, ms", 0),
    Metric("tpot_p50_ms", "TPOT p50, ms", 1),
    Metric("tpot_p99_ms", "TPOT p99, ms", 1),
    Metric("start_s", "start, s", 1),
)


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each row and system the medians over its repeats; for each row with both systems stagemesh / vLLM."""
    summary: list[dict[str, Any]] = []
    for row in dict.fromkeys(run.row for run in runs):
        medians: dict[str, dict[str, float]] = {}
        for system in dict.fromkeys(run.system for run in runs if run.row == row):
            own = [run for run in runs if run.row == row and run.system == system]
            medians[system] = {m.field: statistics.median(getattr(run, m.field) for run in own) for m in METRICS}
            summary.append(
                {
                    "row": row,
                    "system": system,
                    "repeats": len(own),
                    "failed": sum(run.failed for run in own),
                    "requests": sum(run.completed + run.failed for run in own),
                    "median": medians[system],
                    "output_tok_s_range": [min(r.output_tok_s for r in own), max(r.output_tok_s for r in own)],
                }
            )
        if medians.keys() >= {"stagemesh", "vllm"}:
            ours, theirs = medians["stagemesh"], medians["vllm"]
            ratio = {name: ours[name] / theirs[name] if theirs[name] else None for name in ours}
            summary.append({"row": row, "system": "stagemesh / vllm", "ratio": ratio})
    return summary


def write(stem: Path, runs: Sequence[Run], facts: Mapping[str, Any]) -> None:
    """Write `stem`.json and `stem`.md. `facts` holds machine, versions, model and commands."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    summary = summarize(runs)
    whole = {**facts, "summary": summary, "runs": [asdict(run) for run in runs]}
    stem.with_name(stem.name + ".json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    stem.with_name(stem.name + ".md").write_text(markdown(summary, facts), encoding="utf-8")


def markdown(summary: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The page for readers."""
    machine, model, load = facts["machine"], facts["model"], facts["workload"]
    lines = [
        "# stagemesh beside vLLM",
        "",
        f"Written by `benchmarks/vllm_table.py` on {facts['date']}. Medians over the repeats of one run, in which the "
        "systems took turns; between runs and machines only the ratios compare.",
        "",
        f"- Machine: {machine['cores']} cores, {machine['cpu']}, {machine['memory_gib']:.0f} GiB; "
        f"of its instructions: {', '.join(machine['cpu_flags']) or 'none of those looked for'}.",
        f"- Model: {model['parameters'] / 1e6:.0f} M parameters, {model['layers']} layers, hidden {model['hidden']}, "
        f"{model['heads']} heads, {model['kv_heads']} KV heads, MLP {model['mlp']}, vocabulary {model['vocab']}, "
        "bfloat16, random weights.",
        f"- Load: {load['input_len']} tokens in, {load['output_len']} out, greedy, EOS ignored; the row says how many "
        "requests at once.",
        "- Start: from starting the server's process to the first token of a completion.",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}.",
        "",
        "| row | system | requests (failed) | " + " | ".join(m.title for m in METRICS) + " |",
        "| --- | --- | --- | " + " | ".join("---" for _ in METRICS) + " |",
    ]
    for entry in summary:
        if "ratio" in entry:
            cells = ["-" if entry["ratio"][m.field] is None else f"{entry['ratio'][m.field]:.2f}x" for m in METRICS]
            counted = ""
        else:
            cells = [f"{entry['median'][m.field]:,.{m.digits}f}" for m in METRICS]
            counted = f"{entry['requests']} ({entry['failed']})"
        lines.append(f"| {entry['row']} | {entry['system']} | {counted} | " + " | ".join(cells) + " |")
    lines += ["", "The commands:", "", "```sh", *dict.fromkeys(facts["commands"]), "```", ""]
    return "\n".join(lines)


WATCHED_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "sve", "bf16")


def machine() -> dict[str, Any]:
    """Cores, CPU, instruction sets that decide matrix speed, and memory."""
    cpu, flags = platform.processor() or platform.machine(), set[str]()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            cpu = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu,
        "cpu_flags": [flag for flag in WATCHED_CPU_FLAGS if flag in flags],
        "memory_gib": memory_bytes / 2**30,
        "kernel": platform.release(),
    }


def model_facts(model: Path) -> dict[str, Any]:
    """What a reader needs of the checkpoint's config, and its parameter count from the tensors' own headers."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return {
        "parameters": sum(_parameters(file) for file in sorted(model.glob("*.safetensors"))),
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "mlp": config["intermediate_size"],
        "vocab": config["vocab_size"],
    }


def _parameters(file: Path) -> int:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def today() -> str:
    """The date of the run."""
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()
