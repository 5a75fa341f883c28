"""Writes the results of `scale grid`: JSON, a page of tables, and pictures of efficiency and cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.line_chart import Panel, draw
from benchmarks.common.results import machine_line, save

from .grid import Point

GOALS = {20.0: 0.95, 3.0: 0.85}
"""Milliseconds of a step -> least efficiency, up to `GOAL_STAGES` stages."""
GOAL_STAGES = 16


def write_grid(stem: Path, points: Sequence[Point], told: Mapping[str, Any]) -> int:
    """Writes all files. Returns 1 if a point with a goal is below it."""
    below = [p for p in points if p.stages <= GOAL_STAGES and p.efficiency < GOALS.get(p.step_ms, 0.0)]
    lines = [
        "# How a mesh grows",
        "",
        f"Written by `python -m benchmarks.scale grid` on {told['date']}. Every stage sleeps instead of computing; "
        "gateway, coordinator, agents, ranks, plans and links are real, and they and the client share one machine.",
        "",
        machine_line(told["machine"]),
        f"- Versions: {', '.join(f'{name} {version}' for name, version in told['versions'].items())}.",
        f"- Command: `{told['command']}`.",
        "",
        "Efficiency: steps a second beside the ideal pipeline's, where a full one runs a step in the time of a sleep, "
        "whatever its rows, and n requests on P stages fill n/P of it at most. In brackets: share of all cores that "
        "mesh and client used. Near 100 % the machine is the bound, as all stages share it.",
    ]
    for step_ms in dict.fromkeys(p.step_ms for p in points):
        own = [p for p in points if p.step_ms == step_ms]
        lines += ["", f"## Steps of {step_ms:g} ms", "", *_table(own, _efficiency), "", *_costs(own)]
    goals = ", ".join(f"{goal:g} at {ms:g} ms" for ms, goal in GOALS.items())
    lines += ["", f"Goal: at least {goals}, to {GOAL_STAGES} stages. Below it: {_named(below)}."]
    lines += ["", f"![busy share of a stage by requests at once]({stem.name}.svg)"]
    lines += ["", f"![what gateway and coordinator cost]({stem.name}-cost.svg)"]
    asdict = [{**dataclasses.asdict(p), "efficiency": p.efficiency} for p in points]
    save(stem, {**told, "goals": GOALS, "points": asdict}, lines)
    stem.with_name(stem.name + ".svg").write_text(efficiency_chart(points), encoding="utf-8")
    stem.with_name(stem.name + "-cost.svg").write_text(cost_chart(points), encoding="utf-8")
    return 1 if below else 0


def _named(points: Sequence[Point]) -> str:
    return ", ".join(f"P={p.stages} n={p.at_once} at {p.step_ms:g} ms ({p.efficiency:.2f})" for p in points) or "none"


def _efficiency(point: Point) -> str:
    return f"{point.efficiency:.2f} ({point.cpu_share:.0%})"


def _table(points: Sequence[Point], show: Any) -> list[str]:
    """Returns a table with stages as rows and concurrent requests as columns."""
    columns = list(dict.fromkeys(p.at_once for p in points))
    found = {(p.stages, p.at_once): p for p in points}
    lines = ["| stages | " + " | ".join(f"{n} at once" for n in columns) + " |", "| --- |" + " --- |" * len(columns)]
    for stages in dict.fromkeys(p.stages for p in points):
        cells = [show(found[stages, n]) if (stages, n) in found else "" for n in columns]
        lines.append(f"| {stages} | " + " | ".join(cells) + " |")
    return lines


def _costs(points: Sequence[Point]) -> list[str]:
    """Returns tables of the services' CPU time per step, token and worker."""
    lines = [
        "CPU in microseconds over what the process uses idle: the gateway's a step and a token, an agent's and a "
        "rank's a step (the rank's holds its waking up in the sleep).",
        "",
        "| stages | at once | tok/s | rows a step | gateway, step | gateway, token | agent, step | rank, step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in points:
        steps, tokens = p.steps_s * p.window_s, p.tok_s * p.window_s
        gateway, each = p.busy_cpu_s("gateway"), steps * p.stages
        figures = (gateway / steps, gateway / tokens, p.busy_cpu_s("agent ") / each, p.busy_cpu_s("rank ") / each)
        speed = f"{p.tok_s:.1f} | {p.rows:.1f}"
        lines.append(
            f"| {p.stages} | {p.at_once} | {speed} | " + " | ".join(f"{figure * 1e6:.0f}" for figure in figures) + " |"
        )
    lines += [
        "",
        "CPU in milliseconds a second: without requests, and the coordinator's with as many as there were at most.",
        "",
        "| stages | gateway | each agent | each rank | coordinator | a worker | coordinator under load | a worker |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in {p.stages: p for p in points}.values():
        agents = sum(share for role, share in p.idle_cpu.items() if role.startswith("agent ")) / p.stages
        ranks = sum(share for role, share in p.idle_cpu.items() if role.startswith("rank ")) / p.stages
        still, loaded = p.idle_cpu.get("coordinator", 0.0), p.cpu_s.get("coordinator", 0.0) / p.window_s
        rates = (p.idle_cpu.get("gateway", 0.0), agents, ranks, still, still / p.stages, loaded, loaded / p.stages)
        lines.append(f"| {p.stages} | " + " | ".join(f"{rate * 1e3:.2f}" for rate in rates) + " |")
    return lines


def efficiency_chart(points: Sequence[Point]) -> str:
    """Draws a stage's busy share by concurrent requests: a panel per step length, a line per number of stages."""
    panels = []
    for step_ms in dict.fromkeys(p.step_ms for p in points):
        own = [p for p in points if p.step_ms == step_ms]
        measured = _lines(own, lambda p: p.efficiency * p.ideal_busy)
        ideal = _lines(own, lambda p: p.ideal_busy)
        title = f"share of the ideal full pipeline, {step_ms:g} ms a step (dashed: ideal)"
        panels.append(Panel(title, "requests at once", measured, ideal, y_max=1.0))
    return draw(panels)


def cost_chart(points: Sequence[Point]) -> str:
    """Draws the gateway's CPU per step and token by concurrent requests, and the coordinator's per worker."""
    panels = []
    for step_ms in dict.fromkeys(p.step_ms for p in points):
        own = [p for p in points if p.step_ms == step_ms]
        a_step = _lines(own, lambda p: p.busy_cpu_s("gateway") / (p.steps_s * p.window_s) * 1e6)
        a_token = _lines(own, lambda p: p.busy_cpu_s("gateway") / (p.tok_s * p.window_s) * 1e6)
        panels.append(Panel(f"gateway, us a step, {step_ms:g} ms steps", "requests at once", a_step))
        panels.append(Panel(f"gateway, us a token, {step_ms:g} ms steps", "requests at once", a_token))
    workers = {p.stages: p.idle_cpu.get("coordinator", 0.0) / p.stages * 1e3 for p in points}
    panels.append(Panel("coordinator, ms a second and worker", "workers", {"idle": list(workers.items())}))
    return draw(panels)


def _lines(points: Sequence[Point], y: Callable[[Point], float]) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for p in points:
        lines.setdefault(f"P={p.stages}", []).append((p.at_once, y(p)))
    return lines
