"""Applies gateways' reports and operators' requests to the world."""

from __future__ import annotations

from stagemesh.protocol import MOVES, spoken
from stagemesh.protos.v1 import coordinator_pb2 as pb

from ..policy.rebalance import advice, advices
from ..world.world import UNLIMITED, Gateway, World
from .events import GatewayGone
from .faults import fail

# -- gateways -------------------------------------------------------------------------------------------------------


def gateway_came(world: World, request: pb.WatchPipelinesRequest, now: float) -> None:
    """A gateway opened a watch stream."""
    gateway = world.gateways.setdefault(request.gateway_id, Gateway())
    gateway.streams += 1
    gateway.knows_moves = spoken(request.protocol) >= MOVES
    world.changed()


def gateway_gone(world: World, event: GatewayGone, now: float) -> None:
    """A watch stream of a gateway ended."""
    gateway = world.gateways[event.gateway_id]
    gateway.streams -= 1
    gateway.gone_at = now
    watching = world.watching(now)
    world.gateways = {name: g for name, g in world.gateways.items() if name in watching}
    world.changed()


def gateway_moved(world: World, report: pb.ReportMovedRequest, now: float) -> None:
    """A gateway has switched to the next epoch of a pipeline, or could not."""
    pipeline = world.pipelines.get(report.pipeline_id)
    if pipeline is None:
        return
    who, attempt = f"gateway {report.gateway_id}", pipeline.beside
    world.changed()
    if attempt is None or attempt.epoch != report.epoch or attempt.is_being_made:
        if report.epoch > pipeline.epoch and not report.error:
            know_later_epoch(world, report.pipeline_id, report.epoch, who, now)
    elif report.error:
        attempt.stayed.add(report.gateway_id)
        fail(world, attempt, f"{who}: {report.error}", now)
    else:
        attempt.switched.add(report.gateway_id)


def know_later_epoch(world: World, pipeline_id: str, epoch: int, who: str, now: float) -> None:
    """A worker or gateway has seen an epoch that is unknown here. The pipeline must be formed at a later one."""
    pipeline, epochs = world.pipelines.get(pipeline_id), world.record.epochs
    if epoch > epochs.get(pipeline_id, 0):
        epochs[pipeline_id] = epoch
        if pipeline is not None:
            pipeline.restored, pipeline.epoch = None, epoch
    if pipeline is not None and pipeline.main is not None:
        fail(world, pipeline.main, f"{who} knows the later epoch {epoch}", now)
    world.changed()


def steps_stuck(world: World, report: pb.ReportStuckRequest, now: float) -> None:
    """A gateway gets no results of its steps, or does not reach some workers."""
    attempt = world.attempt(report.pipeline_id, report.epoch)
    if attempt is None or attempt.fault or attempt.is_being_made:
        return
    reason, unreachable = f"gateway {report.gateway_id}: {report.reason}", tuple(report.unreachable)
    if not unreachable or attempt.beside:
        fail(world, attempt, reason, now, pause=True)
        return
    world.pipelines[report.pipeline_id].unreached = reason, unreachable
    if len(attempt.stages) == 1 or not set(attempt.workers) <= set(unreachable):
        world.beliefs.away |= dict.fromkeys(unreachable, now + world.timing.apart_s)
    world.changed()


def gateway_left(world: World, report: pb.ReportLeftRequest, now: float) -> None:
    """A gateway has left a pipeline that is being removed."""
    pipeline = world.pipelines.get(report.pipeline_id)
    if pipeline is not None and pipeline.leaving is not None:
        pipeline.leaving.gateways.add(report.gateway_id)
        world.changed()


def steps_measured(world: World, report: pb.ReportStepsRequest, now: float) -> None:
    """A gateway reports the time of a step on each stage."""
    if (pipeline := world.pipelines.get(report.pipeline_id)) is not None:
        pipeline.steps.note(report.gateway_id, report.epoch, [us * 1e-6 for us in report.step_us], now)


