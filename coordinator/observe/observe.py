"""Events change the world, and do nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagemesh.protos.v1 import coordinator_pb2 as pb

from ..world.world import World
from . import answers, events, membership, requests

OBSERVERS: dict[type[events.Event], Callable[[World, Any, float], None]] = {
    events.Tick: membership.tick,
    events.WorkerLost: membership.worker_lost,
    events.GatewayGone: requests.gateway_gone,
    events.Answered: answers.answered,
    events.Failed: answers.failed,
    pb.RegisterRequest: membership.register,
    pb.KeepAliveRequest: membership.renew,
    pb.WatchPipelinesRequest: requests.gateway_came,
    pb.ReportStuckRequest: requests.steps_stuck,
    pb.ReportMovedRequest: requests.gateway_moved,
    pb.ReportLeftRequest: requests.gateway_left,
    pb.ReportStepsRequest: requests.steps_measured,
    pb.DrainRequest: requests.drain,
    pb.UndrainRequest: requests.undrain,
    pb.RepartitionRequest: requests.repartition,
    pb.ScaleRequest: requests.scale,
}


def observe(world: World, event: events.Event, now: float) -> None:
    """The world after an event at clock time `now`."""
    OBSERVERS[type(event)](world, event, now)
