"""Replaces workers that a gateway does not reach, though they renew their lease."""

from __future__ import annotations

from ..planning.target import CannotForm
from ..world.world import World
from .form import place
from .plan import MeshPlan


def reach(world: World, plan: MeshPlan, now: float) -> None:
    """Interrupts a serving pipeline when a gateway does not reach some of its workers and others can replace them.

    If none can, nothing changes: other gateways may reach those workers. A gateway that reaches no worker at all is
    itself cut off.
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
