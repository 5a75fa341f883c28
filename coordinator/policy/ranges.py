"""Other layer ranges that an operator, or `rebalance`, wants the stages to hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagemesh.errors import ConfigError, Unavailable

from ..planning.advice import GAIN, Advice, advise, better_worker
from ..planning.cost import kinds
from ..planning.partition import partition
from ..values import Holder, Range
from ..world.pipeline import Pipeline, State
from ..world.world import World
from .plan import Goal, MeshPlan

LOADS = 3
"""Ranges that failed to load so often, for reasons of the moment, are given up."""


def rebalance(world: World, plan: MeshPlan, now: float) -> None:
    """Layers move by themselves (`--rebalance auto`): what measured steps advise for some time becomes a wish,
    where nothing else changes."""
    if not world.settings.rebalance or world.wanted_ranges is not None:
        return
    if any(p.beside for p in world.pipelines.values()):
        return
    for pipeline in plan.kept(world):
        if pipeline.serving is not None and (ripe := pipeline.steps.ripe) is not None:
            plan.counts = tuple(last - first for first, last in ripe.ranges)
            return


def ranges(world: World, plan: MeshPlan, now: float) -> None:
    """Pipelines of all stages that serve with other ranges than are wanted. What cannot be had is wanted no more."""
    wanted = world.wanted_ranges
    if wanted is None:
        return
    gave_up = next((p.gave_up for p in plan.kept(world) if p.gave_up and p.gave_up.policy == "ranges"), None)
    if gave_up is not None or world.load_failures >= LOADS:
        plan.drop_counts = plan.drop_counts or (gave_up.why if gave_up is not None else world.cannot_load)
        return
    for pipeline, attempt in plan.unclaimed(world):
        if len(attempt.stages) == len(wanted) and attempt.ranges != wanted:
            holders = tuple(Holder(name, layers) for name, layers in zip(attempt.workers, wanted, strict=True))
            plan.goals[pipeline.pipeline_id] = Goal("ranges", holders, "other ranges are wanted")


def ranges_for(world: World, counts: Sequence[int], now: float) -> tuple[Range, ...]:
    """Ranges of so many layers; no counts: the best by measured steps, else by the cost model.

    Raises ConfigError when they do not fit the model or the workers, Unavailable when nothing serves.
    """
    whole = (p for p in world.pipelines.values() if len(p.stages) == world.settings.num_stages)
    pipeline = next((p for p in whole if p.state is State.SERVING), None)
    if pipeline is None or pipeline.main is None:
        again_s = world.timing.retry_max_s
        raise Unavailable("no pipeline of all stages serves whose layers could move", retry_after_s=again_s)
    if not counts and (found := advice(world, pipeline, now)) is not None:
        return found.ranges
    return tuple(partition(world.target.cost, kinds(world.members(pipeline.main)), counts or None))


def advice(world: World, pipeline: Pipeline, now: float) -> Advice | None:
    """The ranges that would be best by what steps take now; None while that is not known."""
    attempt = pipeline.serving
    if attempt is None or pipeline.state is not State.SERVING or len(attempt.stages) != world.settings.num_stages:
        return None
    seconds = pipeline.steps.seconds(attempt.epoch, len(attempt.stages), now, world.timing)
    if seconds is None:
        return None
    try:
        return advise(world.target.cost, kinds(world.members(attempt)), attempt.ranges, seconds)
    except ConfigError:
        return None


def advices(world: World, now: float) -> Iterator[str]:
    """What would make the pipelines faster, for people."""
    for pipeline in world.pipelines.values():
        attempt = pipeline.serving
        if attempt is None or pipeline.state is not State.SERVING:
            continue
        found = advice(world, pipeline, now)
        if found is not None and found.gain >= GAIN:
            counts = ",".join(str(last - first) for first, last in found.ranges)
            yield (
                f"with {counts} layers the slowest stage of {pipeline.pipeline_id} is expected to take "
                f"{found.then_s * 1000:.1f} ms a step, not {found.now_s * 1000:.1f}: stagemesh repartition {counts}"
            )
        used = world.used(pipeline) | set(attempt.workers)
        spare = [w.info for w in world.staying if w.worker_id not in used]
        better = better_worker(world.target.cost, world.members(attempt), attempt.ranges, spare)
        if better is not None:
            yield (
                f"with {better.spare} in the place of {better.member} the slowest stage of {pipeline.pipeline_id} is "
                f"expected to be {better.faster:.1f} times as fast: stagemesh drain {better.member}, then stagemesh "
                "repartition auto"
            )
