"""A coordinator that is not sure any more to be the only one, or could not carry out an order, gives no more."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

import pytest
from mesh_world import Story, introduction

from stagemesh.coordinator.service.service import CoordinatorService
from stagemesh.coordinator.service.slots import Slots
from stagemesh.coordinator.state.store import Store
from stagemesh.coordinator.world.record import Record


def make_service(story: Story, store: Store, is_leader: Callable[[], bool] = lambda: True) -> CoordinatorService:
    slots = Slots({}, now=0.0, quarantine_s=60.0)
    return CoordinatorService(story.world, store, slots, clock=lambda: story.now, is_leader=is_leader)


def test_events_are_of_no_use_to_one_that_may_be_another_by_now() -> None:
    async def told() -> None:
        story, sure = Story(), [False]
        service = make_service(story, Store(None), lambda: sure[0])
        came = introduction("a")
        service.post(came)
        assert not story.world.workers
        sure[0] = True
        service.post(came)
        assert list(story.world.workers) == ["a"]
        await service.stop()

    asyncio.run(told())


class FullDisk(Store):
    """It can be read, and not be written."""

    def save(self, before: Record, after: Record, terms: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_one_that_could_not_write_ends_though_a_worker_s_call_met_it() -> None:
    """Its core takes the order for carried out: whoever comes next shall begin with what is written down."""

    async def told() -> None:
        story = Story()
        service = make_service(story, FullDisk(None))
        story.now += 1000  # Nobody of before is waited for any more.
        *first, last = (introduction(f"w{stage}") for stage in range(story.world.target.num_stages))
        for info in first:
            service.post(info)
        with pytest.raises(OSError, match="No space left"):
            service.post(last)
        known = len(story.world.workers)
        service.post(introduction("late"))
        assert len(story.world.workers) == known
        with pytest.raises(OSError, match="No space left"):
            await asyncio.wait_for(service.run(), 5)
        await service.stop()

    asyncio.run(told())
