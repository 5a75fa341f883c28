"""Brings the world to the desired mesh: begins, continues and ends attempts, and gives the orders for that.

DOWN --a place for every stage--> FORMING --every worker has activated--> SERVING --nobody takes a stage--> DRAINING
  ^                                 |  ^------------ a worker, link or order fails ------|-------------------|
  |------ no place for a stage -----|
"""

from __future__ import annotations

from collections.abc import Iterator

from stagemesh.protos.v1.coordinator_pb2 import RepartitionRequest

from ..observe import requests
from ..observe.faults import fail
from ..policy.plan import Goal, MeshPlan
from ..world.pipeline import Attempt, Leaving, Phase, Pipeline, State
from ..world.world import World
from . import actions, moves
from . import attempt as attempts
from .actions import Action
from .restart import settle_reported


def reconcile(world: World, plan: MeshPlan, now: float) -> Iterator[Action]:
    """Makes one pass. If it changes the world, it raises `world.version`, and another pass follows."""
    yield from (actions.Disconnect(address) for address in world.departed)
    world.departed.clear()
    yield from settle_reported(world, now)
    dropped = next((goal.drops_counts for goal in plan.goals.values() if goal.drops_counts), plan.drop_counts)
    if dropped:
        requests.drop_counts(world, dropped, now)
    elif plan.counts is not None and plan.counts != world.record.counts:
        requests.repartition(world, RepartitionRequest(counts=plan.counts), now)
    yield from _come_and_go(world, plan, now)
    for pipeline in list(world.pipelines.values()):
        yield from _pipeline(world, pipeline, plan, now)
    for worker_id, layers in plan.loads.items():
        yield from moves.load(world, world.workers[worker_id], layers, now)


# -- the number of pipelines ------------------------------------------------------------------------------------------


def _come_and_go(world: World, plan: MeshPlan, now: float) -> Iterator[Action]:
    for name in plan.pipelines:
        if name not in world.pipelines:
            epoch = world.record.epochs.setdefault(name, 0)
            world.pipelines[name] = Pipeline(name, epoch, reason="it is not formed yet")
            world.log(f"{name} is added; it shares stages with others")
            world.membership_changed()
    for pipeline in list(world.pipelines.values()):
        stays = pipeline.pipeline_id in plan.pipelines
        if stays and pipeline.leaving:
            pipeline.leaving, pipeline.reason = None, ""
            world.membership_changed()
        elif not stays and pipeline.leaving is None:
            pipeline.leaving = Leaving(now + world.timing.leave_s)
            pipeline.reason = "there are fewer replicas"
            world.log(f"gateways leave {pipeline.pipeline_id}: there are fewer replicas")
            yield from moves.end(world, pipeline)
            world.publish()
        if (leaving := pipeline.leaving) is None:
            continue
        all_left = world.watching(now) <= leaving.gateways
        if all_left or pipeline.state is not State.DRAINING or now > leaving.deadline:
            yield from _remove(world, pipeline)


def _remove(world: World, pipeline: Pipeline) -> Iterator[Action]:
    name = pipeline.pipeline_id
    yield from moves.end(world, pipeline)
    yield from _next_epoch(world, pipeline, keep=[], reason="the pipeline is removed")
    del world.pipelines[name]
    world.record.plans.pop(name, None)
    world.log(f"{name} is removed")
    world.membership_changed()


# -- one pipeline -----------------------------------------------------------------------------------------------------


def _pipeline(world: World, pipeline: Pipeline, plan: MeshPlan, now: float) -> Iterator[Action]:
    goal = plan.goals.get(pipeline.pipeline_id)
    yield from _end_what_failed(world, pipeline, plan, now)
    main = pipeline.main
    if main is not None and main.is_being_made:
        yield from _advance(world, pipeline, main, now)
    elif pipeline.leaving:
        return
    elif (serving := pipeline.serving) is not None:
        why = plan.drains.get(pipeline.pipeline_id, "")
        if pipeline.drains != bool(why):
            pipeline.drains, pipeline.reason = bool(why), why
            world.publish()
        yield from moves.pursue(world, pipeline, serving, goal, now)
    elif goal is not None:
        yield from _form(world, pipeline, goal, now)


