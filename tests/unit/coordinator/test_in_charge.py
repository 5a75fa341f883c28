"""A coordinator that is not sure any more to be the only one gives no orders."""

from __future__ import annotations

import asyncio

from mesh_world import LIMITS, World

from stagemesh.coordinator import events
from stagemesh.coordinator import values as v
from stagemesh.coordinator.driver import Driver
from stagemesh.coordinator.service import CoordinatorService
from stagemesh.coordinator.slots import Slots
from stagemesh.coordinator.store import Store
from stagemesh.coordinator.views import limits
from stagemesh.protos.v1 import types_pb2


def test_events_are_of_no_use_to_one_that_may_be_another_by_now() -> None:
    async def story() -> None:
        world, sure = World(), [False]
        model = types_pb2.ModelRef()
        service = CoordinatorService(
            world.mesh,
            Store(None),
            Slots({}, now=0.0),
            model,
            lambda post: Driver(post, model, limits(LIMITS)),
            clock=lambda: world.now,
            in_charge=lambda: sure[0],
        )
        came = events.WorkerRegistered(v.WorkerInfo("a", 1, "a:1"))
        service.post(came)
        assert not world.mesh.workers
        sure[0] = True
        service.post(came)
        assert list(world.mesh.workers) == ["a"]
        await service.stop()

    asyncio.run(story())
