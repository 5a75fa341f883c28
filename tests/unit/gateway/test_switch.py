"""From one epoch to the next: what is lost in the midst is not gone on from."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast
from unittest.mock import MagicMock

import pytest
from prefix_world import make

from stagemesh.errors import StageLost
from stagemesh.gateway.drive.ledger import Ledger
from stagemesh.gateway.drive.loop import BatchLoop
from stagemesh.gateway.drive.switch import Switch
from stagemesh.gateway.schedule.pages import Shape
from stagemesh.gateway.schedule.sequence import Sequence
from stagemesh.gateway.session.slot_lease import SlotLease
from stagemesh.gateway.timing import GatewayTiming
from stagemesh.protos.v1 import stage_pb2, types_pb2


def loop(epoch: int, pages: int) -> MagicMock:
    """Of a pipeline that opens its sessions at once, and across which a token goes."""
    made = MagicMock(lost=None, view=SimpleNamespace(pipeline_id="p", epoch=epoch))
    made.session.share = pages
    made.session.shape = Shape(tuple(range(pages)), 4, 3)
    made.session.copy_pages = lambda stage: 4

    async def opened(*_: object) -> None:
        return None

    made.open = opened
    made.copied, made.out_when_told = set(), []
    made.crossed = True
    return made


def story(end: str, num_steps: int = 1) -> tuple[MagicMock, MagicMock, Ledger]:
    """A pipeline goes over while so many steps are out, each of one sequence that computes its first page."""
    ledger = Ledger(lambda shape: make(pages=len(shape.pages)))
    ledger.begin(Shape(tuple(range(16)), 4, 3), [])
    old, new = loop(1, 16), loop(2, 8)
    scheduler = ledger.scheduler
    for number in range(num_steps):
        scheduler.add(Sequence((number, 1, 1, 1), 0, 9))
        assert scheduler.next_plan() is not None

    async def run() -> None:
        progress = asyncio.Event()
        copies = [types_pb2.KvCopy(index=0, from_stage=0, to_stage=1)]
        switch = Switch(cast(BatchLoop, old), cast(BatchLoop, new), ledger, copies, progress, GatewayTiming())
        running = asyncio.create_task(switch.run(SlotLease("g", lambda: None)))
        while not old.pause.called:
            assert not running.done(), running.exception()
            await asyncio.sleep(0)
        for step in list(scheduler.out):
            if end == "lost":
                # What a loop does that is lost: nothing of it is out any more.
                old.lost = StageLost("a stream broke")
                ledger.end()
            else:
                scheduler.step_done(step)
            new.copied |= {(0, message.copy.number) for message in told(old)}
            progress.set()
            while scheduler.out and len(told(old)) < step and not running.done():
                await asyncio.sleep(0)
            old.out_when_told.append(len(scheduler.out))
        await running

    asyncio.run(asyncio.wait_for(run(), 20))
    return old, new, ledger


def told(made: MagicMock) -> list[stage_pb2.RunRequest]:
    """Messages to its stages."""
    return [call.args[1] for call in made.session.tell.call_args_list]


def test_with_fewer_pages_it_goes_over() -> None:
    old, new, ledger = story("well")
    assert old.retire.called
    assert new.take_over.called
    assert ledger.scheduler.pages.num_pages == 8
    assert ledger.scheduler.pages.num_free == 8 - len(ledger.scheduler.running[0].pages), "the probe's page is free"


def test_pages_of_a_step_that_is_back_do_not_wait_for_the_others() -> None:
    old, new, ledger = story("well", num_steps=3)
    assert old.out_when_told == [2, 1, 0]
    assert [list(message.copy.pages) for message in told(old)] == [[s.pages[0]] for s in ledger.scheduler.running]
    assert [m.copy.number for m in told(new)] == [m.copy.number for m in told(old)]


def test_what_is_lost_while_its_last_steps_come_back_is_not_gone_on_from() -> None:
    with pytest.raises(StageLost, match="p epoch 1: a stream broke"):
        story("lost")


def test_a_probes_page_is_freed_once_whatever_ends_first() -> None:
    ledger = Ledger(lambda shape: make(pages=len(shape.pages)))
    shape = Shape(tuple(range(4)), 4, 3)
    ledger.begin(shape, [])
    page = ledger.quarantine_page()
    assert page is not None
    ledger.end()
    ledger.release([page])
    ledger.release([page])
    late = ledger.quarantine_page()
    assert late is not None
    assert ledger.scheduler.pages.num_free == 3
    # Nobody told its end, as the epoch that it was for was given up: it is free when the next one begins.
    ledger.begin(shape, [])
    assert ledger.scheduler.pages.num_free == 4
    ledger.release([late])
    assert ledger.scheduler.pages.num_free == 4


def test_a_page_of_a_probe_does_not_outlive_pages_of_another_size() -> None:
    ledger = Ledger(lambda shape: make(pages=len(shape.pages)))
    ledger.begin(Shape(tuple(range(4)), 4, 3), [])
    assert ledger.quarantine_page() is not None
    ledger.begin(Shape(tuple(range(8)), 8, 3), [])
    assert ledger.scheduler.pages.num_free == 8
    ledger.end()
