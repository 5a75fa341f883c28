"""What gateways report and operators ask for, in the world."""

from __future__ import annotations

from stagemesh.protocol import MOVES

from ..policy.ranges import advice, advices
from ..world.pipeline import Pipeline
from ..world.world import UNLIMITED, Gateway, World
from . import events
from .faults import backoff_s, fail_beside, interrupt

# -- gateways -------------------------------------------------------------------------------------------------------


def gateway_came(world: World, gateway_id: str, protocol: int) -> None:
    """A gateway watches the mesh."""
    gateway = world.gateways.setdefault(gateway_id, Gateway())
    gateway.streams += 1
    gateway.knows_moves = protocol >= MOVES
    world.changed()


def gateway_gone(world: World, gateway_id: str, now: float) -> None:
    """A stream of it ended."""
    gateway = world.gateways[gateway_id]
    gateway.streams -= 1
    gateway.gone_at = now
    watching = world.watching(now)
    world.gateways = {name: g for name, g in world.gateways.items() if name in watching}
    world.changed()


def gateway_moved(world: World, event: events.GatewayMoved, now: float) -> None:
    """A gateway has switched to the next epoch of a pipeline, or could not."""
    pipeline = world.pipelines.get(event.pipeline_id)
    if pipeline is None:
        return
    attempt = pipeline.beside
    world.changed()
    if attempt is None or attempt.epoch != event.epoch or attempt.is_being_made:
        if event.epoch > pipeline.epoch and not event.error:
            know_later_epoch(world, pipeline, event.epoch, f"gateway {event.gateway_id}", now)
    elif event.error:
        attempt.stayed.add(event.gateway_id)
        fail_beside(world, attempt, f"gateway {event.gateway_id}: {event.error}", now)
    else:
        attempt.switched.add(event.gateway_id)


def know_later_epoch(world: World, pipeline: Pipeline, epoch: int, who: str, now: float) -> None:
    """Somebody was at an epoch that is not known here, or not any more: a still later one is to be formed."""
    name = pipeline.pipeline_id
    if epoch > world.record.epochs.get(name, 0):
        pipeline.restored = None
        pipeline.epoch = world.record.epochs[name] = epoch
    interrupt(world, pipeline, f"{who} knows the later epoch {epoch}", now)
    world.changed()


def link_broken(world: World, event: events.LinkBroken, now: float) -> None:
    """A worker reports a link that broke."""
    pipeline = world.pipelines.get(event.pipeline_id)
    attempt = pipeline.at(event.epoch) if pipeline is not None else None
    stage = attempt.stage_of(event.worker_id) if attempt is not None else None
    if pipeline is None or attempt is None or stage is None or attempt.fault:
        return
    reason = f"stage {stage}: a link broke: {event.reason}"
    if attempt.beside:
        fail_beside(world, attempt, reason, now)
    else:
        # The neighbour's death breaks a link before its own stream breaks: wait for that, so that it is replaced.
        interrupt(world, pipeline, reason, now, backoff_s(world, pipeline, now))


def steps_stuck(world: World, event: events.StepsStuck, now: float) -> None:
    """A gateway's steps do not come back, or it does not reach some workers."""
    pipeline = world.pipelines.get(event.pipeline_id)
    attempt = pipeline.serving if pipeline is not None else None
    if pipeline is None or attempt is None:
        return
    reason = f"gateway {event.gateway_id}: {event.reason}"
    beside = pipeline.beside
    if beside is not None and beside.epoch == event.epoch and not beside.is_being_made:
        fail_beside(world, beside, reason, now)
    elif attempt.epoch == event.epoch and event.unreachable:
        pipeline.unreached = reason, event.unreachable
        reaches_some = len(attempt.stages) == 1 or not set(attempt.workers) <= set(event.unreachable)
        if reaches_some:
            world.beliefs.away |= dict.fromkeys(event.unreachable, now + world.timing.apart_s)
        world.changed()
    elif attempt.epoch == event.epoch:
        interrupt(world, pipeline, reason, now, backoff_s(world, pipeline, now))


def gateway_left(world: World, gateway_id: str, pipeline_id: str) -> None:
    """A gateway has nothing more to do with a pipeline that is to be no more."""
    pipeline = world.pipelines.get(pipeline_id)
    if pipeline is not None and pipeline.leaving is not None:
        pipeline.leaving.gateways.add(gateway_id)
        world.changed()


