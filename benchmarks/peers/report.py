"""Writes a comparison: medians and ratios over the repeats, as JSON and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.results import machine_line, save

from . import own_costs
from .own_costs import OwnCosts


@dataclass(frozen=True)
class Run:
    """One client run against one server: the figures of `vllm bench serve`, with times in milliseconds."""

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
    itl_p99_ms: float
    input_tokens: int
    output_tokens: int
    duration_s: float
    load_before: float
    """The machine's one-minute load average before the server started. It shows other work."""
    own: OwnCosts | None = None
    """CPU time and memory, only of stagemesh."""


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
    Metric("itl_p99_ms", "ITL p99, ms", 1),
    Metric("start_s", "start, s", 1),
)


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns medians over the repeats for each row and system, then ratios of stagemesh to each other system."""
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
        ours = medians.pop("stagemesh", {})
        for system, theirs in medians.items() if ours else ():
            ratio = {name: ours[name] / theirs[name] if theirs[name] else None for name in ours}
            summary.append({"row": row, "system": f"stagemesh / {system}", "ratio": ratio})
    return summary


def write(stem: Path, runs: Sequence[Run], facts: Mapping[str, Any]) -> None:
    """Writes `stem`.json and `stem`.md. `facts` has machine, versions, model and commands."""
    summary = summarize(runs)
    whole = {**facts, "summary": summary, "runs": [asdict(run) for run in runs]}
    save(stem, whole, markdown(summary, runs, facts))


def markdown(summary: Sequence[Mapping[str, Any]], runs: Sequence[Run], facts: Mapping[str, Any]) -> list[str]:
    """Returns the Markdown page."""
    peers = ", ".join(s for s in dict.fromkeys(run.system for run in runs) if s != "stagemesh")
    machine, model = facts["machine"], facts["model"]
    lines = [
        f"# stagemesh beside {peers or 'nobody'}",
        "",
        f"Written by `python -m benchmarks.peers` on {facts['date']}. Medians over the repeats of one run, in which "
        "the systems took turns; between runs and machines only the ratios compare.",
        "",
        machine_line(machine),
        f"- Model: {model['parameters'] / 1e6:.0f} M parameters, {model['layers']} layers, hidden {model['hidden']}, "
        f"{model['heads']} heads, {model['kv_heads']} KV heads, MLP {model['mlp']}, vocabulary {model['vocab']}, "
        "bfloat16, random weights.",
        "- Load, greedy, EOS ignored: " + "; ".join(f"`{row}`: {told}" for row, told in facts["loads"].items()) + ".",
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
    lines += own_costs.markdown([(run.row, run.own) for run in runs if run.own is not None])
    return [*lines, "", "The commands:", "", "```sh", *dict.fromkeys(facts["commands"]), "```"]
