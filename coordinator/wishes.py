"""What the stages shall hold: what an operator wants, and what measured steps advise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from stagemesh.errors import ConfigError, Unavailable

from . import actions, events
from . import values as v
from .cost import Kind, kinds
from .forming import RETRY_MAX_S
from .partition import partition
from .pipeline import Pipeline, State
from .planning import CannotForm, Choice
from .rebalance import GAIN, LOOK_S, Advice, StepTimes, advise, better_worker
from .standbys import Warmer

LOADS = 3
"""Layers that failed to load so often, for a reason of the moment, are given up."""


class Wishes(Warmer):
    """Layer ranges that are wanted and not there yet; how they come to be is the business of moves."""

    def __init__(self, *args: Any, wished: Sequence[int] | None = None, **named: Any) -> None:
        """`wished`: layers of each stage, as they were wanted before a restart."""
        super().__init__(*args, **named)
        self.ranges: tuple[v.Range, ...] | None = None
        """What an operator wants the stages to hold, and they do not yet."""
        self.given_up = ""
        """Why what an operator wanted last will not be."""
        self._partition_before = self._of_settings = self.target.layer_partition
        self._load_failures = 0
        self.step_times = {name: StepTimes() for name in self.pipelines}
        self.advices: list[str] = []
        """What would make the pipelines faster, for people."""
        self._advised_at = 0.0
        self._advised: dict[str, Advice] = {}
        """Pipeline -> what was known of its steps when other ranges were wanted."""
        if wished is not None:
            self.ranges = tuple(itertools.pairwise(itertools.accumulate(wished, initial=0)))
            self.target = replace(self.target, layer_partition=tuple(wished))

    def ranges_for(self, counts: Sequence[int]) -> tuple[v.Range, ...]:
        """Ranges of so many layers; none: what the cost model takes for the best.

        Raises ConfigError when they do not fit the model or the workers, Unavailable when nothing serves.
        """
        whole = (p for p in self.pipelines.values() if len(p.stages) == self.target.num_stages)
        pipeline = next((p for p in whole if p.state is State.SERVING), None)
        if pipeline is None:
            raise Unavailable("no pipeline of all stages serves whose layers could move", retry_after_s=RETRY_MAX_S)
        if not counts and (advice := self.advice(pipeline)) is not None:
            return advice.ranges
        return tuple(partition(self.target.cost, self._kinds(pipeline), counts or None))

    def _kinds(self, pipeline: Pipeline) -> list[Kind]:
        return kinds([self._worker_at(pipeline, plan.stage).info for plan in pipeline.stages])

    def advice(self, pipeline: Pipeline) -> Advice | None:
        """The ranges that would be best by what steps take now; None while that is not known."""
        seconds = self.step_times[pipeline.pipeline_id].seconds(pipeline.epoch, len(pipeline.stages), self._now)
        if pipeline.state is not State.SERVING or seconds is None or len(seconds) != self.target.num_stages:
            return None
        try:
            return advise(self.target.cost, self._kinds(pipeline), [plan.layers for plan in pipeline.stages], seconds)
        except ConfigError:
            return None

    def _advise_if_due(self) -> None:
        """Looks for what an operator could do about the speed."""
        if self._now < self._advised_at + LOOK_S:
            return
        self._advised_at = self._now
        said = [text for p in self.pipelines.values() if p.state is State.SERVING for text in self._advices(p)]
        if said != self.advices:
            self.advices = said
            self._publish()

    def _advices(self, pipeline: Pipeline) -> Iterator[str]:
        advice = self.advice(pipeline)
        if advice is not None and advice.gain >= GAIN:
            counts = ",".join(str(last - first) for first, last in advice.ranges)
            yield (
                f"with {counts} layers the slowest stage of {pipeline.pipeline_id} is expected to take "
                f"{advice.then_s * 1000:.1f} ms a step, not {advice.now_s * 1000:.1f}: stagemesh repartition {counts}"
            )
        members = [self._worker_at(pipeline, plan.stage).info for plan in pipeline.stages]
        busy = self._busy(pipeline) | {info.worker_id for info in members}
        spare = [w.info for name, w in self.workers.items() if name not in busy and not w.draining]
        better = better_worker(self.target.cost, members, [plan.layers for plan in pipeline.stages], spare)
        if better is not None:
            yield (
                f"with {better.spare} in the place of {better.member} the slowest stage of {pipeline.pipeline_id} is "
                f"expected to be {better.faster:.1f} times as fast: stagemesh drain {better.member}, then stagemesh "
                "repartition auto"
            )

    def _steps_measured(self, event: events.StepsMeasured) -> None:
        times = self.step_times.get(event.pipeline_id)
        if times is not None:
            times.note(event.gateway_id, event.epoch, list(event.seconds), self._now)

    def _rebalance_if_due(self, pipeline: Pipeline) -> None:
        times = self.step_times[pipeline.pipeline_id]
        if not self.target.rebalance or self.ranges is not None or not times.due(self._now):
            return
        advice = self.advice(pipeline)
        if advice is not None and times.judge(advice, self._now):
            self._log(
                f"the slowest stage of {pipeline.pipeline_id} takes {advice.now_s * 1000:.1f} ms a step, and is "
                f"expected to take {advice.then_s * 1000:.1f} ms with other ranges"
            )
            self._repartition(advice.ranges)

    def _repartition(self, ranges: tuple[v.Range, ...]) -> None:
        """An operator's wish; it holds for what is formed from now on as well."""
        if self.ranges is None:
            self._partition_before = self.target.layer_partition
        self.ranges, self.given_up = ranges, ""
        self._advised = {name: a for name, p in self.pipelines.items() if (a := self.advice(p)) is not None}
        self._load_failures = 0
        self._want(tuple(last - first for first, last in ranges))
        self._log("other ranges are wanted: " + _shown(ranges))

    def _want(self, counts: tuple[int, ...] | None) -> None:
        """From now on pipelines are formed so, also by a coordinator that comes after this one."""
        self.target = replace(self.target, layer_partition=counts)
        self._act(actions.PersistPartition(self.target.terms, counts))

    def _choose(self, pipeline: Pipeline, previous: Sequence[v.StagePlan]) -> list[Choice]:
        try:
            return super()._choose(pipeline, previous)
        except CannotForm as e:
            # Ranges that were wanted of workers with more memory, say, before all of them were started again.
            if self.target.layer_partition == self._of_settings or not isinstance(e.__cause__, ConfigError):
                raise
            self._partition_before = self._of_settings
            self._give_ranges_up(f"they cannot be had any more: {e}")
            return super()._choose(pipeline, previous)

    def _cannot_load(self, layers: v.Range, reason: str, *, final: bool) -> None:
        if self.ranges is not None and layers in self.ranges:
            self._load_failures += 1
            if final or self._load_failures >= LOADS:
                self._give_ranges_up(reason)

    def _give_ranges_up(self, why: str) -> None:
        self._log(f"the ranges stay as they are: {why}", warning=True)
        self.ranges, self.given_up = None, why
        self._want(self._partition_before)
        for times in self.step_times.values():
            times.rest(self._now)
        self._publish()

    def _wanted(self, pipeline: Pipeline, leaving: Sequence[v.StagePlan]) -> tuple[list[Choice], str]:
        """Who is to hold what, and why; nobody, if nothing is to change. Raises CannotForm."""
        if leaving:
            chosen = self._choose(pipeline, pipeline.stages)
            return chosen, ", ".join(f"stage {p.stage} leaves worker {p.worker_id}" for p in leaving) + ", which drains"
        serving = [p for p in self.pipelines.values() if p.state is State.SERVING]
        if self.ranges is not None and serving and all(_ranges(p) == self.ranges for p in serving):
            self.ranges = None
        if self.ranges is None or self.ranges == _ranges(pipeline) or len(self.ranges) != len(pipeline.stages):
            return [], ""
        workers = [self._worker_at(pipeline, plan.stage) for plan in pipeline.stages]
        return [Choice(w, r) for w, r in zip(workers, self.ranges, strict=True)], "other ranges are wanted"


def _ranges(pipeline: Pipeline) -> tuple[v.Range, ...]:
    return tuple(plan.layers for plan in pipeline.stages)


def _shown(ranges: Sequence[v.Range]) -> str:
    return ", ".join(f"{first}-{last - 1}" for first, last in ranges)
