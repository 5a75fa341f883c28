"""Draws a trace as SVG: lanes of gateway, stages and links over time, with a box for each step. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias
from xml.sax.saxutils import escape

from . import chrome
from .records import Step, Trace
from .summary import STEP, Summary

MAX_STEPS = 48
"""Largest number of steps in a readable picture. The middle of the trace is shown."""
WIDTH, LEFT, RIGHT, TOP = 1400, 190, 20, 74
ROW, GAP = 16, 12
MIN_BOX = 0.6

COMPUTES = "computes"
STYLE = {
    "compute": ("#2f6db3", COMPUTES),
    "send": ("#1b1f24", "hands its output over"),
    "draft": ("#a8326e", "guesses what follows"),
    "ready": ("#c9d3de", "ready, engine busy"),
    "link": ("#5b9a68", "activation on the link"),
    "plan sent": ("#8a63b0", "plan on its way"),
    "result sent": ("#b8860b", "result on its way"),
}
"""Category of drawn events -> (colour, words)."""
PREFILL = "#c2571a"
LEGEND = (*STYLE.values(), (PREFILL, "computes prefill rows"))

Box: TypeAlias = tuple[float, float, chrome.Event]
"""Begin and end in microseconds since the first plan, and the event."""


def draw(trace: Trace, summary: Summary) -> str:
    """Returns the picture as SVG text."""
    first = max(0, (len(trace.steps) - MAX_STEPS) // 2)
    steps = trace.steps[first : first + MAX_STEPS]
    events = chrome.events(replace(trace, steps=steps))
    lanes = _lanes(events)
    span = max(end for rows in lanes.values() for row in rows for _, end, _ in row)
    scale = (WIDTH - LEFT - RIGHT) / span
    height = TOP + sum(len(rows) * ROW + GAP for rows in lanes.values()) + 24
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="15">{escape(_title(trace, summary, steps))}</text>',
    ]
    x = 12
    for colour, text in LEGEND:
        out.append(f'<rect x="{x}" y="36" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{x + 17}" y="46">{escape(text)}</text>')
        x += 40 + 7 * len(text)
    out += _axis(span, scale, height)
    labels = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    y = TOP
    for lane, rows in lanes.items():
        lane_height = len(rows) * ROW
        out.append(f'<text x="12" y="{y + 12}">{escape(labels[lane])}</text>')
        out.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{lane_height}" fill="#f4f6f8"/>')
        for row in rows:
            for begin, end, event in row:
                args, (colour, what) = event["args"], STYLE[event["cat"]]
                if what == COMPUTES and args["prefill_tokens"]:
                    colour = PREFILL
                out.append(
                    f'<rect x="{LEFT + begin * scale:.2f}" y="{y + 1}" height="{ROW - 2}" '
                    f'width="{max(MIN_BOX, (end - begin) * scale):.2f}" fill="{colour}"><title>{event["name"]} {what}: '
                    f"{(end - begin) / 1000:.2f} ms; {args['rows']} rows, {args['tokens']} tokens, "
                    f"{args['prefill_tokens']} of them prefill</title></rect>"
                )
            y += ROW
        y += GAP
    return "\n".join([*out, "</svg>", ""])


def _title(trace: Trace, summary: Summary, steps: Sequence[Step]) -> str:
    shown = f"steps {steps[0].step}-{steps[-1].step} of {len(trace.steps)} traced"
    busy = ", ".join(f"stage {s.stage} {s.busy_share:.0%}" for s in summary.stages)
    return f"{trace.model}: {shown}; busy: {busy}; a step takes {summary.times[STEP].p50_ms:.1f} ms (median)"


def _lanes(events: Sequence[chrome.Event]) -> dict[tuple[int, int], list[list[Box]]]:
    """Returns the boxes of each process and thread. Boxes that overlap go into different rows."""
    lanes: dict[tuple[int, int], list[list[Box]]] = {}
    boxes = [
        (event["ts"], event["ts"] + event["dur"] if event["ph"] == "X" else after["ts"], event)
        for event, after in itertools.pairwise(events)
        if event["ph"] in ("X", "b") and event["cat"] in STYLE
    ]
    for begin, end, event in sorted(boxes, key=lambda box: box[0]):
        rows = lanes.setdefault((event["pid"], event["tid"]), [])
        row = next((row for row in rows if row[-1][1] <= begin), None)
        if row is None:
            rows.append(row := [])
        row.append((begin, end, event))
    return lanes


def _axis(span_us: float, scale: float, height: int) -> list[str]:
    """Draws about ten ticks at round milliseconds."""
    raw = span_us / 1000 / 10
    power = 10.0 ** math.floor(math.log10(raw))
    tick_ms = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    out = []
    for n in range(int(span_us / 1000 / tick_ms) + 1):
        x = LEFT + n * tick_ms * 1000 * scale
        out.append(f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{height - 18}" stroke="#d5dbe1"/>')
        out.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{n * tick_ms:g} ms</text>')
    return out
