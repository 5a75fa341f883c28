"""What `scale.py` leaves behind: JSON, a page of tables, and a picture of the efficiency."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report import machine_line as machine_line

if TYPE_CHECKING:
    from scale import Point

GOALS = {20.0: 0.95, 3.0: 0.85}
"""Least efficiency by milliseconds of a step, up to `GOAL_STAGES` stages."""
GOAL_STAGES = 16
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#777777", "#000000")
WIDTH, HEIGHT, MARGIN = 420, 300, 46


def save(stem: Path, whole: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Writes `stem`.json and `stem`.md, and shows the page."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    page = "\n".join(lines) + "\n"
    stem.with_name(stem.name + ".md").write_text(page, encoding="utf-8")
    print(page)


def write_grid(stem: Path, points: Sequence[Point], told: Mapping[str, Any]) -> int:
    """Writes all three files; 1 when a point that a goal speaks of is below it."""
    below = [p for p in points if p.stages <= GOAL_STAGES and p.efficiency < GOALS.get(p.step_ms, 0.0)]
    lines = [
        "# How a mesh grows",
        "",
        f"Written by `benchmarks/scale.py grid` on {told['date']}. Every stage sleeps instead of computing; gateway, "
        "coordinator, agents, ranks, plans and links are real, and all of them and the client share one machine.",
        "",
        machine_line(told["machine"]),
        f"- Versions: {', '.join(f'{name} {version}' for name, version in told['versions'].items())}.",
        f"- Command: `{told['command']}`.",
        "",
        "Efficiency: tokens a second beside the ideal pipeline's. There, n requests go in min(n, P + 1) steps, and "
        "each gets a token as often as its step comes round. In brackets: share of all cores that mesh and client "
        "used. Near 100 % the machine is the bound, as all stages share it.",
    ]
    for step_ms in dict.fromkeys(p.step_ms for p in points):
        own = [p for p in points if p.step_ms == step_ms]
        lines += ["", f"## Steps of {step_ms:g} ms", "", *_table(own, _efficiency), "", *_costs(own)]
    goals = ", ".join(f"{goal:g} at {ms:g} ms" for ms, goal in GOALS.items())
    lines += ["", f"Goal: at least {goals}, to {GOAL_STAGES} stages. Below it: {_named(below)}."]
    if stem.name:
        lines += ["", f"![busy share of a stage by requests at once]({stem.name}.svg)"]
    asdict = [{**dataclasses.asdict(p), "efficiency": p.efficiency} for p in points]
    save(stem, {**told, "goals": GOALS, "points": asdict}, lines)
    stem.with_name(stem.name + ".svg").write_text(picture(points), encoding="utf-8")
    return 1 if below else 0


def _named(points: Sequence[Point]) -> str:
    return ", ".join(f"P={p.stages} n={p.at_once} at {p.step_ms:g} ms ({p.efficiency:.2f})" for p in points) or "none"


def _efficiency(point: Point) -> str:
    return f"{point.efficiency:.2f} ({point.cpu_share:.0%})"


def _table(points: Sequence[Point], show: Any) -> list[str]:
    """Rows: stages; columns: requests at once."""
    columns = list(dict.fromkeys(p.at_once for p in points))
    found = {(p.stages, p.at_once): p for p in points}
    lines = ["| stages | " + " | ".join(f"{n} at once" for n in columns) + " |", "| --- |" + " --- |" * len(columns)]
    for stages in dict.fromkeys(p.stages for p in points):
        cells = [show(found[stages, n]) if (stages, n) in found else "" for n in columns]
        lines.append(f"| {stages} | " + " | ".join(cells) + " |")
    return lines


def _costs(points: Sequence[Point]) -> list[str]:
    """CPU of the services, per what drives it."""
    lines = [
        "CPU, in microseconds: the gateway's a step and a token, an agent's a step, a rank's a step (it includes "
        "waking up in the sleep), and the coordinator's a second and worker.",
        "",
        "| stages | at once | gateway, a step | gateway, a token | agent, a step | rank, a step | coordinator |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in points:
        steps, tokens = p.steps_s * p.window_s, p.tok_s * p.window_s
        agents = sum(s for role, s in p.cpu_s.items() if role.startswith("agent ")) / p.stages
        ranks = sum(s for role, s in p.cpu_s.items() if role.startswith("rank ")) / p.stages
        figures = (
            p.cpu_s.get("gateway", 0.0) / steps,
            p.cpu_s.get("gateway", 0.0) / tokens,
            agents / steps,
            ranks / steps,
            p.cpu_s.get("coordinator", 0.0) / p.window_s / p.stages,
        )
        lines.append(f"| {p.stages} | {p.at_once} | " + " | ".join(f"{figure * 1e6:.0f}" for figure in figures) + " |")
    return lines


def picture(points: Sequence[Point]) -> str:
    """One panel a step length: busy share (measured solid, ideal dashed) over requests at once, a line a P."""
    lengths = list(dict.fromkeys(p.step_ms for p in points))
    most = max(math.log2(max(2, p.at_once)) for p in points)
    parts = []
    for panel, step_ms in enumerate(lengths):
        x0 = panel * WIDTH + MARGIN

        def place(n: float, share: float, x0: int = x0) -> str:
            x = x0 + math.log2(n) / most * (WIDTH - 2 * MARGIN)
            return f"{x:.1f},{HEIGHT - MARGIN - min(1.05, share) * (HEIGHT - 2 * MARGIN):.1f}"

        parts.append(f'<text x="{x0}" y="24">{step_ms:g} ms a step: ideal dashed</text>')
        for share in (0, 0.25, 0.5, 0.75, 1):
            left, right = place(1, share).split(","), place(2**most, share).split(",")
            parts.append(f'<path d="M{",".join(left)} L{",".join(right)}" stroke="#dddddd"/>')
            parts.append(f'<text x="{x0 - 30}" y="{left[1]}">{share:g}</text>')
        own = [p for p in points if p.step_ms == step_ms]
        for n in dict.fromkeys(p.at_once for p in own):
            parts.append(f'<text x="{place(n, 0).split(",")[0]}" y="{HEIGHT - MARGIN + 16}">{n}</text>')
        for index, stages in enumerate(dict.fromkeys(p.stages for p in own)):
            line = sorted((p for p in own if p.stages == stages), key=lambda p: p.at_once)
            colour = COLOURS[index % len(COLOURS)]
            measured = " L".join(place(p.at_once, p.efficiency * p.ideal_busy) for p in line)
            ideal = " L".join(place(p.at_once, p.ideal_busy) for p in line)
            parts.append(f'<path d="M{measured}" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<path d="M{ideal}" stroke="{colour}" stroke-dasharray="4 3"/>')
            parts.append(f'<text x="{x0 + index * 52}" y="{HEIGHT - 8}" fill="{colour}">P={stages}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(lengths)}" height="{HEIGHT}"'
    body = "\n".join(parts)
    return f'{head} font-family="sans-serif" font-size="11">\n<style>path {{ fill: none }}</style>\n{body}\n</svg>\n'
