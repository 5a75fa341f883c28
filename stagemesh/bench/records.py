"""Reads the gateway's records of steps, and converts all times to the gateway's clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
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
        """When the output was sent. The rest of the step is the draft model's."""
        return self.ended_us - self.draft_us

    @property
    def ready_us(self) -> float:
        """When plan, input and credit were all there, so that the step waited for the engine alone."""
        if self.wait_send_us > 0:
            return self.began_us  # The credit came last.
        return min(self.began_us, max(self.plan_arrived_us, self.input_complete_us))


@dataclass(frozen=True)
class Step:
    """One step of the trace, on the gateway's clock, microseconds."""

    number: int
    planned_us: float
    sent_us: float
    received_us: float
    delivered_us: float
    sequences: tuple[int, ...]
    sampled: tuple[int, ...]
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
    except (KeyError, TypeError, IndexError) as e:
        raise InvalidRequest(
            f"the gateway's trace records cannot be read ({type(e).__name__}: {e}); is it of the same release?"
        ) from e


def _read(raw: Mapping[str, Any]) -> Trace:
    (pipeline_id, epoch), count = Counter((s["pipeline_id"], s["epoch"]) for s in raw["steps"]).most_common(1)[0]
    steps = [s for s in raw["steps"] if (s["pipeline_id"], s["epoch"]) == (pipeline_id, epoch)]
    pipeline = next(p for p in raw["pipelines"] if (p["pipeline_id"], p["epoch"]) == (pipeline_id, epoch))
    columns = raw["stage_columns"]
    told = [[dict(zip(columns, values, strict=True)) for values in step["stages"]] for step in steps]
    clocks = tuple(
        estimate(
            [
                Exchange(
                    step["sent_us"],
                    stages[i]["plan_arrived_us"],
                    stages[i]["result_sent_us"],
                    stages[i]["result_received_us"],
                )
                for step, stages in zip(steps, told, strict=True)
            ]
        )
        for i in range(len(pipeline["stages"]))
    )
    return Trace(
        model=pipeline["model"],
        pipeline_id=pipeline_id,
        epoch=epoch,
        stages=tuple(StageInfo(**{**s, "layers": tuple(s["layers"])}) for s in pipeline["stages"]),
        steps=tuple(
            sorted(
                (_step(step, stages, clocks) for step, stages in zip(steps, told, strict=True)),
                key=lambda step: step.number,
            )
        ),
        clocks=clocks,
        left_out=len(raw["steps"]) - count,
        gateway_pid=raw["gateway"]["pid"],
        boot_id=raw["gateway"]["boot_id"],
    )


def _step(step: Mapping[str, Any], stages: list[dict[str, Any]], clocks: tuple[ClockOffset, ...]) -> Step:
    return Step(
        number=step["step"],
        planned_us=step["planned_us"],
        sent_us=step["sent_us"],
        received_us=step["received_us"],
        delivered_us=step["delivered_us"],
        sequences=tuple(step["sequences"]),
        sampled=tuple(step["sampled"]),
        tokens=step["tokens"],
        prefill_tokens=step["prefill_tokens"],
        stages=tuple(
            StageTimes(**{k: v - clock.offset_us if k in ON_STAGE_CLOCK else v for k, v in told.items()})
            for told, clock in zip(stages, clocks, strict=True)
        ),
    )
