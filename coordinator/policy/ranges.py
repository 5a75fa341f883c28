"""Moves stages to the layer ranges that an operator, or the policy `rebalance`, asked for."""

from __future__ import annotations

from collections.abc import Sequence

from stagemesh.errors import Unavailable
from stagemesh.planning.partition import partition

from ..planning.kinds import kinds
from ..values import Holder, Range
from ..world.pipeline import State
from ..world.world import World
from .plan import Goal, MeshPlan
from .rebalance import advice

LOADS = 3
"""Ranges are given up after this many loads failed for temporary reasons."""


def ranges(world: World, plan: MeshPlan, now: float) -> None:
    """Gives the wanted ranges to each pipeline that has all stages and serves with others.

    Ranges that failed are dropped.
    """
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
    """Ranges with these layer counts. Without counts: the best by measured steps, else by the cost model.

    Raises ConfigError when they do not fit the model or the workers, Unavailable when no pipeline serves.
    """
    whole = (p for p in world.pipelines.values() if len(p.stages) == world.settings.num_stages)
    pipeline = next((p for p in whole if p.state is State.SERVING), None)
    if pipeline is None or pipeline.main is None:
        again_s = world.timing.retry_max_s
        raise Unavailable("no pipeline of all stages serves whose layers could move", retry_after_s=again_s)
    if not counts and (found := advice(world, pipeline, now)) is not None:
        return found.ranges
    return tuple(partition(world.target.cost, kinds(world.members(pipeline.main)), counts or None))
