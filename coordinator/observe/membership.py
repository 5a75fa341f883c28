"""How workers come and go in the world: registrations, leases, losses, and beliefs that end."""

from __future__ import annotations

from ..values import WorkerInfo
from ..world.pipeline import Attempt, Phase
from ..world.worker import Worker
from ..world.world import World
from .faults import fail_beside, interrupt

LOST_SHOWN = 64


def register(world: World, info: WorkerInfo, now: float) -> None:
    """A worker introduced itself. What it still holds is looked at by reconcile."""
    known = world.workers.get(info.worker_id)
    if known is not None and known.info.incarnation == info.incarnation:
        known.info, known.renewed_at, known.unsettled = info, now, True
    else:
        if known is not None:
            lose(world, info.worker_id, "a new incarnation of it registered", now)
        known = world.workers[info.worker_id] = Worker(info, now)
        world.lost.pop(info.worker_id, None)
        world.beliefs.missed.pop(info.worker_id, None)
        pool = "any stage" if info.pool < 0 else f"stage {info.pool}"
        world.log(
            f"worker {info.worker_id} registered: {info.address}, {pool}, {info.tp_size} rank(s), {info.device_kind}"
        )
    for held in sorted(info.held, key=lambda h: h.epoch):
        if held.fingerprint == world.settings.fingerprint:
            known.kept = held.layers
    for pipeline in world.pipelines.values():
        for attempt in pipeline.attempts:
            stage = attempt.stage_of(info.worker_id)
            if stage is None or attempt.fault or attempt.phase not in (Phase.ACTIVE, Phase.SWITCH):
                continue
            if not is_held(info, attempt, stage):
                reason = f"stage {stage}: worker {info.worker_id} no longer holds it"
                if attempt is pipeline.main:
                    interrupt(world, pipeline, reason, now)
                else:
                    fail_beside(world, attempt, reason, now)
    world.membership_changed()
    world.publish()


def is_held(info: WorkerInfo, attempt: Attempt, stage: int) -> bool:
    """Whether a worker says that it holds a stage of an active attempt."""
    plan = attempt.stages[stage]
    wanted = (attempt.pipeline_id, attempt.epoch, stage, plan.layers, plan.generation, True)
    return any((h.pipeline_id, h.epoch, h.stage, h.layers, h.generation, h.active) == wanted for h in info.held)


def renew(world: World, worker_id: str, incarnation: int, late_s: float, now: float) -> None:
    """A keep-alive came."""
    if world.knows(worker_id, incarnation):
        worker = world.workers[worker_id]
        worker.renewed_at, worker.late_s = now, late_s


def lose(world: World, worker_id: str, reason: str, now: float) -> None:
    """A worker is gone, and with it every attempt that it is part of."""
    worker = world.workers.pop(worker_id)
    info = worker.info
    world.lost[worker_id] = info
    while len(world.lost) > LOST_SHOWN:
        world.lost.pop(next(iter(world.lost)))
    world.departed.append(info.address)
    world.pages.pop((worker_id, info.incarnation), None)
    failed = world.beliefs.ucx_failed
    world.beliefs.ucx_failed = {ends: errors for ends, errors in failed.items() if info.incarnation not in ends}
    if info.pool >= 0 and not world.drains(worker):
        _miss(world, worker_id, info.pool, now)
    world.log(f"worker {worker_id} is lost: {reason}", warning=True)
    for pipeline in world.pipelines.values():
        stage = pipeline.stage_of(worker_id)
        if stage is not None:
            interrupt(world, pipeline, f"stage {stage}: worker {worker_id} is lost: {reason}", now)
        if pipeline.beside is not None and pipeline.beside.stage_of(worker_id) is not None:
            fail_beside(world, pipeline.beside, f"worker {worker_id} is lost: {reason}", now, blameless=True)
    world.membership_changed()
    world.publish()


def _miss(world: World, worker_id: str, stage: int, now: float) -> None:
    """It counts as a replica of its stage for a while, and its stage is its own when it comes back."""
    beliefs = world.beliefs
    beliefs.missed[worker_id] = stage, now + world.timing.missed_s
    if any(p.stage_of(worker_id) == stage for p in world.pipelines.values()):
        known = world.workers.keys() | beliefs.missed.keys()
        beliefs.lost_with = {name: s for name, s in beliefs.lost_with.items() if name in known}
        beliefs.lost_with[worker_id] = stage


def tick(world: World, now: float) -> None:
    """Time passed: leases, refusals and beliefs end."""
    timing = world.timing
    passed_s, world.last_tick = now - world.last_tick, now
    _note_lateness(world, passed_s)
    if passed_s > timing.stall_s:
        # This process was stopped, or the machine was suspended: nobody's renewals were heard.
        for worker in world.workers.values():
            worker.renewed_at += passed_s
    for name in [name for name, worker in world.workers.items() if now >= _lease_ends(world, worker)]:
        lose(world, name, f"its lease of {timing.lease_s * 1000:.0f} ms ran out", now)
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


def _note_lateness(world: World, passed_s: float) -> None:
    """How late ticks come of late says how late a renewal may be that nobody is to blame for: a host whose cores are
    taken delays both. A machine that was suspended is not late."""
    timing = world.timing
    world.late_s *= 0.5 ** (passed_s / timing.lateness_half_s)
    if passed_s <= timing.lateness_most_s:
        world.late_s = max(world.late_s, passed_s - timing.tick_s)


def _lease_ends(world: World, worker: Worker) -> float:
    late_s = min(world.timing.lateness_most_s, world.late_s + worker.late_s)
    return worker.renewed_at + world.timing.lease_s + late_s