def _end_what_failed(world: World, pipeline: Pipeline, plan: MeshPlan, now: float) -> Iterator[Action]:
    main, (why, unreachable) = pipeline.main, pipeline.unreached
    pipeline.unreached = "", ()
    if unreachable and pipeline.serving is not None:
        if pipeline.pipeline_id in plan.interrupts:
            fail(world, pipeline.serving, why, now, pause=True)
        else:
            world.log(f"{pipeline.pipeline_id} stays as it is, though {why}", warning=True)
    if main is not None and main.fault and main.phase is not Phase.OVER:
        yield from moves.end(world, pipeline)
        main.phase = Phase.OVER
        yield actions.Forget(pipeline.pipeline_id, main.epoch + 1)
        world.log(f"{pipeline.pipeline_id} epoch {main.epoch} is over: {main.fault}", warning=True)
        world.publish()


def _advance(world: World, pipeline: Pipeline, main: Attempt, now: float) -> Iterator[Action]:
    yield from attempts.advance(world, pipeline, main, now)
    if main.phase is Phase.ACTIVATE and len(main.activated) == len(main.stages):
        main.phase = Phase.ACTIVE
        pipeline.reason, pipeline.serving_since = "", now
        world.log(f"{pipeline.pipeline_id} serves at epoch {main.epoch}")
        world.membership_changed()


def _form(world: World, pipeline: Pipeline, goal: Goal, now: float) -> Iterator[Action]:
    """Begins an attempt, or takes the pipeline down if it has no holders."""
    if not goal.holders:
        yield from _down(world, pipeline, goal, now)
        return
    for name in goal.takes_down:
        if name in world.pipelines:
            why = Goal(goal.policy, why=f"its workers are needed for {pipeline.pipeline_id}")
            yield from _down(world, world.pipelines[name], why, now)
    names = [holder.worker_id for holder in goal.holders]
    yield from _next_epoch(world, pipeline, keep=names, reason="another worker took its place")
    stages = attempts.plan_stages(world, goal.holders)
    pipeline.main = Attempt(pipeline.pipeline_id, pipeline.epoch, stages)
    pipeline.main.shares = world.num_shares
    pipeline.last_stages, pipeline.drains = stages, False
    pipeline.reason, pipeline.cannot = Phase.ASSIGN.value, ""
    if goal.why:
        world.log(f"{pipeline.pipeline_id}: {goal.why}", warning=True)
    shown = ", ".join(f"{h.worker_id}: layers {h.layers[0]}-{h.layers[1] - 1}" for h in goal.holders)
    world.log(f"{pipeline.pipeline_id} forms at epoch {pipeline.epoch}: {shown}")
    for plan in stages:
        worker = world.workers[plan.worker_id]
        worker.progress, worker.fetching, worker.preparing, worker.beside = (0, 0), False, None, None
        if worker.kept != plan.layers:
            worker.kept = None
    yield from attempts.begin(world, pipeline.main)
    world.publish()


def _down(world: World, pipeline: Pipeline, goal: Goal, now: float) -> Iterator[Action]:
    was_up, reason = pipeline.main is not None, goal.why
    pipeline.final = goal.final
    if not was_up and pipeline.cannot == reason:
        return
    pipeline.cannot = reason
    if was_up:
        if pipeline.main is not None and pipeline.main.fault and pipeline.reason not in reason:
            reason = f"{pipeline.reason}; {reason}"
        yield from moves.end(world, pipeline)
        yield from _next_epoch(world, pipeline, keep=[], reason=reason)
        pipeline.main, pipeline.down_since = None, now
        world.membership_changed()  # Its workers are free for others.
    pipeline.reason = reason
    world.log(f"{pipeline.pipeline_id} is down: {reason}", warning=was_up)
    world.publish()


def _next_epoch(world: World, pipeline: Pipeline, keep: list[str], reason: str) -> Iterator[Action]:
    """Raises the epoch, and releases the old attempt's workers except those in `keep`."""
    pipeline.epoch = attempts.new_epoch(world, pipeline)
    yield actions.Forget(pipeline.pipeline_id, pipeline.epoch)
    if pipeline.main is not None:
        yield from attempts.release(world, pipeline.main, reason, keep=keep)
