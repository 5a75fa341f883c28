"""A coordinator that is not sure any more to be the only one, or could not carry out an order, gives no more."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

import pytest
from mesh_world import LIMITS, World

from stagemesh.coordinator import events
from stagemesh.coordinator import values as v
from stagemesh.coordinator.driver import Driver
from stagemesh.coordinator.service import CoordinatorService
from stagemesh.coordinator.slots import Slots
from stagemesh.coordinator.store import Store
from stagemesh.coordinator.views import limits
from stagemesh.protos.v1 import types_pb2


def make_service(world: World, store: Store, in_charge: Callable[[], bool] = lambda: True) -> CoordinatorService:
    model = types_pb2.ModelRef()
    return CoordinatorService(
        world.mesh,
        store,
        Slots({}, now=0.0),
        model,
        lambda post: Driver(post, model, limits(LIMITS)),
        clock=lambda: world.now,
        in_charge=in_charge,
    )


def test_events_are_of_no_use_to_one_that_may_be_another_by_now() -> None:
    async def story() -> None:
        world, sure = World(), [False]
        service = make_service(world, Store(None), lambda: sure[0])
        came = events.WorkerRegistered(v.WorkerInfo("a", 1, "a:1"))
        service.post(came)
        assert not world.mesh.workers
        sure[0] = True
        service.post(came)
        assert list(world.mesh.workers) == ["a"]
        await service.stop()

    asyncio.run(story())


class FullDisk(Store):
    """It can be read, and not be written."""

    def save_epoch(self, pipeline_id: str, epoch: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_one_that_could_not_write_ends_though_a_worker_s_call_met_it() -> None:
    """Its core takes the order for carried out: whoever comes next shall begin with what is written down."""

    async def story() -> None:
        world = World()
        service = make_service(world, FullDisk(None))
        world.now += 1000  # Nobody of before is waited for any more.
        *first, last = (v.WorkerInfo(f"w{stage}", 1, f"w{stage}:1") for stage in range(world.mesh.target.num_stages))
        for info in first:
            service.post(events.WorkerRegistered(info))
        with pytest.raises(OSError, match="No space left"):
            service.post(events.WorkerRegistered(last))
        known = len(world.mesh.workers)
        service.post(events.WorkerRegistered(v.WorkerInfo("late", 1, "late:1")))
        assert len(world.mesh.workers) == known
        with pytest.raises(OSError, match="No space left"):
            await asyncio.wait_for(service.run(), 5)
        await service.stop()

    asyncio.run(story())
