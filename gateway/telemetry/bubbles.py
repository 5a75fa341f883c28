"""Sums up what each stage spent its time on, from the timings in step results. This shows the pipeline's bubbles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from stagemesh.protos.v1 import types_pb2


@dataclass
class StageTime:
    """Sums over the steps of one stage."""

    steps: int = 0
    wait_input_s: float = 0.0
    compute_s: float = 0.0
    wait_send_s: float = 0.0


class Bubbles(Collector):
    """A Prometheus collector of every stage's time, by what it was spent on."""

    def __init__(self) -> None:
        self.stages: dict[int, StageTime] = {}

    def add(self, stage: int, timing: types_pb2.StepTiming) -> None:
        """Adds one step of one stage."""
        sums = self.stages.get(stage)
        if sums is None:
            sums = self.stages[stage] = StageTime()
        sums.steps += 1
        sums.wait_input_s += timing.wait_input_us * 1e-6
        sums.compute_s += timing.compute_us * 1e-6
        sums.wait_send_s += timing.wait_send_us * 1e-6

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics."""
        steps = CounterMetricFamily("stagemesh_stage_steps", "Steps a stage has run.", labels=["stage"])
        seconds = CounterMetricFamily(
            "stagemesh_stage_seconds", "Seconds of a stage's steps, by what they went to.", labels=["stage", "spent_on"]
        )
        for stage, sums in sorted(self.stages.items()):
            steps.add_metric([str(stage)], sums.steps)
            seconds.add_metric([str(stage), "wait_input"], sums.wait_input_s)
            seconds.add_metric([str(stage), "compute"], sums.compute_s)
            seconds.add_metric([str(stage), "wait_send"], sums.wait_send_s)
        yield steps
        yield seconds