# -- operators ------------------------------------------------------------------------------------------------------


def drain(world: World, request: pb.DrainRequest, now: float) -> None:
    """An operator drains a worker: it should hold no stage."""
    name = request.worker_id
    worker = world.workers.get(name)
    if worker is None:
        return
    record = world.record
    forced = record.forced | {name} if request.force else record.forced
    if world.drains(worker) and forced == record.forced:
        return
    known = {n: i for n, i in record.drains.items() if n in world.workers or n in world.lost or world.settles(now)}
    record.drains = known | {name: worker.incarnation}
    record.forced = frozenset(forced & record.drains.keys())
    world.log(f"worker {name} drains")
    _anew(world)
    for attempt, stage in world.stages_of(name):
        # A move to which gateways already switch goes on. The next move takes the layers from the worker.
        if attempt.is_being_made:
            fail(world, attempt, f"stage {stage}: worker {name} drains", now, blameless=True)


def undrain(world: World, request: pb.UndrainRequest, now: float) -> None:
    """An operator ends a drain: the worker may hold stages again."""
    name, record = request.worker_id, world.record
    if name in record.drains:
        record.drains = {other: life for other, life in record.drains.items() if other != name}
        record.forced = record.forced - {name}
        world.log(f"worker {name} no longer drains")
        _anew(world)


def repartition(world: World, request: pb.RepartitionRequest, now: float) -> None:
    """Sets the wanted layer counts. They also apply to pipelines that are formed later."""
    for pipeline in world.pipelines.values():
        pipeline.steps.wanted, pipeline.steps.ripe = advice(world, pipeline, now), None
    if world.wanted_ranges is None:
        world.counts_before = world.record.counts
    world.record.counts = tuple(request.counts)
    world.load_failures, world.given_up = 0, ""
    world.log("other ranges are wanted: " + ", ".join(map(str, request.counts)) + " layers")
    _anew(world)


def drop_counts(world: World, why: str, now: float) -> None:
    """The wanted layer counts failed: the counts before them are wanted again."""
    before = world.counts_before if world.counts_before != world.record.counts else None
    world.log(f"the ranges stay as they are: {why}", warning=True)
    world.record.counts, world.counts_before, world.given_up = before, None, why
    world.load_failures = 0
    for pipeline in world.pipelines.values():
        pipeline.steps.rest(now, world.timing)
        if pipeline.gave_up is not None and pipeline.gave_up.policy == "ranges":
            pipeline.gave_up = None
    world.publish()


def scale(world: World, request: pb.ScaleRequest, now: float) -> None:
    """An operator sets the number of a stage's replicas. 0: as many as workers were started for it."""
    wishes = {s: count for s, count in world.record.replicas.items() if s != request.stage}
    world.record.replicas = wishes | ({request.stage: request.replicas} if request.replicas else {})
    world.given_up, world.share_limit = "", UNLIMITED
    replicas = request.replicas or "as many as were started for it"
    world.log(f"replicas wanted on stage {request.stage}: {replicas}")
    _anew(world)


def _anew(world: World) -> None:
    """What failed before may be tried again."""
    for pipeline in world.pipelines.values():
        pipeline.moves_failed = 0
    world.membership_changed()


# -- regular checks -------------------------------------------------------------------------------------------------


def look(world: World, now: float) -> None:
    """Looks at the measured steps every `look_s`: whether layers should move, and what to advise operators."""
    if now < world.looked_at + world.timing.look_s:
        return
    world.looked_at = now
    if world.settings.rebalance and world.wanted_ranges is None and not any(p.beside for p in world.pipelines.values()):
        for pipeline in world.pipelines.values():
            pipeline.steps.look(advice(world, pipeline, now), now, world.timing)
    said = list(advices(world, now))
    if said != world.advices:
        world.advices = said
        world.publish()
