"""From one epoch to the next: what is lost in the midst is not gone on from."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast
from unittest.mock import MagicMock

import pytest
from prefix_world import make

from stagemesh.errors import StageLost
from stagemesh.gateway.batch_loop import BatchLoop
from stagemesh.gateway.handover import Handover
from stagemesh.gateway.plan import Plan
from stagemesh.gateway.seat import Seat
from stagemesh.gateway.work import Shape, Work


def loop(epoch: int, pages: int) -> MagicMock:
    """Of a pipeline that opens its sessions at once, and across which a token goes."""
    made = MagicMock(lost=None, share=pages, view=SimpleNamespace(pipeline_id="p", epoch=epoch))
    made.shape = Shape(tuple(range(pages)), 4, 3)

    async def opened(*_: object) -> None:
        return None

    made.open = opened
    made.begin_probe = lambda page: SimpleNamespace(done=True)
    return made


def story(end: str) -> tuple[MagicMock, MagicMock, Work, Handover]:
    work = Work(lambda shape: make(pages=len(shape.pages)))
    work.begin(Shape(tuple(range(16)), 4, 3), [])
    old, new = loop(1, 16), loop(2, 8)
    handover = Handover(cast(BatchLoop, old), cast(BatchLoop, new), work, [])
    work.scheduler.out[1] = Plan(1, [], alone=False)

    async def run() -> None:
        running = asyncio.create_task(handover.run(Seat("g")))
        while not old.pause.called:
            assert not running.done(), running.exception()
            await asyncio.sleep(0)
        if end == "lost":
            # What a loop does that is lost: nothing of it is out any more.
            old.lost = StageLost("a stream broke")
        work.scheduler.out.clear()
        old.on_progress()
        await running

    asyncio.run(run())
    return old, new, work, handover


def test_with_fewer_pages_it_goes_over() -> None:
    old, new, work, _ = story("well")
    assert old.retire.called
    assert new.take_over.called
    assert work.scheduler.pages.num_pages == 8
    assert work.scheduler.pages.num_free == 8


def test_what_is_lost_while_its_last_steps_come_back_is_not_gone_on_from() -> None:
    with pytest.raises(StageLost, match="p epoch 1: a stream broke"):
        story("lost")