def steps_measured(world: World, event: events.StepsMeasured, now: float) -> None:
    """A gateway reports what a step takes on each stage."""
    if (pipeline := world.pipelines.get(event.pipeline_id)) is not None:
        pipeline.steps.note(event.gateway_id, event.epoch, list(event.seconds), now)


# -- operators ------------------------------------------------------------------------------------------------------


def drain(world: World, worker_id: str, now: float, *, force: bool) -> None:
    """A worker is to hold nothing any more."""
    worker = world.workers.get(worker_id)
    if worker is None:
        return
    record = world.record
    forced = record.forced | {worker_id} if force else record.forced
    if world.drains(worker) and forced == record.forced:
        return
    known = {n: i for n, i in record.drains.items() if n in world.workers or n in world.lost or world.settles(now)}
    record.drains = known | {worker_id: worker.info.incarnation}
    record.forced = frozenset(forced & record.drains.keys())
    world.log(f"worker {worker_id} drains")
    _anew(world)
    for pipeline in world.pipelines.values():
        main, beside = pipeline.main, pipeline.beside
        stage = pipeline.stage_of(worker_id)
        if stage is not None and main is not None and main.is_being_made:
            interrupt(world, pipeline, f"stage {stage}: worker {worker_id} drains", now)
        # Where gateways switch already they had better arrive: from there the worker's layers go on to others.
        if beside is not None and beside.is_being_made and beside.stage_of(worker_id) is not None:
            fail_beside(world, beside, f"worker {worker_id} drains", now, blameless=True)


def undrain(world: World, worker_id: str) -> None:
    """A drain is taken back: the worker may hold stages again."""
    record = world.record
    if worker_id in record.drains:
        record.drains = {name: life for name, life in record.drains.items() if name != worker_id}
        record.forced = record.forced - {worker_id}
        world.log(f"worker {worker_id} drains no more")
        _anew(world)


def repartition(world: World, counts: tuple[int, ...], now: float) -> None:
    """So many layers are wanted on each stage; that holds for what is formed from now on as well."""
    for pipeline in world.pipelines.values():
        pipeline.steps.wanted, pipeline.steps.ripe = advice(world, pipeline, now), None
    if world.wanted_ranges is None:
        world.counts_before = world.record.counts
    world.record.counts = counts
    world.load_failures, world.load_fails_for_good, world.given_up = 0, False, ""
    world.log("other ranges are wanted: " + ", ".join(map(str, counts)) + " layers")
    _anew(world)


def drop_counts(world: World, why: str, now: float) -> None:
    """The layer counts that are wanted cannot be had: what was wanted before is wanted again."""
    before = world.counts_before if world.counts_before != world.record.counts else None
    world.log(f"the ranges stay as they are: {why}", warning=True)
    world.record.counts, world.counts_before, world.given_up = before, None, why
    world.load_failures, world.load_fails_for_good = 0, False
    for pipeline in world.pipelines.values():
        pipeline.steps.rest(now, world.timing)
        if pipeline.gave_up is not None and pipeline.gave_up.policy == "ranges":
            pipeline.gave_up = None
    world.changed()
    world.publish()


def scale(world: World, stage: int, replicas: int) -> None:
    """An operator wants so many workers on a stage; 0: as many as were started for it."""
    wishes = {s: count for s, count in world.record.replicas.items() if s != stage}
    world.record.replicas = wishes | ({stage: replicas} if replicas else {})
    world.given_up, world.share_limit = "", UNLIMITED
    world.log(f"stage {stage} is to have {replicas or 'as many replicas as were started for it'}")
    _anew(world)


def _anew(world: World) -> None:
    """What failed before may be tried again."""
    for pipeline in world.pipelines.values():
        pipeline.moves_failed = 0
    world.membership_changed()
    world.publish()


# -- what is looked at now and then ---------------------------------------------------------------------------------


def look(world: World, now: float) -> None:
    """Looks at the measured steps: whether layers should move by themselves, and what to tell people."""
    timing = world.timing
    if world.settings.rebalance and world.wanted_ranges is None and not any(p.beside for p in world.pipelines.values()):
        for pipeline in world.pipelines.values():
            if pipeline.steps.is_due(now, timing):
                pipeline.steps.look(advice(world, pipeline, now), now, timing)
    if now >= world.advised_at + timing.look_s:
        world.advised_at = now
        said = list(advices(world, now))
        if said != world.advices:
            world.advices = said
            world.publish()
