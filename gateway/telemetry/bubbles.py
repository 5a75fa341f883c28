"""Sums up how each stage spent its time, from the timings in step results. This shows the pipeline's bubbles.

It uses plain sums instead of Prometheus counters, because a counter's lock would cost more than the rest per result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from stagemesh.protos.v1 import types_pb2

SPENT_ON = ("wait_input", "compute", "wait_send")


class Bubbles(Collector):
    """A Prometheus collector of the time that each stage spent on each activity."""

    def __init__(self) -> None:
        self._steps = defaultdict[int, int](int)
        self._spent_us = defaultdict[int, list[int]](lambda: [0] * len(SPENT_ON))

    def add(self, stage: int, timing: types_pb2.StepTiming) -> None:
        """Adds one step of one stage."""
        self._steps[stage] += 1
        spent_us = self._spent_us[stage]
        spent_us[0] += timing.wait_input_us
        spent_us[1] += timing.compute_us
        spent_us[2] += timing.wait_send_us

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics."""
        steps = CounterMetricFamily("stagemesh_stage_steps", "Steps a stage has run.", labels=["stage"])
        seconds = CounterMetricFamily(
            "stagemesh_stage_seconds", "Seconds of a stage's steps, by what they went to.", labels=["stage", "spent_on"]
        )
        for stage, count in sorted(self._steps.items()):
            steps.add_metric([str(stage)], count)
            for spent_on, spent_us in zip(SPENT_ON, self._spent_us[stage], strict=True):
                seconds.add_metric([str(stage), spent_on], spent_us * 1e-6)
        yield steps
        yield seconds
