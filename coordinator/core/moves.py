"""Moves pipelines to a next epoch while they serve.

A move makes the next epoch of a pipeline beside the one that serves. The workers load the missing layers. Links are
made, also those that copy KV pages from a layer's present holder to its next one. Then gateways are told. Each gateway
copies its pages, switches between two steps and reports it. When all have switched, the old epoch is over.

If a move fails before gateways are told, it is forgotten without effect. If it fails later, the pipeline fails and is
formed again like any other. A move that gateways were told of is stored, so that a restarted coordinator continues it:
once a gateway has switched, the old epoch must not be driven any more.
"""

from __future__ import annotations

from collections.abc import Iterator

from stagemesh.protos.v1.stage_pb2 import PrepareRequest

from ..observe.faults import fail
from ..policy.plan import Goal
from ..values import Order, Range, layer_range
from ..world.pipeline import Attempt, GaveUp, Phase, Pipeline
from ..world.worker import Worker
from ..world.world import World
from . import actions
from . import attempt as attempts
from .actions import Action

TRIES = 2
"""Number of failures in a row after which a move is not tried again."""


def load(world: World, worker: Worker, layers: Range, now: float) -> Iterator[Action]:
    """Has a worker load layers while it goes on working, unless it has them or is loading others."""
    if worker.has(layers) or worker.preparing is not None or now < worker.prepare_after:
        return
    worker.preparing, worker.beside = layers, None
    if not world.pipelines_of(worker.worker_id):
        worker.kept = None
    world.changed()
    settings = world.settings
    request = PrepareRequest(layers=layer_range(layers), model=settings.model, limits=settings.limits)
    yield Order(worker.info, request)


def pursue(world: World, pipeline: Pipeline, main: Attempt, goal: Goal | None, now: float) -> Iterator[Action]:
    """Continues the move of a pipeline that serves as `main`, or begins the move that its goal asks for."""
    if pipeline.beside is not None:
        yield from _go_on(world, pipeline, main, pipeline.beside, now)
    elif goal is not None and goal.holders:
        yield from _approach(world, pipeline, main, goal, now)


def _approach(world: World, pipeline: Pipeline, main: Attempt, goal: Goal, now: float) -> Iterator[Action]:
    beside = _know_moves(world, main, goal, now)
    lacking = [
        holder
        for holder in goal.holders
        if not world.workers[holder.worker_id].has(holder.layers)
        # Without moves, a worker that holds a stage loads after that attempt is over.
        and (beside or main.stage_of(holder.worker_id) is None)
    ]
    for holder in lacking:
        yield from load(world, world.workers[holder.worker_id], holder.layers, now)
    if lacking or now < pipeline.move_after:
        return
    if beside and pipeline.moves_failed < TRIES and not (goal.must and _lacks_copies(world, main, goal)):
        yield from _begin(world, pipeline, main, goal, now)
    elif goal.must or not beside:
        # Form the pipeline again with the same holders. Missing pages are computed again.
        pipeline.last_stages = attempts.plan_stages(world, goal.holders)
        fail(world, main, goal.why, now)
    else:
        why = f"{TRIES} moves failed, the last one because {pipeline.why_moves_failed}"
        pipeline.gave_up = GaveUp(goal.policy, why, now + world.timing.again_s)
        pipeline.moves_failed = 0
        world.publish()
        if goal.policy != "ranges":
            world.beliefs.lost_with.clear()
            world.given_up = f"{pipeline.pipeline_id} stays as it is: {why}"
            world.log(world.given_up, warning=True)


def _know_moves(world: World, main: Attempt, goal: Goal, now: float) -> bool:
    """Whether every worker and gateway of a move speaks a protocol with moves. Some do not during an upgrade to it."""
    names = {*main.workers, *(holder.worker_id for holder in goal.holders), *world.watching(now)}
    return names.isdisjoint(world.without_moves(now))


def _lacks_copies(world: World, main: Attempt, goal: Goal) -> bool:
    """Whether a layer's pages cannot be copied, because its next worker has another number of ranks."""
    return any(
        max(stage.layers[0], holder.layers[0]) < min(stage.layers[1], holder.layers[1])
        and world.worker_at(main, stage.stage).info.tp_size != world.workers[holder.worker_id].info.tp_size
        for stage in main.stages
        for holder in goal.holders
        if stage.worker_id != holder.worker_id
    )


