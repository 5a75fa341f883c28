"""Standbys, the workers that hold no stage: which weights they load, and when a stage goes back to its own worker.

`form.py` decides that a standby takes a lost worker's stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stagemesh.protocol import MOVES

from ..values import Range, StagePlan
from ..world.pipeline import Attempt, Pipeline, State
from ..world.worker import Worker
from ..world.world import World
from .plan import Goal, MeshPlan
from .replicas import replaceable, with_workers


def release(world: World, plan: MeshPlan, now: float) -> None:
    """Gives a stage back to the worker that held it and has returned, if no spare worker can take any stage.

    Without a standby for any stage, the next loss would move two stages.
    """
    for pipeline, attempt in plan.unclaimed(world):
        if pipeline.gave_up is not None:
            continue
        if elsewhere := _back(world, pipeline, attempt, now):
            why = "a worker that can hold any stage should stand by"
            plan.goals[pipeline.pipeline_id] = Goal("release", with_workers(attempt, elsewhere), why)


def _back(world: World, pipeline: Pipeline, attempt: Attempt, now: float) -> dict[int, str]:
    drains = len(world.staying) < len(world.workers)
    if world.is_short(pipeline) or len(world.pipelines) > 1 or drains or not _is_settled(world, now):
        return {}
    if any(w.pool < 0 or w.any_stage for w in world.spare()):
        return {}
    for stage, name in replaceable(world, pipeline, attempt).items():
        holder, worker = world.worker_at(attempt, stage).info, world.workers[name].info
        # The stage's pages must be copied: without a copy, serving would stop now to prepare for a later loss.
        alike = holder.tp_size == worker.tp_size and worker.protocol >= MOVES and not world.without_moves(now)
        if world.beliefs.lost_with.get(name) == stage and alike:
            return {stage: name}
    return {}


def _is_settled(world: World, now: float) -> bool:
    """Whether the pages of lost stages have had time to be computed again."""
    return now >= max(p.serving_since for p in world.pipelines.values()) + world.timing.settled_s


def warm(world: World, plan: MeshPlan, now: float) -> None:
    """Has standbys load the stages that they may have to take, once the pipelines serve and have settled."""
    states = {p.state for p in plan.kept(world)}
    # A pipeline that is down because workers are missing does not stop the others' standbys from loading.
    if State.SERVING not in states or states & {State.FORMING, State.DRAINING}:
        return
    if not _is_settled(world, now):
        return
    stages = [stage for p in world.pipelines.values() for stage in p.stages]
    members = {stage.worker_id for stage in stages} | plan.taken("")
    standbys = [w for w in world.staying if w.worker_id not in members]
    plan.loads.update(copies(stages, standbys))


def copies(stages: Sequence[StagePlan], standbys: Sequence[Worker]) -> dict[str, Range]:
    """Worker -> the layers that it should have loaded.

    A standby that has a stage's layers keeps them. The others load the stage with the fewest copies. Among those they
    prefer the stage that they were started for, then the one with the most layers. A standby loads no stage outside its
    pool, and none that it failed to load.
    """
    wanted: dict[str, Range] = {}
    count: Counter[int] = Counter()

    for worker in standbys:
        kept = next((plan for plan in stages if plan.layers == worker.kept and worker.can_take(plan)), None)
        if kept is not None:
            wanted[worker.worker_id] = kept.layers
            count[kept.stage] += 1
    for worker in standbys:
        if worker.worker_id in wanted:
            continue

        def order(plan: StagePlan, pool: int = worker.pool) -> tuple[int, bool, int, int]:
            return count[plan.stage], plan.stage != pool, plan.layers[0] - plan.layers[1], plan.stage

        choice = min((plan for plan in stages if worker.can_take(plan)), key=order, default=None)
        if choice is not None:
            wanted[worker.worker_id] = choice.layers
            count[choice.stage] += 1
    return wanted
