"""Reads the gateway's records of steps, and converts all times to the gateway's clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from stagemesh.errors import InvalidRequest

from .clocks import ClockOffset, Exchange, estimate

ON_STAGE_CLOCK = ("plan_arrived_us", "input_complete_us", "began_us", "output_us", "ended_us", "result_sent_us")


@dataclass(frozen=True)
class StageTimes:
    """One step on one stage, microseconds. The names are those of `StepTiming`."""

    plan_arrived_us: float
    input_complete_us: float
    began_us: float
    output_us: float
    ended_us: float
    result_sent_us: float
    result_received_us: float
    wait_input_us: float
    compute_us: float
    wait_send_us: float
    compute_cpu_us: float
    draft_us: float

    @property
    def handed_over_us(self) -> float:
        """Time when the output was sent. The rest of the step belongs to the draft model."""
        return self.ended_us - self.draft_us

    @property
    def ready_us(self) -> float:
        """Time when plan, input and credit were all there, so that the step only waited for the engine."""
        if self.wait_send_us > 0:
            return self.began_us  # The credit came last.
        return min(self.began_us, max(self.plan_arrived_us, self.input_complete_us))


@dataclass(frozen=True)
class Step:
    """One step of the trace, on the gateway's clock, microseconds. The names are those of the gateway's record."""

    step: int
    """Number of the step."""
    planned_us: float
    sent_us: float
    received_us: float
    delivered_us: float
    sequences: Sequence[int]
    sampled: Sequence[int]
    """The sequences that got a token."""
    tokens: int
    prefill_tokens: int
    stages: tuple[StageTimes, ...]


@dataclass(frozen=True)
class StageInfo:
    """Description of a stage."""

    stage: int
    worker_id: str
    layers: tuple[int, int]
    tp_size: int
    device: str
    route: str


@dataclass(frozen=True)
class Trace:
    """Steps of one pipeline at one epoch, in the order in which they were planned."""

    model: str
    pipeline_id: str
    epoch: int
    stages: tuple[StageInfo, ...]
    steps: tuple[Step, ...]
    clocks: tuple[ClockOffset, ...]
    """Clock offset of each stage. It has been applied to all times."""
    left_out: int
    """Number of captured steps that belong to other epochs."""
    gateway_pid: int
    boot_id: str


def read(raw: Mapping[str, Any]) -> Trace:
    """Reads the answer of `POST /trace`. Raises InvalidRequest when its format is another release's."""
    try:
        return _read(raw)
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise InvalidRequest(
            f"the gateway's trace records cannot be read ({type(e).__name__}: {e}); is it of the same release?"
        ) from e


def _read(raw: Mapping[str, Any]) -> Trace:
    def key(of: Mapping[str, Any]) -> tuple[str, int]:
        return of["pipeline_id"], of["epoch"]

    (wanted, count), *_ = Counter(map(key, raw["steps"])).most_common(1)
    pipeline = next(p for p in raw["pipelines"] if key(p) == wanted)
    steps = [_step(record, raw["stage_columns"]) for record in raw["steps"] if key(record) == wanted]
    clocks = tuple(
        estimate([_exchange(step, step.stages[i]) for step in steps]) for i in range(len(pipeline["stages"]))
    )
    return Trace(
        model=pipeline["model"],
        pipeline_id=pipeline["pipeline_id"],
        epoch=pipeline["epoch"],
        stages=tuple(StageInfo(**{**s, "layers": tuple(s["layers"])}) for s in pipeline["stages"]),
        steps=tuple(sorted((_on_one_clock(step, clocks) for step in steps), key=lambda step: step.step)),
        clocks=clocks,
        left_out=len(raw["steps"]) - count,
        gateway_pid=raw["gateway"]["pid"],
        boot_id=raw["gateway"]["boot_id"],
    )


def _step(record: Mapping[str, Any], columns: Sequence[str]) -> Step:
    """Makes a step as it was recorded: each stage's times are on its own clock."""
    stages = tuple(StageTimes(**dict(zip(columns, values, strict=True))) for values in record["stages"])
    return Step(**{f.name: record[f.name] for f in fields(Step) if f.name != "stages"}, stages=stages)


def _exchange(step: Step, t: StageTimes) -> Exchange:
    return Exchange(step.sent_us, t.plan_arrived_us, t.result_sent_us, t.result_received_us)


def _on_one_clock(step: Step, clocks: Sequence[ClockOffset]) -> Step:
    stages = (
        replace(t, **{name: getattr(t, name) - clock.offset_us for name in ON_STAGE_CLOCK})
        for t, clock in zip(step.stages, clocks, strict=True)
    )
    return replace(step, stages=tuple(stages))
