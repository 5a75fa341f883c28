"""Where the time of a trace's steps went: figures per stage, of the gateway, and of a whole step. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .records import StageTimes, Step, Trace


@dataclass(frozen=True)
class Spread:
    """Median and 99th percentile, milliseconds; NaN of nothing."""

    p50_ms: float
    p99_ms: float


def spread(values_us: Iterable[float]) -> Spread:
    """Of microseconds; percentiles are values that occurred (nearest rank)."""
    ordered = sorted(values_us)
    if not ordered:
        return Spread(math.nan, math.nan)
    pick = [ordered[math.ceil(q * len(ordered)) - 1] / 1000 for q in (0.5, 0.99)]
    return Spread(pick[0], pick[1])


@dataclass(frozen=True)
class StageSummary:
    """One stage over the trace. Shares are of its wall time, from its first step's begin to its last one's end."""

    stage: int
    busy_share: float
    """It ran a step: computed it or handed it on."""
    has_step_share: float
    """It ran a step, or one lay ready: plan, input and credit were there."""
    compute: Spread
    """Begin to output."""
    compute_total_us: float
    compute_cpu_share: float
    """Processor time of the rank by wall time of its steps: below its threads, something else had the core."""
    hand_over: Spread
    """Output to what comes behind the send call; small on the last stage, which sends tokens."""
    draft: Spread
    """The draft model's time behind it; 0 where there is none."""
    queued: Spread
    """The plan's arrival to the step's begin."""
    ready: Spread
    """Plan, input and credit there, and not begun."""
    wait_input: Spread
    wait_send: Spread
    hop: Spread
    """The previous stage's output to this one's input complete; of nothing on the first."""


@dataclass(frozen=True)
class Summary:
    """The whole trace."""

    steps: int
    wall_us: float
    tokens: int
    """Generated ones."""
    rows: float
    """Mean rows of a step."""
    prefill_share: float
    """Of all positions computed."""
    stages: tuple[StageSummary, ...]
    step: Spread
    """Planned to delivered."""
    plan_way: Spread
    """Plan sent to its arrival at the first stage, which takes it between two steps."""
    result_way: Spread
    """The last stage's end to the result's arrival at the gateway."""
    deliver: Spread
    """Result received to tokens handed to their requests."""
    replan: Spread
    """Tokens of a step delivered to the next plan that names one of their sequences; 0 where it went out before."""
    turnaround: Spread
    """The last stage's end to the arrival at stage 0 of the next plan that names one of the step's sequences.

    0 where that plan was there before, and waits for the token alone.
    """

    @property
    def slowest(self) -> StageSummary:
        """The stage that computed longest."""
        return max(self.stages, key=lambda stage: stage.compute_total_us)


def summarize(trace: Trace) -> Summary:
    """Figures of at least one step."""
    steps = trace.steps
    followers = list(_followers(steps))
    positions = sum(step.tokens for step in steps)
    return Summary(
        steps=len(steps),
        wall_us=max(s.delivered_us for s in steps) - min(s.planned_us for s in steps),
        tokens=sum(len(step.sampled) for step in steps),
        rows=sum(len(step.sequences) for step in steps) / len(steps),
        prefill_share=sum(step.prefill_tokens for step in steps) / positions,
        stages=tuple(_stage(trace, i) for i in range(len(trace.stages))),
        step=spread(s.delivered_us - s.planned_us for s in steps),
        plan_way=spread(s.stages[0].plan_arrived_us - s.sent_us for s in steps),
        result_way=spread(s.received_us - s.stages[-1].ended_us for s in steps),
        deliver=spread(s.delivered_us - s.received_us for s in steps),
        replan=spread(max(0.0, after.planned_us - step.delivered_us) for step, after in followers),
        turnaround=spread(
            max(0.0, after.stages[0].plan_arrived_us - step.stages[-1].ended_us) for step, after in followers
        ),
    )


def _stage(trace: Trace, index: int) -> StageSummary:
    times = [step.stages[index] for step in trace.steps]
    wall_us = max(t.ended_us for t in times) - min(t.began_us for t in times)
    ran_us = sum(t.ended_us - t.began_us for t in times)
    return StageSummary(
        stage=index,
        busy_share=_share(ran_us, wall_us),
        has_step_share=_share(covered_us(((t.ready_us, t.ended_us) for t in times), wall_us), wall_us),
        compute=spread(t.output_us - t.began_us for t in times),
        compute_total_us=sum(t.output_us - t.began_us for t in times),
        compute_cpu_share=_share(sum(t.compute_cpu_us for t in times), ran_us),
        hand_over=spread(t.handed_over_us - t.output_us for t in times),
        draft=spread(t.draft_us for t in times),
        queued=spread(t.began_us - t.plan_arrived_us for t in times),
        ready=spread(t.began_us - t.ready_us for t in times),
        wait_input=spread(t.wait_input_us for t in times),
        wait_send=spread(t.wait_send_us for t in times),
        hop=spread(hop_us(step, index) for step in trace.steps) if index else spread(()),
    )


def hop_us(step: Step, stage: int) -> float:
    """The previous stage's output to this one's input complete; at least 0, as the clocks know it only so well."""
    before: StageTimes = step.stages[stage - 1]
    return max(0.0, step.stages[stage].input_complete_us - before.output_us)


def covered_us(spans: Iterable[tuple[float, float]], at_most_us: float = math.inf) -> float:
    """Length of the union of (begin, end) spans."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        if end > reached:
            total += end - max(begin, reached)
            reached = end
    return min(total, at_most_us)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _followers(steps: Sequence[Step]) -> Iterator[tuple[Step, Step]]:
    """Each step that brought tokens, with the first one that needs one of them.

    A token is sampled behind the last known one of its sequence: every later step that names it needs that token.
    """
    naming: dict[int, list[Step]] = {}
    for step in steps:
        for sequence in step.sequences:
            naming.setdefault(sequence, []).append(step)
    for step in steps:
        later = (
            next((after for after in naming[sequence] if after.number > step.number), None) for sequence in step.sampled
        )
        first = min((after for after in later if after is not None), key=lambda s: s.number, default=None)
        if first is not None:
            yield step, first
