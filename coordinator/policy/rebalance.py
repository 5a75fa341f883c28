"""Advice from measured steps: other layer ranges, or a better worker. `--rebalance auto` applies the ranges."""

from __future__ import annotations

from collections.abc import Iterator

from stagemesh.errors import ConfigError

from ..planning.advice import GAIN, Advice, advise, better_worker
from ..planning.kinds import kinds
from ..world.pipeline import Pipeline, State
from ..world.world import World
from .plan import MeshPlan


def rebalance(world: World, plan: MeshPlan, now: float) -> None:
    """With `--rebalance auto`: asks for the ranges that measured steps have advised for some time, unless something
    else is changing."""
    if not world.settings.rebalance or world.wanted_ranges is not None:
        return
    if any(p.beside for p in world.pipelines.values()):
        return
    for pipeline in plan.kept(world):
        if pipeline.serving is not None and (ripe := pipeline.steps.ripe) is not None:
            plan.counts = tuple(last - first for first, last in ripe.ranges)
            return


def advice(world: World, pipeline: Pipeline, now: float) -> Advice | None:
    """The best ranges by the step times measured now. None if there are no fresh measurements."""
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
    """Sentences for operators on what would make the pipelines faster."""
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
