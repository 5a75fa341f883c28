"""Moves stages away from workers that drain."""

from __future__ import annotations

from dataclasses import replace

from stagemesh.errors import ConfigError

from ..planning.target import CannotForm
from ..world.world import World
from .form import place
from .plan import MeshPlan


def drain(world: World, plan: MeshPlan, now: float) -> None:
    """Moves each stage of a serving pipeline that a draining worker holds.

    If no worker can take it and the drain is forced, the pipeline takes no new requests.
    """
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


def check_drain(world: World, worker_id: str) -> None:
    """Raises ConfigError if no other worker could take a stage that this one holds."""
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
                "standby first; or drain it with --force, and the pipeline takes no new requests until a worker comes"
            ) from e
