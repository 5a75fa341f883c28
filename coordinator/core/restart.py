"""After a restart: resumes pipelines that their workers still serve, and moves that gateways were told of.

It also releases assignments that workers report and this coordinator does not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from stagemesh.protos.v1.stage_pb2 import PipelineKey, ReleaseRequest

from ..observe.membership import is_held
from ..observe.requests import know_later_epoch
from ..values import Order, StoredPlan
from ..world.pipeline import Attempt, Phase, Pipeline
from ..world.worker import Worker
from ..world.world import World
from .actions import Action
from .attempt import page_copies


def settle_reported(world: World, now: float) -> Iterator[Action]:
    """Adopts stored pipelines that workers report, skips epochs that are unknown here, and releases the rest."""
    for worker in world.workers.values():
        for held in worker.info.held if worker.unsettled else ():
            # No new attempt may get an epoch that a worker has already seen.
            if held.epoch > world.record.epochs.get(held.pipeline_id, 0):
                know_later_epoch(world, held.pipeline_id, held.epoch, f"worker {worker.worker_id}", now)
    for pipeline in world.pipelines.values():
        if pipeline.restored is not None:
            _try_to_adopt(world, pipeline, pipeline.restored, now)
    for worker in world.workers.values():
        if worker.unsettled:
            yield from _release_stale(world, worker)


def _release_stale(world: World, worker: Worker) -> Iterator[Action]:
    """Releases a worker's assignments whose epochs are neither current nor may still be adopted."""
    worker.unsettled = False
    for held in worker.info.held:
        pipeline = world.pipelines.get(held.pipeline_id)
        attempt = world.attempt(held.pipeline_id, held.epoch)
        if pipeline is not None and pipeline.restored is not None:
            worker.unsettled = True  # Checked again once it is known whether the pipeline is adopted.
        elif attempt is None or attempt.stage_of(worker.worker_id) is None:
            reason = "its epoch has passed" if pipeline is not None else "no such pipeline"
            key = PipelineKey(pipeline_id=held.pipeline_id, epoch=held.epoch)
            request = ReleaseRequest(key=key, reason=reason, alone=pipeline is not None)
            yield Order(worker.info, request)


def _try_to_adopt(world: World, pipeline: Pipeline, plan: StoredPlan, now: float) -> None:
    """Adopts a stored pipeline once all of its workers report it active, and its move if gateways were told of one."""
    adopted = [_adopted(plan)] + ([_adopted(plan.next)] if plan.next is not None else [])
    for attempt in adopted:
        for stage in attempt.stages:
            worker = world.workers.get(stage.worker_id)
            if worker is None:
                if not world.settles(now):
                    _give_up(world, pipeline, plan, "not all of its workers reported in time")
                return
            same_life = worker.incarnation == stage.incarnation
            if not same_life or not is_held(worker.info, attempt, stage.stage):
                _give_up(world, pipeline, plan, f"worker {stage.worker_id} no longer holds stage {stage.stage}")
                return
    main, *following = adopted
    pipeline.restored, pipeline.epoch, pipeline.main = None, plan.epoch, main
    pipeline.last_stages, pipeline.reason, pipeline.serving_since = main.stages, "", 0.0
    for move in following:
        move.beside, move.phase, move.taken_up = True, Phase.SWITCH, True
        move.why, move.deadline = "the move began before a restart", now + world.timing.move_s
        move.copies = page_copies(main.stages, move.stages, main.epoch)
        pipeline.beside = move
    for attempt in adopted:
        for stage in attempt.stages:
            world.workers[stage.worker_id].kept = stage.layers
    world.log(f"{pipeline.pipeline_id} goes on at epoch {pipeline.epoch}: all of its workers are still active")
    world.membership_changed()


def _adopted(plan: StoredPlan) -> Attempt:
    """The attempt that a stored plan describes."""
    return Attempt(
        plan.pipeline_id,
        plan.epoch,
        plan.stages,
        plan.shares,
        phase=Phase.ACTIVE,
        loaded=dict(enumerate(plan.loaded)),
        routes=dict(enumerate(plan.routes)),
        activated={stage.stage for stage in plan.stages},
        deadline=math.inf,
    )


def _give_up(world: World, pipeline: Pipeline, plan: StoredPlan, why: str) -> None:
    pipeline.restored, pipeline.last_stages, pipeline.reason = None, plan.stages, why
    world.log(f"{pipeline.pipeline_id} is formed again: {why}")
    world.membership_changed()
