"""Workers come and go: registrations, leases, losses, and beliefs that end."""

from __future__ import annotations

from stagemesh.errors import ConfigError
from stagemesh.models.support import check_heads
from stagemesh.protocol import MOVES, spoken
from stagemesh.protos.v1 import coordinator_pb2 as pb

from ..values import span
from ..world.pipeline import Attempt, Phase
from ..world.worker import Worker
from ..world.world import World
from .events import Tick, WorkerLost
from .faults import fail
from .requests import look

LOST_SHOWN = 64
MAX_COUNTED = 4096
"""Number of workers whose counts of refused stale orders are kept."""


def register(world: World, info: pb.RegisterRequest, now: float) -> None:
    """A worker registered, for the first time or again. Reconcile checks what it still holds."""
    name = info.worker_id
    known = world.workers.get(name)
    if known is not None and known.incarnation == info.incarnation:
        known.info, known.renewed_at, known.unsettled = info, now, True
    else:
        if known is not None:
            _lose(world, name, "a new incarnation of it registered", now)
        known = world.workers[name] = Worker(info, now, _why_unfit(world, info))
        world.lost.pop(name, None)
        world.beliefs.missed.pop(name, None)
        pool = "any stage" if info.pool < 0 else f"stage {info.pool}"
        world.log(f"worker {name} registered: {info.address}, {pool}, {info.tp_size} rank(s), {info.device.kind}")
        if known.unfit:
            world.log(known.unfit, warning=True)
    for held in sorted(info.held, key=lambda h: h.epoch):
        if held.fingerprint == world.settings.model.fingerprint:
            known.kept = span(held.layers)
    for attempt, stage in world.stages_of(name):
        active = attempt.phase in (Phase.ACTIVE, Phase.SWITCH) and not attempt.fault
        if active and not is_held(info, attempt, stage):
            fail(world, attempt, f"stage {stage}: worker {name} no longer holds it", now)
    world.membership_changed()


def _why_unfit(world: World, info: pb.RegisterRequest) -> str:
    try:
        check_heads(world.settings.heads, info.tp_size)
    except ConfigError as e:
        return f"worker {info.worker_id} cannot hold layers: {e.message}"
    if world.settings.model.quantization and spoken(info.protocol) < MOVES:
        return f"worker {info.worker_id} cannot hold layers: its release ({info.version}) has no --quantization"
    return ""


def is_held(info: pb.RegisterRequest, attempt: Attempt, stage: int) -> bool:
    """Whether a worker's registration says that it holds a stage of an active attempt."""
    plan = attempt.stages[stage]
    wanted = (attempt.pipeline_id, attempt.epoch, stage, plan.layers, plan.generation, True)
    return any((h.pipeline_id, h.epoch, h.stage, span(h.layers), h.generation, h.active) == wanted for h in info.held)


def renew(world: World, renewal: pb.KeepAliveRequest, now: float) -> None:
    """A keep-alive came. It may contain counts of refused orders, and report a broken link."""
    name = renewal.worker_id
    if not world.knows(name, renewal.incarnation):
        return
    worker = world.workers[name]
    worker.renewed_at, worker.late_s = now, renewal.late_ms / 1000
    if renewal.stale_refused and world.stale_refused.get(name) != renewal.stale_refused:
        world.stale_refused[name] = dict(renewal.stale_refused)
        while len(world.stale_refused) > MAX_COUNTED:
            world.stale_refused.pop(next(iter(world.stale_refused)))
        world.publish(urgent=False)
    if renewal.broken_pipeline:
        attempt = world.attempt(renewal.broken_pipeline, renewal.broken_epoch)
        stage = attempt.stage_of(name) if attempt is not None else None
        if attempt is not None and stage is not None and not attempt.fault:
            why = renewal.broken_reason or "no reason given"
            # When a neighbour dies, the link breaks before the neighbour's stream does. Pause until that one is lost.
            fail(world, attempt, f"stage {stage}: a link broke: {why}", now, pause=True)


def worker_lost(world: World, event: WorkerLost, now: float) -> None:
    """A keep-alive stream broke."""
    if world.knows(event.worker_id, event.incarnation):
        _lose(world, event.worker_id, event.reason, now)


def _lose(world: World, worker_id: str, reason: str, now: float) -> None:
    """A worker is lost, and every attempt that it is part of fails."""
    worker = world.workers.pop(worker_id)
    world.lost[worker_id] = worker.info
    while len(world.lost) > LOST_SHOWN:
        world.lost.pop(next(iter(world.lost)))
    world.departed.append(worker.info.address)
    world.pages.pop((worker_id, worker.incarnation), None)
    beliefs = world.beliefs
    beliefs.ucx_failed = {ends: e for ends, e in beliefs.ucx_failed.items() if worker.incarnation not in ends}
    if worker.pool >= 0 and not world.drains(worker):
        # It counts as a replica of its stage for a while, and gets its stage back when it returns.
        beliefs.missed[worker_id] = worker.pool, now + world.timing.missed_s
        if any(p.stage_of(worker_id) == worker.pool for p in world.pipelines.values()):
            known = world.workers.keys() | beliefs.missed.keys()
            beliefs.lost_with = {name: s for name, s in beliefs.lost_with.items() if name in known}
            beliefs.lost_with[worker_id] = worker.pool
    world.log(f"worker {worker_id} is lost: {reason}", warning=True)
    for attempt, stage in world.stages_of(worker_id):
        fail(world, attempt, f"stage {stage}: worker {worker_id} is lost: {reason}", now, blameless=True)
    world.membership_changed()


def tick(world: World, event: Tick, now: float) -> None:
    """Time passed: ends leases, refusals and beliefs, and looks at the measured steps."""
    timing = world.timing
    passed_s, world.last_tick = now - world.last_tick, now
    _note_lateness(world, passed_s)
    if passed_s > timing.stall_s:
        # This process was stopped, or the machine was suspended: no worker's renewal was heard.
        for worker in world.workers.values():
            worker.renewed_at += passed_s
    for name in [name for name, worker in world.workers.items() if now >= _lease_ends(world, worker)]:
        _lose(world, name, f"its lease of {timing.lease_s * 1000:.0f} ms ran out", now)
    for worker in world.workers.values():
        if worker.refusals and worker.refused_until <= now:
            worker.refusals.clear()
            world.membership_changed()
    if world.beliefs.expire(now):
        world.membership_changed()
    for pipeline in world.pipelines.values():
        if pipeline.gave_up is not None and now >= pipeline.gave_up.until:
            pipeline.gave_up = None
            world.changed()
    look(world, now)


def _note_lateness(world: World, passed_s: float) -> None:
    """Measures how late ticks have been recently. Renewals may be as late, because a busy host delays both.

    A suspended machine does not count as late.
    """
    timing = world.timing
    world.late_s *= 0.5 ** (passed_s / timing.lateness_half_s)
    if passed_s <= timing.lateness_most_s:
        world.late_s = max(world.late_s, passed_s - timing.tick_s)


def _lease_ends(world: World, worker: Worker) -> float:
    late_s = min(world.timing.lateness_most_s, world.late_s + worker.late_s)
    return worker.renewed_at + world.timing.lease_s + late_s
