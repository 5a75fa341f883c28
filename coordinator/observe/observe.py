"""Events change the world, and do nothing else."""

from __future__ import annotations

from ..world.world import World
from . import answers, events, membership, requests


def observe(world: World, event: events.Event, now: float) -> None:
    """The world after an event at clock time `now`."""
    match event:
        case events.Tick():
            membership.tick(world, now)
            requests.look(world, now)
        case events.WorkerRegistered(info):
            membership.register(world, info, now)
        case events.LeaseRenewed(worker_id, incarnation, late_s):
            membership.renew(world, worker_id, incarnation, late_s, now)
        case events.WorkerLost(worker_id, incarnation, reason):
            if world.knows(worker_id, incarnation):
                membership.lose(world, worker_id, reason, now)
        case events.Prepared() | events.PrepareFailed():
            answers.prepared(world, event, now)
        case events.LinkBroken():
            requests.link_broken(world, event, now)
        case events.StepsStuck():
            requests.steps_stuck(world, event, now)
        case events.GatewayCame(gateway_id, protocol):
            requests.gateway_came(world, gateway_id, protocol)
        case events.GatewayGone(gateway_id):
            requests.gateway_gone(world, gateway_id, now)
        case events.GatewayMoved():
            requests.gateway_moved(world, event, now)
        case events.GatewayLeft(gateway_id, pipeline_id):
            requests.gateway_left(world, gateway_id, pipeline_id)
        case events.StepsMeasured():
            requests.steps_measured(world, event, now)
        case events.DrainRequested(worker_id, force):
            requests.drain(world, worker_id, now, force=force)
        case events.UndrainRequested(worker_id):
            requests.undrain(world, worker_id)
        case events.RepartitionRequested(ranges):
            requests.repartition(world, tuple(last - first for first, last in ranges), now)
        case events.ScaleRequested(stage, count):
            requests.scale(world, stage, count)
        case _:
            answers.answered(world, event, now)
