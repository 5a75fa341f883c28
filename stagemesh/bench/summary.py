"""Summarizes where the time of a trace's steps went: per stage, in the gateway, and of a whole step. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .records import StageTimes, Step, Trace


@dataclass(frozen=True)
class Spread:
    """Median and 99th percentile in milliseconds; NaN without values."""

    p50_ms: float
    p99_ms: float


def spread(values_us: Iterable[float]) -> Spread:
    """Percentiles of microseconds, by the nearest rank."""
    ordered = sorted(values_us)
    if not ordered:
        return Spread(math.nan, math.nan)
    pick = [ordered[math.ceil(q * len(ordered)) - 1] / 1000 for q in (0.5, 0.99)]
    return Spread(pick[0], pick[1])


@dataclass(frozen=True)
class StageSummary:
    """One stage over the trace. Shares are of its wall time, from the start of its first step to the end of its
    last."""

    stage: int
    busy_share: float
    """Share in which it ran a step: computed it or handed its output over."""
    has_step_share: float
    """Share in which it ran a step or had one ready (plan, input and credit were there)."""
    compute: Spread
    """From the start of a step to its output."""
    compute_total_us: float
    compute_cpu_share: float
    """CPU time of the rank divided by the wall time of its steps. If it is below the number of threads, other work had
    the cores."""
    hand_over: Spread
    """From the output to the end of the send call."""
    draft: Spread
    """Time of the draft model; 0 without one."""
    queued: Spread
    """From the plan's arrival to the start of the step."""
    ready: Spread
    """Time in which plan, input and credit were there and the step had not started."""
    wait_input: Spread
    wait_send: Spread
    hop: Spread
    """From the previous stage's output to this stage's complete input; without values on the first stage."""


@dataclass(frozen=True)
class Summary:
    """The whole trace."""

    steps: int
    wall_us: float
    tokens: int
    """Tokens that were generated."""
    rows: float
    """Mean rows of a step."""
    prefill_share: float
    """Share of prefill in all computed positions."""
    stages: tuple[StageSummary, ...]
    step: Spread
    """From the plan to the delivery of its tokens."""
    plan_way: Spread
    """From sending a plan to its arrival at the first stage, which reads it between two steps."""
    result_way: Spread
    """From the end of the step on the last stage to its result's arrival at the gateway."""
    deliver: Spread
    """From a result's arrival to the delivery of its tokens."""
    replan: Spread
    """From the delivery of a step's tokens to the next plan with one of its sequences; 0 if that plan was sent
    before."""
    turnaround: Spread
    """From the end of a step on the last stage to the arrival at stage 0 of the next plan with one of its sequences.

    0 if that plan was there before and waited for the token alone.
    """

    @property
    def slowest(self) -> StageSummary:
        """The stage that computed longest."""
        return max(self.stages, key=lambda stage: stage.compute_total_us)


def summarize(trace: Trace) -> Summary:
    """Figures of a trace, which has one step at least."""
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
    """From the previous stage's output to this one's complete input; at least 0, since clocks are only known
    roughly."""
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
    """Pairs of a step that sampled tokens and the first later step that needs one of these.

    A sequence's token is needed by every later step that has a row of the sequence.
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
