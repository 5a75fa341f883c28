"""The text table of a trace. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .cpu import CpuUse
from .records import Trace
from .summary import Spread, Summary

HAS_STEP_GOAL = 0.92
NON_COMPUTE_GOAL = 0.15


def table(trace: Trace, summary: Summary, cpu: CpuUse | str) -> str:
    """Returns the text that `stagemesh bench trace` prints. `cpu`: the CPU time, or why it is not known."""
    wall_s = summary.wall_us * 1e-6
    lines = [
        f"{summary.steps} steps of {trace.model} in {wall_s:.2f} s: {summary.steps / wall_s:.1f} steps/s, "
        f"{summary.tokens / wall_s:.1f} tokens/s, {summary.rows:.1f} rows a step, "
        f"{summary.prefill_share:.0%} of all positions prefill",
        _clocks(trace),
    ]
    if trace.left_out:
        lines.append(f"{trace.left_out} steps of another epoch are left out: the pipeline changed during the trace")
    lines += ["", *_stages(summary), "", *_gateway(summary), "", *_cpu(cpu), "", *_goals(summary, cpu)]
    return "\n".join(lines)


def _clocks(trace: Trace) -> str:
    parts = [
        f"stage {i} " + ("shares the gateway's" if c.shared else f"{c.offset_us / 1000:+.3f} ms")
        + f" (to {c.uncertainty_us / 1000:.3f} ms)"
        for i, c in enumerate(trace.clocks)
    ]  # fmt: skip
    return "clocks: " + ", ".join(parts)


def _stages(summary: Summary) -> list[str]:
    rows = [["stage", "busy", "has step", "CPU", *summary.stages[0].times]]
    for s in summary.stages:
        shares = (f"{share:.2f}" for share in (s.busy_share, s.has_step_share, s.compute_cpu_share))
        rows.append([str(s.stage), *shares, *map(_ms, s.times.values())])
    return ["per stage: shares of its wall time; p50/p99 in ms", *_aligned(rows)]


def _gateway(summary: Summary) -> list[str]:
    return ["gateway: p50/p99 in ms", *(f"  {name:<60}{_ms(value)}" for name, value in summary.times.items())]


def _cpu(cpu: CpuUse | str) -> list[str]:
    if isinstance(cpu, str):
        return [f"processor time: not known: {cpu}"]
    total_s, computing = cpu.total_s, 1 - cpu.non_compute_share
    told = [(s, role, f"{s / total_s if total_s else 0:.0%}") for role, s in cpu.seconds.items()]
    told = [*sorted(told, reverse=True), (total_s, "all", ""), (cpu.compute_s, "of it computing", f"{computing:.0%}")]
    rows = [["role", "CPU s", "cores", "share", "ms a token"]]
    for seconds, role, share in told:
        a_token = f"{seconds / cpu.tokens * 1000:.2f}" if cpu.tokens else "-"
        rows.append([role, f"{seconds:.2f}", f"{seconds / cpu.wall_s:.2f}", share, a_token])
    return [f"processor time over {cpu.wall_s:.1f} s, {cpu.tokens} tokens generated", *_aligned(rows)]


def _goals(summary: Summary, cpu: CpuUse | str) -> list[str]:
    stage, has_step = summary.slowest.stage, summary.slowest.has_step_share
    lines = [
        f"slowest stage ({stage}) has a step to compute: {has_step:.2f} of its time "
        f"(goal >= {HAS_STEP_GOAL}: {_met(has_step >= HAS_STEP_GOAL)})"
    ]
    if isinstance(cpu, str):
        return [*lines, f"non-compute CPU share: not known (goal <= {NON_COMPUTE_GOAL})"]
    share = cpu.non_compute_share
    met = _met(share <= NON_COMPUTE_GOAL)
    return [*lines, f"non-compute CPU share: {share:.2f} (goal <= {NON_COMPUTE_GOAL}: {met})"]


def _met(good: bool) -> str:
    return "met" if good else "missed"


def _ms(value: Spread) -> str:
    return "-" if math.isnan(value.p50_ms) else f"{value.p50_ms:.2f}/{value.p99_ms:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  " + "  ".join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], others, strict=True))])
        for row in rows
    ]
