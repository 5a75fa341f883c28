"""Workers that a gateway does not reach, though they renew their lease: others take their place, if there are any."""

from __future__ import annotations

from ..planning.target import CannotForm
from ..world.world import World
from .form import place
from .plan import MeshPlan


def reach(world: World, plan: MeshPlan, now: float) -> None:
    """Pipelines that serve, and of which a gateway said that it does not reach some workers.

    Where nobody else can take their place nothing is changed for that gateway: others may reach them. One that reaches
    no worker at all is itself cut off.
    """
    for pipeline, attempt in plan.unclaimed(world):
        unreachable = pipeline.unreached[1]
        cut_off = len(attempt.stages) > 1 and set(attempt.workers) <= set(unreachable)
        if not unreachable or cut_off:
            continue
        try:
            found = place(world, plan, pipeline, attempt.stages)
        except CannotForm:
            continue
        if not any(holder.worker_id in unreachable for holder in found.holders):
            plan.interrupts.add(pipeline.pipeline_id)
