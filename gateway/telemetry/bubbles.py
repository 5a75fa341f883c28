"""Sums up what each stage spent its time on, from the timings in step results. This shows the pipeline's bubbles.

Sums of our own and not Prometheus counters: a counter's lock costs more than all of this, for every result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from stagemesh.protos.v1 import types_pb2


@dataclass
class StageTime:
    """Sums over the steps of one stage."""

    steps: int = 0
    wait_input_us: int = 0
    compute_us: int = 0
    wait_send_us: int = 0


class Bubbles(Collector):
    """A Prometheus collector of every stage's time, by what it was spent on."""

    def __init__(self) -> None:
        self._stages: defaultdict[int, StageTime] = defaultdict(StageTime)

    def add(self, stage: int, timing: types_pb2.StepTiming) -> None:
        """Adds one step of one stage."""
        sums = self._stages[stage]
        sums.steps += 1
        sums.wait_input_us += timing.wait_input_us
        sums.compute_us += timing.compute_us
        sums.wait_send_us += timing.wait_send_us

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics."""
        steps = CounterMetricFamily("stagemesh_stage_steps", "Steps a stage has run.", labels=["stage"])
        seconds = CounterMetricFamily(
            "stagemesh_stage_seconds", "Seconds of a stage's steps, by what they went to.", labels=["stage", "spent_on"]
        )
        for stage, sums in sorted(self._stages.items()):
            steps.add_metric([str(stage)], sums.steps)
            for spent_on in ("wait_input", "compute", "wait_send"):
                seconds.add_metric([str(stage), spent_on], getattr(sums, f"{spent_on}_us") * 1e-6)
        yield steps
        yield seconds
