"""Summarizes where the time of a trace's steps went: per stage, in the gateway, and of a whole step. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .records import Step, Trace

NONE = math.nan
"""Value for a time that a step does not have."""
STEP = "a step, planned to delivered"


@dataclass(frozen=True)
class Spread:
    """Median and 99th percentile in milliseconds; NaN without values."""

    p50_ms: float
    p99_ms: float


def spread(values_us: Iterable[float]) -> Spread:
    """Returns percentiles of microseconds, by the nearest rank. NaN values do not count."""
    ordered = sorted(value for value in values_us if not math.isnan(value))
    if not ordered:
        return Spread(math.nan, math.nan)
    pick = [ordered[math.ceil(q * len(ordered)) - 1] / 1000 for q in (0.5, 0.99)]
    return Spread(pick[0], pick[1])


@dataclass(frozen=True)
class StageSummary:
    """One stage over the trace. Shares are of its wall time, from its first step's start to its last step's end."""

    stage: int
    busy_share: float
    """Share in which it ran a step: computed it, or sent its output."""
    has_step_share: float
    """Share in which it ran a step or had one ready (plan, input and credit were there)."""
    compute_cpu_share: float
    """CPU time of the rank divided by the wall time of its steps. If it is below the number of threads, other work had
    the cores."""
    compute_total_us: float
    times: dict[str, Spread]
    """Times by column of the table; see `stage_times`."""


@dataclass(frozen=True)
class Summary:
    """The whole trace."""

    steps: int
    wall_us: float
    tokens: int
    """Number of generated tokens."""
    rows: float
    """Mean number of rows in a step."""
    prefill_share: float
    """Share of prefill in all computed positions."""
    stages: tuple[StageSummary, ...]
    times: dict[str, Spread]
    """Times by line of the table; see `gateway_times`."""

    @property
    def slowest(self) -> StageSummary:
        """The stage that computed longest."""
        return max(self.stages, key=lambda stage: stage.compute_total_us)


def summarize(trace: Trace) -> Summary:
    """Summarizes a trace, which must have at least one step."""
    steps = trace.steps
    return Summary(
        steps=len(steps),
        wall_us=max(s.delivered_us for s in steps) - min(s.planned_us for s in steps),
        tokens=sum(len(step.sampled) for step in steps),
        rows=sum(len(step.sequences) for step in steps) / len(steps),
        prefill_share=sum(step.prefill_tokens for step in steps) / sum(step.tokens for step in steps),
        stages=tuple(_stage(trace, i) for i in range(len(trace.stages))),
        times=_spreads([gateway_times(step, after) for step, after in _followers(steps)]),
    )


def _stage(trace: Trace, index: int) -> StageSummary:
    times = [step.stages[index] for step in trace.steps]
    wall_us = max(t.ended_us for t in times) - min(t.began_us for t in times)
    ran_us = sum(t.ended_us - t.began_us for t in times)
    return StageSummary(
        stage=index,
        busy_share=_share(ran_us, wall_us),
        has_step_share=_share(covered_us(((t.ready_us, t.ended_us) for t in times), wall_us), wall_us),
        compute_cpu_share=_share(sum(t.compute_cpu_us for t in times), ran_us),
        compute_total_us=sum(t.output_us - t.began_us for t in times),
        times=_spreads([stage_times(step, index) for step in trace.steps]),
    )


def stage_times(step: Step, stage: int) -> dict[str, float]:
    """Returns the times of one step on one stage, in microseconds; docs/tracing.md describes each."""
    t = step.stages[stage]
    return {
        "compute": t.output_us - t.began_us,
        "hand over": t.handed_over_us - t.output_us,
        "guess": t.draft_us,
        # At least 0, since clocks are only known roughly.
        "hop in": max(0.0, t.input_complete_us - step.stages[stage - 1].output_us) if stage else NONE,
        "wait input": t.wait_input_us,
        "wait send": t.wait_send_us,
        "plan waits": t.began_us - t.plan_arrived_us,
        "ready waits": t.began_us - t.ready_us,
    }


def gateway_times(step: Step, after: Step | None) -> dict[str, float]:
    """Returns the times of one step as the gateway sees it, in microseconds.

    `after`: the next step with a row of a sequence for which this step sampled a token. The last two times are 0 if its
    plan was there before, and only waited for the token.
    """
    first, last = step.stages[0], step.stages[-1]
    replan = turnaround = NONE
    if after is not None:
        replan = max(0.0, after.planned_us - step.delivered_us)
        turnaround = max(0.0, after.stages[0].plan_arrived_us - last.ended_us)
    return {
        STEP: step.delivered_us - step.planned_us,
        "plan sent to taken by stage 0": first.plan_arrived_us - step.sent_us,
        "last stage's end to result received": step.received_us - last.ended_us,
        "result received to tokens delivered": step.delivered_us - step.received_us,
        "tokens delivered to next plan of a row": replan,
        "turnaround: last stage's end to that plan taken by stage 0": turnaround,
    }


def _spreads(steps: Sequence[dict[str, float]]) -> dict[str, Spread]:
    return {name: spread(step[name] for step in steps) for name in steps[0]}


def covered_us(spans: Iterable[tuple[float, float]], at_most_us: float = math.inf) -> float:
    """Returns the length of the union of (begin, end) spans."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        if end > reached:
            total += end - max(begin, reached)
            reached = end
    return min(total, at_most_us)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _followers(steps: Sequence[Step]) -> Iterator[tuple[Step, Step | None]]:
    """Yields each step, from the last one, with the next step that has a row of a sequence for which it sampled."""
    later: dict[int, Step] = {}
    for step in reversed(steps):
        yield step, min((later[s] for s in step.sampled if s in later), key=lambda s: s.step, default=None)
        later.update(dict.fromkeys(step.sequences, step))
