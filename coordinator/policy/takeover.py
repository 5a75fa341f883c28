"""When a stage's worker does not come back, the remaining workers hold all layers in fewer stages.

They load the missing layers, and every sequence is computed again. That is slower than with a standby, but requests go
on. When there are workers for all stages again, the pipeline moves to them while it serves.
"""

from __future__ import annotations

from functools import partial

from ..planning.choose import choose, choose_in_order
from ..planning.target import CannotForm
from ..values import Holders
from ..world.pipeline import Pipeline
from ..world.worker import Worker
from ..world.world import World
from .plan import Goal, MeshPlan


def give_back(world: World, plan: MeshPlan, now: float) -> None:
    """Moves a pipeline with too few stages back to all of them."""
    for pipeline, _ in plan.unclaimed(world):
        if not world.is_short(pipeline):
            continue
        try:
            holders = world.remember(("give back", pipeline.pipeline_id), partial(_all, world, pipeline))
        except CannotForm:
            continue
        why = "there are workers for all stages again"
        plan.goals[pipeline.pipeline_id] = Goal("give back", holders, why, must=True)


def take_over(world: World, plan: MeshPlan, now: float) -> None:
    """Forms a pipeline that has been down for long enough on the remaining workers."""
    for pipeline in plan.kept(world):
        goal = plan.goals.get(pipeline.pipeline_id)
        if goal is None or goal.holders or pipeline.restored or not _is_due(world, pipeline, now):
            continue
        if any(p is not pipeline and p.main is not None for p in world.pipelines.values()):
            continue  # Another pipeline runs the requests, or soon will.
        if any(other.holders for other in plan.goals.values()):
            continue
        holders = world.remember(("take over", pipeline.pipeline_id), partial(_fewer, world, pipeline))
        if holders:
            why = f"it goes on with {len(holders)} stages: no worker took the others' place"
            plan.goals[pipeline.pipeline_id] = Goal("take over", holders, why)


def _is_due(world: World, pipeline: Pipeline, now: float) -> bool:
    last = pipeline.last_stages
    if not last:
        return False  # It never served: its workers are being started.
    if len(last) < world.settings.num_stages and all(plan.worker_id in world.workers for plan in last):
        return True  # Its last attempt already had fewer stages, and their workers are there.
    return pipeline.main is None and now >= pipeline.down_since + world.settings.takeover_s


def _all(world: World, pipeline: Pipeline) -> Holders:
    return choose(world.target, world.candidates(_free(world, pipeline)), pipeline.stages)


def _free(world: World, pipeline: Pipeline) -> list[Worker]:
    used = world.used(pipeline)
    return [w for w in world.staying if w.worker_id not in used]


def _fewer(world: World, pipeline: Pipeline) -> Holders:
    """As many stages as possible, on workers of any pool, in the order in which they held layers.

    Empty if the workers cannot hold the model.
    """
    free = _free(world, pipeline)
    order = {plan.worker_id: plan.stage for plan in pipeline.last_stages}
    free.sort(key=lambda w: order.get(w.worker_id, w.pool))
    candidates = world.candidates(free)
    for count in range(min(world.settings.num_stages - 1, len(free)), 0, -1):
        try:
            return choose_in_order(world.settings, candidates, pipeline.last_stages, count)
        except CannotForm:
            continue
    return ()
