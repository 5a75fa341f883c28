"""Workers whose stages others are to take: those that drain, and those that a gateway does not reach though they renew
their lease."""

from __future__ import annotations

from dataclasses import replace

from stagemesh.errors import ConfigError

from ..planning.target import CannotForm
from ..world.world import World
from .form import place
from .plan import MeshPlan


def drain(world: World, plan: MeshPlan, now: float) -> None:
    """Pipelines that serve and have a stage on a worker that drains. Where nobody takes it nothing new is begun."""
    for pipeline, attempt in plan.unclaimed(world):
        leaving = [stage for stage in attempt.stages if world.drains(world.worker_at(attempt, stage.stage))]
        if not leaving:
            continue
        try:
            found = place(world, plan, pipeline, attempt.stages)
        except CannotForm:
            name = leaving[0].worker_id
            if name in world.record.forced:
                plan.drains[pipeline.pipeline_id] = f"stage {leaving[0].stage}: worker {name} drains"
        else:
            shown = ", ".join(f"stage {stage.stage} leaves worker {stage.worker_id}" for stage in leaving)
            plan.goals[pipeline.pipeline_id] = replace(found, policy="drain", why=f"{shown}, which drains", must=True)


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


def check_drain(world: World, worker_id: str) -> None:
    """Raises ConfigError where nobody could take a stage that this worker holds."""
    plan = MeshPlan([p.pipeline_id for p in world.kept])
    for pipeline in world.kept:
        stage = pipeline.stage_of(worker_id)
        if stage is None:
            continue
        try:
            place(world, plan, pipeline, pipeline.stages, without=frozenset((worker_id,)))
        except CannotForm as e:
            raise ConfigError(
                f"nobody can take stage {stage} of {pipeline.pipeline_id} from worker {worker_id}: {e.reason}. Start a "
                "standby first; or drain it with --force, and the pipeline takes nothing new until a worker comes"
            ) from e
