"""The coordinator's core: an event changes the world, policies plan the mesh, and reconcile gives the orders for it.

No I/O; the clock is an argument. The core is level-triggered: after a restart the same world leads to the same plan,
and the next event makes up for one that was missed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagemesh.protos.v1 import coordinator_pb2 as pb

from ..observe import answers, events, membership, requests
from ..world.world import World
from . import actions
from .desired import desired
from .reconcile import reconcile

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
"""Event -> the function that applies it to the world at a clock time."""
PASSES = 64
"""Most passes after one event. Each pass may change something that the next one responds to."""


def handle(world: World, event: events.Event, now: float) -> list[actions.Action]:
    """Handles one event at clock time `now` (seconds, monotonic). Returns the actions to execute, in order."""
    before, version = world.record.copy(), world.version
    OBSERVERS[type(event)](world, event, now)
    if isinstance(event, events.Tick):
        version = -1  # Policies also respond to the clock.
    elif world.version == version and world.news is None:
        return []
    ordered: list[actions.Action] = []
    for _ in range(PASSES):
        if world.version == version:
            break
        version = world.version
        ordered += reconcile(world, desired(world, now), now)
    for name, pipeline in world.pipelines.items():
        if (serving := pipeline.serving) is not None:
            # Store what serves, with the epoch that gateways were told to switch to.
            world.record.plans[name] = world.stored(serving, pipeline.beside)
    said = [actions.Log(message, warning) for message, warning in world.said]
    saved = [actions.Save(before, world.record.copy())] if world.record != before else []
    told = [actions.Publish(urgent=world.news)] if world.news is not None else []
    world.said.clear()
    world.news = None
    return [*saved, *said, *ordered, *told]
