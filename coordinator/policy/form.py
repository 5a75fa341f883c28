"""Who holds what in a pipeline that does not serve. `place` is also how other policies find a place for a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stagemesh.errors import ConfigError

from ..planning.choose import choose_apart
from ..planning.sharing import choose_beside, pinned, shared_holders
from ..planning.target import CannotForm, Target
from ..planning.transport import check_transports
from ..values import Holders, StagePlan
from ..world.pipeline import Pipeline
from ..world.worker import Worker
from ..world.world import World
from .plan import Goal, MeshPlan
from .replicas import replicas_of


@dataclass(frozen=True)
class Place:
    """Who is to hold what."""

    holders: Holders
    takes_down: tuple[str, ...] = ()
    """Pipelines that give up their workers for it."""
    drops_counts: str = ""
    """Why the layer counts that are wanted could not be kept."""


def form(world: World, plan: MeshPlan, now: float) -> None:
    """Pipelines that do not serve and may try: after a pause, and when those that go first have what they need."""
    for pipeline in plan.kept(world):
        if not _is_due(world, pipeline, now):
            continue
        try:
            found = place(world, plan, pipeline, pipeline.last_stages)
        except CannotForm as e:
            plan.goals[pipeline.pipeline_id] = Goal("form", why=e.reason, final=e.final)
        else:
            plan.drop_counts = found.drops_counts or plan.drop_counts
            plan.goals[pipeline.pipeline_id] = Goal("form", found.holders, takes_down=found.takes_down)


def _is_due(world: World, pipeline: Pipeline, now: float) -> bool:
    if pipeline.restored:
        return False
    if pipeline.main is not None and (not pipeline.main.fault or now < pipeline.retry_at):
        return False
    others = [p for p in world.pipelines.values() if p is not pipeline]
    # First the others do with a smaller part of their workers' pages. One that waits to try again gets its part then.
    owing = any(p.main and not p.main.fault and p.main.shares < world.num_shares for p in others)
    # Pipelines from before a restart hold workers that nobody has told of yet.
    return not owing and not any(p.restored for p in others)


def place(
    world: World,
    plan: MeshPlan,
    pipeline: Pipeline,
    previous: Sequence[StagePlan],
    without: frozenset[str] = frozenset(),
) -> Place:
    """Who is to hold what in `pipeline`; `previous` stages keep their worker and layers where they can.

    Workers that drain, are promised to others by the plan, or stand in `without` hold nothing. Where the layer counts
    that are wanted cannot be had any more (they were wanted of workers with more memory, say), those of the settings
    hold. Raises CannotForm.
    """
    taken = plan.taken(pipeline.pipeline_id)
    staying = [w for w in world.staying if w.worker_id not in without]
    others = plan.others(world, pipeline)

    def compute() -> Place:
        try:
            return _place(world, staying, taken, pipeline, others, previous, world.target)
        except CannotForm as e:
            if world.record.counts is None or not isinstance(e.__cause__, ConfigError):
                raise
            found = _place(world, staying, taken, pipeline, others, previous, world.settings)
            return replace(found, drops_counts=f"they cannot be had any more: {e.reason}")

    key = "place", pipeline.pipeline_id, taken, without, tuple(plan.pipelines), tuple(previous)
    return world.remember(key, compute)


def _place(
    world: World,
    staying: Sequence[Worker],
    taken: frozenset[str],
    pipeline: Pipeline,
    others: Sequence[Sequence[StagePlan]],
    previous: Sequence[StagePlan],
    target: Target,
) -> Place:
    busy = world.used(pipeline) | taken
    free = [w for w in staying if w.worker_id not in busy]
    if not any(others):
        return Place(_whole(world, target, free, previous))
    # A pipeline of fewer stages has none beside it, also where it is about to have all of them: that may fail.
    if any(world.is_short(p) for p in world.pipelines.values() if p is not pipeline):
        raise CannotForm("it waits until the others have all their stages again", final=False)
    try:
        return Place(_beside(world, target, staying, free, others, previous))
    except CannotForm:
        if taken or not _may_take_from_others(world, pipeline):
            raise
    # Nothing serves: what another pipeline was to have beside this one is better used here.
    names = tuple(name for name in world.pipelines if name != pipeline.pipeline_id)
    return Place(_whole(world, target, staying, previous), takes_down=names)


def _whole(world: World, target: Target, workers: Sequence[Worker], previous: Sequence[StagePlan]) -> Holders:
    """All stages from `workers`, none of them shared."""
    beliefs = world.beliefs
    chosen = choose_apart(target, world.candidates(workers), previous, beliefs.apart.keys(), beliefs.away.keys())
    return _linked(world, chosen)


def _beside(
    world: World,
    target: Target,
    staying: Sequence[Worker],
    free: Sequence[Worker],
    others: Sequence[Sequence[StagePlan]],
    previous: Sequence[StagePlan],
) -> Holders:
    """Stages that have fewer replicas than there are pipelines are shared with the others."""
    ranges = [stage.layers for stage in next(stages for stages in others if stages)]
    lives = {(w.worker_id, w.incarnation) for w in staying}
    pins = pinned(shared_holders(others, lives), replicas_of(world, world.record.replicas), previous)
    shared = world.candidates(world.workers[name] for name in pins.values())
    chosen = choose_beside(target, world.candidates(free), dict(zip(pins, shared, strict=True)), ranges, previous)
    return _linked(world, chosen)


def _linked(world: World, holders: Holders) -> Holders:
    """The same, if every link between them has a transport. Raises CannotForm."""
    members = [world.workers[holder.worker_id].info for holder in holders]
    check_transports(world.settings.transport, members, world.ucx_failure)
    return holders


def _may_take_from_others(world: World, pipeline: Pipeline) -> bool:
    others = [p for p in world.pipelines.values() if p is not pipeline]
    return not any(p.serving for p in world.pipelines.values()) and not any(
        p.main is not None and p.main.is_being_made for p in others
    )
