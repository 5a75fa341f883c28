"""Draws line charts side by side as SVG. The x axis is logarithmic, measured lines are solid, ideal ones dashed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#777777", "#000000")
WIDTH, HEIGHT, MARGIN = 440, 320, 52
Line = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One chart: lines of (x, y) by name. An `ideal` line has the colour of the line of the same name."""

    title: str
    x_title: str
    lines: Mapping[str, Line]
    ideal: Mapping[str, Line] = field(default_factory=dict)
    y_max: float | None = None
    """Upper end of the y axis; default: the largest y."""


def draw(panels: Sequence[Panel]) -> str:
    """Returns the whole picture as SVG."""
    body = "\n".join(part for at, panel in enumerate(panels) for part in _panel(panel, at * WIDTH + MARGIN))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    style = "text { fill: #222222 } path { fill: none }"
    return f'{head} font-family="sans-serif" font-size="11">\n<style>{style}</style>\n{body}\n</svg>\n'


def _panel(panel: Panel, left: int) -> list[str]:
    every = [point for line in (*panel.lines.values(), *panel.ideal.values()) for point in line]
    low, high = min(x for x, _ in every), max(x for x, _ in every)
    span = math.log2(high / low) or 1.0
    top = panel.y_max or _round_up(max(y for _, y in every))
    bottom_y, plot_width, plot_height = HEIGHT - MARGIN, WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def place(x: float, y: float) -> tuple[float, float]:
        return left + math.log2(x / low) / span * plot_width, bottom_y - min(y / top, 1.05) * plot_height

    def path(line: Line, extra: str) -> str:
        points = " L".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        return f'<path d="M{points}" {extra}/>'

    parts = [f'<text x="{left}" y="20">{panel.title}</text>']
    for quarter in range(5):
        y = quarter / 4 * top
        parts.append(path([(low, y), (high, y)], 'stroke="#dddddd"'))
        parts.append(f'<text x="{left - 40}" y="{place(low, y)[1] + 4:.1f}">{y:.4g}</text>')
    for x in sorted({x for x, _ in every}):
        parts.append(f'<text x="{place(x, 0)[0] - 6:.1f}" y="{bottom_y + 14}">{x:g}</text>')
    parts.append(f'<text x="{left}" y="{bottom_y + 28}">{panel.x_title}</text>')
    for index, (name, line) in enumerate(panel.lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        if name in panel.ideal:
            parts.append(path(sorted(panel.ideal[name]), f'stroke="{colour}" stroke-dasharray="4 3"'))
        parts.append(path(sorted(line), f'stroke="{colour}" stroke-width="2"'))
        parts.append(f'<text x="{left + index * 52}" y="{HEIGHT - 8}" style="fill:{colour}">{name}</text>')
    return parts


def _round_up(value: float) -> float:
    """Rounds up to 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)
