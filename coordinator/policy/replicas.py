"""How many pipelines there are, and which workers they share.

There are as many pipelines as the stage with the most replicas has workers. An operator sets the number of a stage's
replicas (`stagemesh scale`); otherwise it is the number of workers started for it (`--stage`). One replica more adds a
pipeline, which shares the stages that have fewer: first the serving pipelines reduce their share of the pages, then it
is formed. One replica fewer removes a pipeline: its requests finish there, or its gateways move them to another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from stagemesh.errors import ConfigError, Unavailable
from stagemesh.planning.limits import pages_per_sequence

from ..planning.choose import pinned, shared_holders
from ..values import Holder
from ..world.pipeline import Attempt, Pipeline
from ..world.world import UNLIMITED, World
from .plan import Goal, MeshPlan


def count_pipelines(world: World, plan: MeshPlan, now: float) -> None:
    """Sets the pipelines that should exist."""
    names = [p.pipeline_id for p in world.kept]
    plan.pipelines = names
    if world.had_pipelines and (world.restoring or world.settles(now)):
        return  # It is not known yet which workers are there.
    wanted = min(max(replicas_of(world, world.record.replicas)), _most_shares(world))
    if world.without_moves(now):
        wanted = min(wanted, max(1, len(world.kept)))
    leaving = [p.pipeline_id for p in world.pipelines.values() if p.leaving]
    names += leaving[: max(0, wanted - len(names))]
    numbers = (f"pipeline-{i}" for i in range(len(world.pipelines) + wanted))
    unused = (name for name in numbers if name not in world.pipelines)
    names += [next(unused) for _ in range(wanted - len(names))]
    kept = world.kept
    for _ in range(len(kept) - wanted):
        leaves = _least_of_use(world, kept)
        kept.remove(leaves)
        names.remove(leaves.pipeline_id)


def _most_shares(world: World) -> int:
    """The largest number of pipelines for which every worker has enough pages, as far as page counts are known."""
    need = pages_per_sequence(world.settings.limits)
    known = [world.pages.get((w.worker_id, w.incarnation), UNLIMITED) for w in world.workers.values()]
    return max(1, min([pages // need for pages in known] + [world.share_limit]))


def _least_of_use(world: World, pipelines: list[Pipeline]) -> Pipeline:
    """The pipeline to remove: one that does not serve, else one with a draining worker, else the newest."""

    def use(pipeline: Pipeline) -> tuple[bool, bool]:
        workers = [world.workers[plan.worker_id] for plan in pipeline.stages if plan.worker_id in world.workers]
        return pipeline.serving is not None, not any(world.drains(w) for w in workers)

    return min(reversed(pipelines), key=use)


def replicas_of(world: World, wishes: Mapping[int, int]) -> list[int]:
    """Number of workers that each stage should have. A lost worker counts for a while: it may come back."""
    bound = Counter(worker.pool for worker in world.staying)
    bound.update(stage for stage, _ in world.beliefs.missed.values())
    return [wishes.get(stage) or max(1, bound[stage]) for stage in range(world.settings.num_stages)]


def share(world: World, plan: MeshPlan, now: float) -> None:
    """Changes which workers a serving pipeline shares, or its share of their pages."""
    for pipeline, attempt in plan.unclaimed(world):
        if pipeline.gave_up is not None:
            continue
        elsewhere, why = _elsewhere(world, plan, pipeline, attempt)
        if not elsewhere and attempt.shares != world.num_shares:
            why = f"pages are split between {world.num_shares} pipeline(s)"
        if why:
            plan.goals[pipeline.pipeline_id] = Goal("share", with_workers(attempt, elsewhere), why)


def with_workers(attempt: Attempt, elsewhere: Mapping[int, str]) -> tuple[Holder, ...]:
    """The attempt's holders, but with the workers of `elsewhere` (stage -> worker) on its stages."""
    return tuple(Holder(elsewhere.get(plan.stage, plan.worker_id), plan.layers) for plan in attempt.stages)


