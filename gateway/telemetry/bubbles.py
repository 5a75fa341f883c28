"""Sums up what each stage spent its time on, from the timings in step results. This shows the pipeline's bubbles.

Sums of our own and not Prometheus counters: a counter's lock costs more than all of this, for every result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from stagemesh.protos.v1 import types_pb2


class Bubbles(Collector):
    """A Prometheus collector of every stage's time, by what it was spent on."""

    def __init__(self) -> None:
        self._steps = defaultdict[int, int](int)
        self._spent_us = defaultdict[tuple[int, str], int](int)

    def add(self, stage: int, timing: types_pb2.StepTiming) -> None:
        """Adds one step of one stage."""
        self._steps[stage] += 1
        self._spent_us[stage, "wait_input"] += timing.wait_input_us
        self._spent_us[stage, "compute"] += timing.compute_us
        self._spent_us[stage, "wait_send"] += timing.wait_send_us

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics."""
        steps = CounterMetricFamily("stagemesh_stage_steps", "Steps a stage has run.", labels=["stage"])
        seconds = CounterMetricFamily(
            "stagemesh_stage_seconds", "Seconds of a stage's steps, by what they went to.", labels=["stage", "spent_on"]
        )
        for stage, count in sorted(self._steps.items()):
            steps.add_metric([str(stage)], count)
        for (stage, spent_on), spent_us in sorted(self._spent_us.items()):
            seconds.add_metric([str(stage), spent_on], spent_us * 1e-6)
        yield steps
        yield seconds