def _begin(world: World, pipeline: Pipeline, main: Attempt, goal: Goal, now: float) -> Iterator[Action]:
    epoch = attempts.new_epoch(world, pipeline)
    stages = attempts.plan_stages(world, goal.holders)
    pipeline.beside = Attempt(
        pipeline.pipeline_id,
        epoch,
        stages,
        world.num_shares,
        beside=True,
        why=goal.why,
        copies=attempts.page_copies(main.stages, stages, main.epoch),
        deadline=now + world.timing.move_s,
    )
    world.log(f"{pipeline.pipeline_id} begins to move to epoch {epoch}: {goal.why}")
    yield from attempts.begin(world, pipeline.beside)


def _go_on(world: World, pipeline: Pipeline, main: Attempt, move: Attempt, now: float) -> Iterator[Action]:
    if move.is_being_made:
        yield from attempts.advance(world, pipeline, move, now)
    if move.phase is Phase.ACTIVATE and not move.fault and len(move.activated) == len(move.stages):
        move.phase, move.deadline = Phase.SWITCH, now + world.timing.move_s
        world.publish()
    awaited = world.watching(now) - move.switched - move.stayed
    told = move.phase is Phase.SWITCH
    all_said = told and not awaited and now >= world.gateways_came_at
    if move.fault and (all_said or not told):
        yield from _fail(world, pipeline, main, move, move.fault, now)
    elif now >= move.deadline:
        late = f"not there in time: {', '.join(sorted(awaited)) or move.phase.value}"
        yield from _fail(world, pipeline, main, move, move.fault or late, now)
    elif all_said:
        yield from _complete(world, pipeline, main, move, now)


def _complete(world: World, pipeline: Pipeline, before: Attempt, move: Attempt, now: float) -> Iterator[Action]:
    """Makes the move the pipeline's main attempt, and releases the one before."""
    name, epoch = pipeline.pipeline_id, move.epoch
    move.beside, move.phase, move.deadline = False, Phase.ACTIVE, float("inf")
    pipeline.main, pipeline.beside, pipeline.epoch = move, None, epoch
    pipeline.last_stages, pipeline.reason, pipeline.serving_since = move.stages, "", now
    pipeline.moves_failed, pipeline.drains, world.given_up = 0, False, ""
    for plan in move.stages:
        worker = world.workers[plan.worker_id]
        worker.kept, worker.beside = plan.layers, None
    wanted, pipeline.steps.wanted = pipeline.steps.wanted, None
    if wanted is not None and wanted.ranges == move.ranges:
        pipeline.steps.moved(epoch, wanted, now)
    world.log(f"{name} has moved to epoch {epoch}: {move.why}")
    world.membership_changed()
    yield from attempts.release(world, before, f"{name} is at epoch {epoch} now")


def _fail(world: World, pipeline: Pipeline, main: Attempt, move: Attempt, reason: str, now: float) -> Iterator[Action]:
    """Ends a move that failed. If a gateway may have switched to it, the pipeline fails for all gateways."""
    yield from end(world, pipeline)
    pipeline.moves_failed += not move.blameless
    pipeline.why_moves_failed = reason
    pipeline.move_after = now + world.timing.retry_max_s
    world.log(f"{pipeline.pipeline_id} has not moved to epoch {move.epoch}: {reason}", warning=True)
    told = move.phase is Phase.SWITCH
    if move.taken_up or (told and not world.watching(now) <= move.stayed):
        fail(world, main, reason, now)
    world.publish()


def end(world: World, pipeline: Pipeline) -> Iterator[Action]:
    """Ends a pipeline's move, if it has one, and releases the move's workers."""
    move, pipeline.beside = pipeline.beside, None
    if move is not None:
        world.changed()
        yield actions.Forget(pipeline.pipeline_id, move.epoch + 1)
        yield from attempts.release(world, move, "the pipeline is not moved", alone=True)
