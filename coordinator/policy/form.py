"""Places the stages of a pipeline that does not serve: at first, and after a loss, when a standby takes a lost
worker's stage. Other policies also use `place`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stagemesh.errors import ConfigError

from ..planning.choose import choose_apart, choose_beside, pinned, shared_holders
from ..planning.target import CannotForm, Target
from ..planning.transport import transport
from ..values import Holders, StagePlan
from ..world.pipeline import Pipeline
from ..world.worker import Worker
from ..world.world import World
from .plan import Goal, MeshPlan
from .replicas import replicas_of


def form(world: World, plan: MeshPlan, now: float) -> None:
    """Sets a goal for each pipeline that does not serve, once its pause is over and no other pipeline must go first."""
    for pipeline in plan.kept(world):
        if not _is_due(world, pipeline, now):
            continue
        try:
            plan.goals[pipeline.pipeline_id] = place(world, plan, pipeline, pipeline.last_stages)
        except CannotForm as e:
            plan.goals[pipeline.pipeline_id] = Goal("form", why=e.reason, final=e.final)


def _is_due(world: World, pipeline: Pipeline, now: float) -> bool:
    if pipeline.restored:
        return False
    if pipeline.main is not None and (not pipeline.main.fault or now < pipeline.retry_at):
        return False
    others = [p for p in world.pipelines.values() if p is not pipeline]
    # The others first reduce their share of the pages. One that waits for its next attempt gets its share then.
    owing = any(p.main and not p.main.fault and p.main.shares < world.num_shares for p in others)
    # Pipelines from before a restart may hold workers that have not reported yet.
    return not owing and not any(p.restored for p in others)


def place(
    world: World,
    plan: MeshPlan,
    pipeline: Pipeline,
    previous: Sequence[StagePlan],
    without: frozenset[str] = frozenset(),
) -> Goal:
    """The workers and layers for `pipeline`. `previous` stages keep their worker and layers if possible.

    Workers that drain, that the plan promises to other pipelines, or that are in `without`, get nothing. If the wanted
    layer counts do not fit any more (the workers have less memory now, say), those of the settings apply. Raises
    CannotForm.
    """

    def compute() -> Goal:
        try:
            return _place(world, plan, pipeline, previous, without, world.target)
        except CannotForm as e:
            if world.record.counts is None or not isinstance(e.__cause__, ConfigError):
                raise
            found = _place(world, plan, pipeline, previous, without, world.settings)
            return replace(found, drops_counts=f"they cannot be had any more: {e.reason}")

    name = pipeline.pipeline_id
    key = "place", name, plan.taken(name), without, tuple(plan.pipelines), tuple(previous)
    return world.remember(key, compute)


def _place(
    world: World,
    plan: MeshPlan,
    pipeline: Pipeline,
    previous: Sequence[StagePlan],
    without: frozenset[str],
    target: Target,
) -> Goal:
    taken, others = plan.taken(pipeline.pipeline_id), plan.others(world, pipeline)
    staying = [w for w in world.staying if w.worker_id not in without]
    busy = world.used(pipeline) | taken
    free = [w for w in staying if w.worker_id not in busy]
    if not any(others):
        return Goal("form", _whole(world, target, free, previous))
    # A pipeline with too few stages is the only one, even while it moves to all of them: that move may fail.
    if any(world.is_short(p) for p in world.pipelines.values() if p is not pipeline):
        raise CannotForm("it waits until the others have all their stages again", final=False)
    # Stages that have fewer replicas than there are pipelines are shared with the others.
    ranges = [stage.layers for stage in next(stages for stages in others if stages)]
    lives = {(w.worker_id, w.incarnation) for w in staying}
    pins = pinned(shared_holders(others, lives), replicas_of(world, world.record.replicas), previous)
    shared = dict(zip(pins, world.candidates(world.workers[name] for name in pins.values()), strict=True))
    try:
        return Goal("form", _linked(world, choose_beside(target, world.candidates(free), shared, ranges, previous)))
    except CannotForm:
        if taken or not _may_take_from_others(world, pipeline):
            raise
    # Nothing serves, so this pipeline takes the workers that were meant for others.
    names = tuple(name for name in world.pipelines if name != pipeline.pipeline_id)
    return Goal("form", _whole(world, target, staying, previous), takes_down=names)


def _whole(world: World, target: Target, workers: Sequence[Worker], previous: Sequence[StagePlan]) -> Holders:
    """All stages on `workers`, none shared with another pipeline."""
    beliefs = world.beliefs
    chosen = choose_apart(target, world.candidates(workers), previous, beliefs.apart.keys(), beliefs.away.keys())
    return _linked(world, chosen)


def _linked(world: World, holders: Holders) -> Holders:
    """Returns `holders`. Raises CannotForm if a link between two of them has no transport."""
    members = [world.workers[holder.worker_id].info for holder in holders]
    for sender, receiver in zip(members, [*members[1:], *members[:1]], strict=True):
        if sender is not receiver:
            transport(world.settings.transport, sender, receiver, ucx_failed=world.ucx_failure(sender, receiver))
    return holders


def _may_take_from_others(world: World, pipeline: Pipeline) -> bool:
    others = [p for p in world.pipelines.values() if p is not pipeline]
    return not any(p.serving for p in world.pipelines.values()) and not any(
        p.main is not None and p.main.is_being_made for p in others
    )
