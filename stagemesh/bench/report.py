"""The text table of a trace. Pure."""

from __future__ import annotations

import math

from .cpu import CpuUse
from .records import Trace
from .summary import Spread, Summary

HAS_STEP_GOAL = 0.92
NON_COMPUTE_GOAL = 0.15


def table(trace: Trace, summary: Summary, cpu: CpuUse | None, cpu_missing: str) -> str:
    """What `stagemesh bench trace` prints."""
    wall_s = summary.wall_us * 1e-6
    lines = [
        f"{summary.steps} steps of {trace.model} in {wall_s:.2f} s: {summary.steps / wall_s:.1f} steps/s, "
        f"{summary.tokens / wall_s:.1f} tokens/s, {summary.rows:.1f} rows a step, "
        f"{summary.prefill_share:.0%} of all positions prefill",
        _clocks(trace),
    ]
    if trace.left_out:
        lines.append(f"{trace.left_out} steps of another epoch are left out: the pipeline changed meanwhile")
    lines += ["", *_stages(summary), "", *_gateway(summary), "", *_cpu(cpu, cpu_missing), "", *_goals(summary, cpu)]
    return "\n".join(lines)


def _clocks(trace: Trace) -> str:
    parts = [
        f"stage {i} " + ("shares the gateway's" if c.shared else f"{c.offset_us / 1000:+.3f} ms")
        + f" (to {c.uncertainty_us / 1000:.3f} ms)"
        for i, c in enumerate(trace.clocks)
    ]  # fmt: skip
    return "clocks: " + ", ".join(parts)


def _stages(summary: Summary) -> list[str]:
    header = ["stage", "busy", "has step", "CPU", "compute", "hand over", "guess", "hop in", "wait input", "wait send",
              "plan waits", "ready waits"]  # fmt: skip
    rows = [
        [
            str(s.stage),
            f"{s.busy_share:.2f}",
            f"{s.has_step_share:.2f}",
            f"{s.compute_cpu_share:.2f}",
            *map(_ms, (s.compute, s.hand_over, s.draft, s.hop, s.wait_input, s.wait_send, s.queued, s.ready)),
        ]
        for s in summary.stages
    ]
    return ["per stage: shares of its wall time; p50/p99 in ms", *_aligned([header, *rows])]


def _gateway(summary: Summary) -> list[str]:
    rows = [
        ["a step, planned to delivered", _ms(summary.step)],
        ["plan sent to taken by stage 0", _ms(summary.plan_way)],
        ["last stage's end to result received", _ms(summary.result_way)],
        ["result received to tokens delivered", _ms(summary.deliver)],
        ["tokens delivered to next plan of a row", _ms(summary.replan)],
        ["turnaround: last stage's end to that plan taken by stage 0", _ms(summary.turnaround)],
    ]
    return ["gateway: p50/p99 in ms", *(f"  {name:<60}{value}" for name, value in rows)]


def _cpu(cpu: CpuUse | None, missing: str) -> list[str]:
    if cpu is None:
        return [f"processor time: {missing}"]
    header = ["role", "CPU s", "cores", "share", "ms a token"]
    rows = [
        [role, f"{s:.2f}", f"{s / cpu.wall_s:.2f}", f"{s / cpu.total_s if cpu.total_s else 0:.0%}", _a_token(s, cpu)]
        for role, s in sorted(cpu.seconds.items(), key=lambda entry: -entry[1])
    ]
    rows.append(["all", f"{cpu.total_s:.2f}", f"{cpu.total_s / cpu.wall_s:.2f}", "", _a_token(cpu.total_s, cpu)])
    rows.append(
        ["of it computing", f"{cpu.compute_s:.2f}", f"{cpu.compute_s / cpu.wall_s:.2f}",
         f"{1 - cpu.non_compute_share:.0%}", _a_token(cpu.compute_s, cpu)]
    )  # fmt: skip
    return [f"processor time over {cpu.wall_s:.1f} s, {cpu.tokens} tokens generated", *_aligned([header, *rows])]


def _goals(summary: Summary, cpu: CpuUse | None) -> list[str]:
    slowest = summary.slowest
    lines = [
        f"slowest stage ({slowest.stage}) has a step to compute: {slowest.has_step_share:.2f} of its time "
        f"(goal >= {HAS_STEP_GOAL}: {_met(slowest.has_step_share >= HAS_STEP_GOAL)})"
    ]
    if cpu is not None:
        share = cpu.non_compute_share
        lines.append(
            f"non-compute CPU share: {share:.2f} (goal <= {NON_COMPUTE_GOAL}: {_met(share <= NON_COMPUTE_GOAL)})"
        )
    else:
        lines.append(f"non-compute CPU share: not known (goal <= {NON_COMPUTE_GOAL})")
    return lines


def _met(good: bool) -> str:
    return "met" if good else "missed"


def _ms(value: Spread) -> str:
    return "-" if math.isnan(value.p50_ms) else f"{value.p50_ms:.2f}/{value.p99_ms:.2f}"


def _a_token(seconds: float, cpu: CpuUse) -> str:
    return f"{seconds / cpu.tokens * 1000:.2f}" if cpu.tokens else "-"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