def _elsewhere(world: World, plan: MeshPlan, pipeline: Pipeline, attempt: Attempt) -> tuple[dict[int, str], str]:
    """Stage -> the new worker that a pipeline should use there, and why."""
    if world.is_short(pipeline):
        return {}, ""
    lives = {(w.worker_id, w.incarnation) for w in world.staying}
    held, replicas = shared_holders(plan.others(world, pipeline), lives), replicas_of(world, world.record.replicas)
    pins = pinned(held, replicas, attempt.stages)
    if elsewhere := {s: name for s, name in pins.items() if attempt.stages[s].worker_id != name}:
        return elsewhere, "there are fewer replicas"
    listed = list(world.pipelines.values())
    later = {name for p in listed[listed.index(pipeline) + 1 :] for name in (plan.worker_id for plan in p.stages)}
    promised = plan.taken(pipeline.pipeline_id)
    for stage in attempt.stages:
        at = held.get(stage.stage, [])
        if stage.worker_id in at and len(at) < replicas[stage.stage] and stage.worker_id not in later:
            able = [w for w in world.spare() if w.can_take(stage) and w.worker_id not in promised]
            if able:
                best = max(able, key=lambda w: (w.pool == stage.stage, w.kept == stage.layers))
                return {stage.stage: best.worker_id}, "there are more replicas"
    one = dict(list(replaceable(world, pipeline, attempt).items())[:1])
    if one and any(p.main is None for p in plan.kept(world)):
        return one, "a worker that can hold any stage is needed elsewhere"
    return {}, ""


def replaceable(world: World, pipeline: Pipeline, attempt: Attempt) -> dict[int, str]:
    """Stage -> spare worker that is bound to it and can take it, where the present holder could hold other stages."""
    bound = {w.pool: w for w in world.spare() if w.pool >= 0}
    return {
        plan.stage: bound[plan.stage].worker_id
        for plan in attempt.stages
        if plan.stage in bound
        and world.worker_at(attempt, plan.stage).pool != plan.stage
        and bound[plan.stage].can_take(plan)
    }


# -- checks of an operator's request --------------------------------------------------------------------------------


def check_scale(world: World, stage: int, replicas: int, now: float) -> int:
    """How many pipelines there would be.

    Raises ConfigError when there are too few workers or pages, Unavailable while a pipeline is down or has too few
    stages.
    """
    stages = world.settings.num_stages
    if stage >= stages:
        raise ConfigError(f"there is no stage {stage}: the pipelines have stages 0 to {stages - 1}")
    if replicas > 1 and (old := world.without_moves(now)):
        raise ConfigError(f"{', '.join(old)} cannot share stages: finish the upgrade first")
    holding = {p.stages[stage].worker_id for p in world.kept if stage < len(p.stages)}
    down = [p.pipeline_id for p in world.kept if p.serving is None or world.is_short(p)]
    if replicas > max(1, len(holding)) and down:
        raise Unavailable(f"{', '.join(down)} must have all stages again first", retry_after_s=1)
    spare = {w.worker_id for w in world.spare() if w.may_hold(stage)}
    # A spare worker could also take its own stage from a worker that could then take this one.
    serving = [(p, p.serving) for p in world.kept]
    spare |= {n for p, a in serving if a for s, n in replaceable(world, p, a).items() if s != stage}
    if replicas > len(holding) + len(spare):
        more = replicas - len(holding) - len(spare)
        raise ConfigError(
            f"stage {stage} is held by {len(holding)} worker(s), and {len(spare)} more could take it: for {replicas} "
            f"replicas start {more} more with `stagemesh stage --stage {stage}`, or standbys"
        )
    each = replicas_of(world, {**world.record.replicas, stage: replicas})
    there = len(world.staying)
    if replicas > len(holding) and sum(each) > there:
        raise ConfigError(
            f"the stages would have {', '.join(map(str, each))} workers, {sum(each)} in all, and there are {there}: "
            f"start {sum(each) - there} more, or have fewer on another stage"
        )
    _check_pages(world, max(each))
    return max(each)


def _check_pages(world: World, pipelines: int) -> None:
    """Raises ConfigError if a worker's share of pages for each pipeline could not hold one sequence."""
    need, size = pages_per_sequence(world.settings.limits), world.settings.limits.page_size
    for attempt in (p.main for p in world.pipelines.values() if p.main is not None):
        for stage, loaded in attempt.loaded.items():
            pages = loaded.num_pages * attempt.shares // pipelines
            if pages < need:
                raise ConfigError(
                    f"worker {attempt.stages[stage].worker_id} would have {pages} KV pages of {size} tokens for each "
                    f"of {pipelines} pipelines, and one sequence of --max-model-len needs {need}: give the workers "
                    "more (--kv-cache-gib, --num-kv-pages)"
                )
