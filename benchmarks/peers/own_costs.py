"""CPU time and memory of stagemesh's processes in each row, as Markdown."""

from __future__ import annotations

import json
import statistics
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.probe import Spent

MIB = 2**20


@dataclass(frozen=True)
class OwnCosts:
    """Costs of one client run. Shares are between 0 and 1, times in seconds, memory in MiB."""

    period_s: float
    """Time from the first measured request to the last token, after the warm-up."""
    cpu_s: dict[str, float]
    """CPU seconds by role."""
    cpu_outside_ranks: float
    cpu_not_compute: float | None
    """Share of the CPU seconds outside ranks' steps; None if ranks have several threads each."""
    stage_s: dict[int, dict[str, float]]
    """Seconds of each stage, by use."""
    busiest_stage: float
    """Share of the period in which the busiest stage computed."""
    pss_start_mib: dict[str, float]
    """PSS by role, after the server's first token."""
    pss_end_mib: dict[str, float]
    weights_mib: dict[str, float]
    """Weights of each rank."""
    kv_mib: dict[str, float]
    """Allocated KV pages of each rank. Only touched pages are resident."""


def own_costs(
    spent: Spent,
    single_thread: bool,
    memory: tuple[dict[str, float], dict[str, float]],
    held: tuple[dict[str, float], dict[str, float]],
) -> OwnCosts:
    """Makes the costs of a run. `memory`: PSS at start and end. `held`: weights and KV of the ranks."""
    return OwnCosts(
        period_s=spent.seconds,
        cpu_s=spent.cpu_s,
        cpu_outside_ranks=spent.outside_ranks,
        cpu_not_compute=spent.not_compute() if single_thread else None,
        stage_s=spent.stages,
        busiest_stage=spent.busiest,
        pss_start_mib=memory[0],
        pss_end_mib=memory[1],
        weights_mib=held[0],
        kv_mib=held[1],
    )


def weights_and_kv_mib(base_url: str, model: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Returns MiB of weights and of KV of each rank, from `/mesh` and the model's config."""
    with urllib.request.urlopen(base_url + "/mesh", timeout=10) as response:
        pipeline: dict[str, Any] = json.load(response)["pipelines"][0]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    element = 4 if pipeline["model"]["dtype"] == "float32" else 2
    weights: dict[str, float] = {}
    kv: dict[str, float] = {}
    for stage in pipeline["stages"]:
        layers = stage["layers"].get("last", 0) - stage["layers"].get("first", 0)
        heads = -(-config["num_key_value_heads"] // stage["tp_size"])
        page = layers * heads * 2 * head * element * pipeline["limits"]["page_size"]
        for rank in range(stage["tp_size"]):
            role = f"rank {rank} of stage {stage['stage']}"
            weights[role] = int(stage["weight_bytes"]) / MIB
            kv[role] = stage["num_pages"] * page / MIB
    return weights, kv


def markdown(runs: Sequence[tuple[str, OwnCosts]]) -> list[str]:
    """Returns two tables for (row, costs), with medians over the repeats."""
    if not runs:
        return []
    by_row: dict[str, list[OwnCosts]] = {}
    for row, costs in runs:
        by_row.setdefault(row, []).append(costs)
    lines = [
        "",
        "What stagemesh's processes did, while the client measured. `compute`: share of the time that the busiest "
        "stage was in a step; `waits`: of that stage, for its input and for credits to send.",
        "",
        "| row | CPU s: ranks | gateway | agents | coordinator | supervisor | outside ranks | not compute | compute | "
        "waits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, own in by_row.items():
        cpu = [_grouped(costs.cpu_s) for costs in own]
        seconds = [f"{_median(c.get(g, 0.0) for c in cpu):.2f}" for g in ("ranks", "gateway", "agents", "coordinator")]
        seconds.append(f"{_median(c.get('supervisor', 0.0) for c in cpu):.2f}")
        known = [c.cpu_not_compute for c in own if c.cpu_not_compute is not None]
        shares = [_median(c.cpu_outside_ranks for c in own), _median(known) if known else None]
        shares += [_median(c.busiest_stage for c in own), _median(_waits(c) for c in own)]
        cells = [*seconds, *("-" if share is None else f"{share:.1%}" for share in shares)]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return [*lines, *_memory(by_row)]


def _memory(by_row: Mapping[str, Sequence[OwnCosts]]) -> list[str]:
    row, own = next(iter(by_row.items()))
    lines = [
        "",
        f"Memory of each process (PSS, MiB) in row {row}: after its start and after the load; `rest`: the second less "
        "weights. KV pages are in it as far as they were touched.",
        "",
        "| process | at start | after the load | weights | KV allocated | rest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for role in sorted(own[0].pss_start_mib):
        start = _median(c.pss_start_mib.get(role, 0.0) for c in own)
        end = _median(c.pss_end_mib.get(role, 0.0) for c in own)
        weights, kv = own[0].weights_mib.get(role, 0.0), own[0].kv_mib.get(role, 0.0)
        lines.append(f"| {role} | {start:.0f} | {end:.0f} | {weights:.0f} | {kv:.0f} | {end - weights:.0f} |")
    return lines


def _waits(costs: OwnCosts) -> float:
    """Returns the share of the period in which the busiest stage waited."""
    busiest = max(costs.stage_s.values(), key=lambda stage: stage.get("compute", 0.0), default={})
    return (busiest.get("wait_input", 0.0) + busiest.get("wait_send", 0.0)) / costs.period_s


def _grouped(cpu_s: Mapping[str, float]) -> dict[str, float]:
    groups: dict[str, float] = {}
    for role, seconds in cpu_s.items():
        name = "ranks" if role.startswith("rank ") else "agents" if role.startswith("agent ") else role
        groups[name] = groups.get(name, 0.0) + seconds
    return groups


def _median(values: Any) -> float:
    return float(statistics.median(values))
