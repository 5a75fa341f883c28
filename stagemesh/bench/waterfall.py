"""Draws a trace as SVG: lanes of gateway, stages and links over time, with a box for each step. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .records import Step, Trace
from .summary import STEP, Summary

MAX_STEPS = 48
"""The most steps that can be read. The middle of the trace is shown."""
WIDTH, LEFT, RIGHT, TOP = 1400, 190, 20, 74
ROW, GAP = 16, 12
MIN_BOX = 0.6

PREFILL, DECODE, SEND, DRAFT, READY, LINK, PLAN, TOKENS = (
    "#c2571a", "#2f6db3", "#1b1f24", "#a8326e", "#c9d3de", "#5b9a68", "#8a63b0", "#b8860b",
)  # fmt: skip
LEGEND = (
    (DECODE, "computes (decode)"),
    (PREFILL, "computes (prefill rows)"),
    (SEND, "hands over"),
    (DRAFT, "guesses (draft model)"),
    (READY, "ready, engine busy"),
    (LINK, "on the link"),
    (PLAN, "plan on its way"),
    (TOKENS, "result on its way"),
)


@dataclass(frozen=True)
class Box:
    """One rectangle of a lane."""

    begin_us: float
    end_us: float
    colour: str
    title: str


class Lane:
    """A labelled lane. Boxes that overlap go into rows below each other."""

    def __init__(self, label: str, boxes: Iterable[Box]) -> None:
        self.label = label
        self.rows: list[list[Box]] = []
        for box in sorted(boxes, key=lambda b: b.begin_us):
            row = next((r for r in self.rows if r[-1].end_us <= box.begin_us), None)
            if row is None:
                self.rows.append([box])
            else:
                row.append(box)

    @property
    def height(self) -> int:
        """In pixels."""
        return max(1, len(self.rows)) * ROW


def draw(trace: Trace, summary: Summary) -> str:
    """The picture as SVG text."""
    first = max(0, (len(trace.steps) - MAX_STEPS) // 2)
    steps = trace.steps[first : first + MAX_STEPS]
    lanes = list(_lanes(trace, steps))
    begin = min(step.planned_us for step in steps)
    end = max(max(step.delivered_us, *(t.ended_us for t in step.stages)) for step in steps)
    span = max(1.0, end - begin)
    scale = (WIDTH - LEFT - RIGHT) / span
    height = TOP + sum(lane.height + GAP for lane in lanes) + 24
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
    y = TOP
    for lane in lanes:
        out.append(f'<text x="12" y="{y + 12}">{escape(lane.label)}</text>')
        out.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{lane.height}" fill="#f4f6f8"/>')
        for i, row in enumerate(lane.rows):
            for box in row:
                width = max(MIN_BOX, (box.end_us - box.begin_us) * scale)
                out.append(
                    f'<rect x="{LEFT + (box.begin_us - begin) * scale:.2f}" y="{y + i * ROW + 1}" width="{width:.2f}" '
                    f'height="{ROW - 2}" fill="{box.colour}"><title>{escape(box.title)}</title></rect>'
                )
        y += lane.height + GAP
    return "\n".join([*out, "</svg>", ""])


def _title(trace: Trace, summary: Summary, steps: Sequence[Step]) -> str:
    shown = f"steps {steps[0].step}-{steps[-1].step} of {len(trace.steps)} traced"
    busy = ", ".join(f"stage {s.stage} {s.busy_share:.0%}" for s in summary.stages)
    return f"{trace.model}: {shown}; busy: {busy}; a step takes {summary.times[STEP].p50_ms:.1f} ms (median)"


def _lanes(trace: Trace, steps: Sequence[Step]) -> Iterator[Lane]:
    yield Lane(
        "plans to stage 0",
        (_box(s, s.planned_us, s.stages[0].plan_arrived_us, PLAN, "plan on its way") for s in steps),
    )
    for i, info in enumerate(trace.stages):
        pairs = [(s, s.stages[i]) for s in steps]
        if i:
            sent = (
                _box(s, s.stages[i - 1].output_us, t.input_complete_us, LINK, "activation on the link")
                for s, t in pairs
            )
            yield Lane(f"link {i - 1} to {i}", sent)
        boxes = [
            _box(s, t.began_us, t.output_us, PREFILL if s.prefill_tokens else DECODE, "computes") for s, t in pairs
        ]
        if i < len(trace.stages) - 1:
            boxes += [_box(s, t.output_us, t.handed_over_us, SEND, "hands its output over") for s, t in pairs]
        boxes += [
            _box(s, t.handed_over_us, t.ended_us, DRAFT, "guesses what follows") for s, t in pairs if t.draft_us > 0
        ]
        yield Lane(f"stage {i}: layers {info.layers[0]}-{info.layers[1] - 1}", boxes)
        yield Lane("", (_box(s, t.ready_us, t.began_us, READY, "ready, engine busy") for s, t in pairs))
    yield Lane(
        "results to gateway",
        (_box(s, s.stages[-1].ended_us, s.delivered_us, TOKENS, "result on its way") for s in steps),
    )


def _box(step: Step, begin: float, end: float, colour: str, what: str) -> Box:
    end = max(begin, end)
    title = (
        f"step {step.step} {what}: {(end - begin) / 1000:.2f} ms; {len(step.sequences)} rows, "
        f"{step.tokens} tokens, {step.prefill_tokens} of them prefill"
    )
    return Box(begin, end, colour, title)


def _axis(span_us: float, scale: float, height: int) -> list[str]:
    """About ten ticks at round milliseconds."""
    raw = span_us / 1000 / 10
    power = 10.0 ** math.floor(math.log10(raw))
    tick_ms = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    out = []
    for n in range(int(span_us / 1000 / tick_ms) + 1):
        x = LEFT + n * tick_ms * 1000 * scale
        out.append(f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{height - 18}" stroke="#d5dbe1"/>')
        out.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{n * tick_ms:g} ms</text>')
    return out
