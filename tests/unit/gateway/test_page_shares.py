"""Fewer pages, or more, while sequences run: who keeps which, and who has to start over."""

from __future__ import annotations

import asyncio
import random
from unittest.mock import MagicMock

import pytest
from prefix_world import SIZE, come_back, make
from test_pages import chunks, fill

from stagemesh.errors import Unavailable
from stagemesh.gateway.drive.ledger import Ledger
from stagemesh.gateway.drive.loop import BatchLoop, Observers
from stagemesh.gateway.schedule.pages import ROOT, PageAllocator, Shape
from stagemesh.gateway.schedule.scheduler import Scheduler
from stagemesh.gateway.schedule.sequence import Sequence, State
from stagemesh.gateway.session.messages import page_bits
from stagemesh.gateway.session.slot_lease import SlotLease
from stagemesh.gateway.timing import GatewayTiming
from stagemesh.protos.v1 import types_pb2


def test_those_in_use_are_kept_then_what_was_of_use_last() -> None:
    allocator = PageAllocator(8, SIZE)
    old, new = fill(allocator, 1), fill(allocator, 2)
    held = allocator.allocate(3)
    assert held is not None
    kept = allocator.choose(4)
    assert set(kept) == {*held, *new}
    allocator.restrict(kept)
    assert (allocator.num_pages, allocator.num_held, allocator.num_free) == (4, 3, 1)
    assert allocator.find(ROOT, chunks(2)) == new
    assert allocator.find(ROOT, chunks(1)) == [], old
    assert allocator.allocate(1) == new
    assert allocator.allocate(1) is None
    allocator.free(held)
    assert allocator.num_free == 3


def test_more_pages_get_the_lowest_ids_that_are_not_in_use() -> None:
    allocator = PageAllocator(8, SIZE)
    pages = allocator.allocate(8)
    assert pages is not None
    allocator.free([p for p in pages if p not in (2, 5, 7)])
    allocator.restrict(allocator.choose(3))
    assert allocator.ids == {2, 5, 7}
    more = allocator.choose(6)
    assert more == [0, 1, 2, 3, 5, 7]
    allocator.restrict(more)
    fresh = allocator.allocate(3)
    assert fresh is not None
    assert set(fresh) == {0, 1, 3}
    allocator.restrict(allocator.choose(20))
    assert allocator.ids == set(range(20))


def test_ids_as_the_wire_has_them() -> None:
    assert page_bits([]) == b""
    assert page_bits([0, 2, 9]) == bytes([0b101, 0b10])
    assert page_bits([15]) == bytes([0, 0x80])


def start(scheduler: Scheduler, *lengths: int) -> list[Sequence]:
    """Sequences that run, their prompts computed."""
    sequences = [Sequence(tuple(range(100 * n, 100 * n + length)), 0, 20) for n, length in enumerate(lengths)]
    for sequence in sequences:
        scheduler.add(sequence)
    while (plan := scheduler.next_plan()) is not None:
        come_back(scheduler, plan)
        if all(s.log for s in sequences):
            break
    return sequences


def test_the_youngest_start_over_when_what_runs_does_not_fit() -> None:
    scheduler = make(pages=16)
    first, second, third = start(scheduler, 3 * SIZE, 3 * SIZE, 3 * SIZE)
    logs = [list(s.log) for s in (first, second, third)]
    scheduler.fit(9)
    assert third.state is State.WAITING
    assert [first.state, second.state] == [State.RUNNING] * 2
    assert scheduler.fits
    scheduler.pages.restrict(scheduler.pages.choose(9))
    assert [list(s.log) for s in (first, second, third)] == logs, "nothing that was promised is lost"
    assert scheduler.preemptions == 1


def test_what_is_out_comes_back_before_it_fits() -> None:
    scheduler = make(pages=16)
    start(scheduler, 3 * SIZE, 3 * SIZE, 3 * SIZE)
    while scheduler.next_plan() is not None:
        pass
    scheduler.fit(5)
    assert not scheduler.fits
    with pytest.raises(AssertionError, match="are held, more than 5"):
        scheduler.pages.choose(5)
    while scheduler.out:
        come_back(scheduler, scheduler.out[min(scheduler.out)])
    assert scheduler.fits


def test_a_sequence_that_goes_on_elsewhere_leaves_nothing() -> None:
    scheduler, other = make(pages=16), make(pages=16)
    running, waiting = start(scheduler, 3 * SIZE)[0], Sequence((1, 2, 3), 0, 5)
    scheduler.add(waiting)
    scheduler.rewind()
    log = list(running.log)
    for sequence in (running, waiting):
        scheduler.withdraw(sequence)
        other.add(sequence)
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.pages.num_free == 16
    assert running.state is waiting.state is State.WAITING
    while running.length < 3 * SIZE + 8:
        plan = other.next_plan()
        assert plan is not None
        come_back(other, plan)
    assert running.log[: len(log)] == log


def test_at_random_nobody_holds_what_is_not_there() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    allocator, held = PageAllocator(24, SIZE), list[list[int]]()
    for _ in range(2000):
        if rng.random() < 0.5 and (pages := allocator.allocate(rng.randrange(1, 5))) is not None:
            held.append(pages)
        elif held:
            allocator.free(held.pop(rng.randrange(len(held))))
        if rng.random() < 0.1:
            allocator.restrict(allocator.choose(rng.randrange(max(1, allocator.num_held), 40)))
        used = [page for pages in held for page in pages]
        assert len(set(used)) == len(used)
        assert set(used) <= allocator.ids
        assert allocator.num_held == len(used)
        assert allocator.num_free == allocator.num_pages - len(used)


def test_pages_that_a_session_does_not_ask_for_are_given_up_before_it_is_opened() -> None:
    """A stage may let others have them, and another stage refuse the session: they are not what they were then."""
    view = types_pb2.PipelineView(stages=[types_pb2.StageView(num_pages=4, address="127.0.0.1:1")])
    ledger = Ledger(lambda shape: make(pages=len(shape.pages)))
    ledger.begin(Shape(tuple(range(8)), SIZE, 3), [])
    cached = fill(ledger.scheduler.pages, 1, 2, 3, 4, 5, 6)
    kept: list[frozenset[int]] = []

    async def start() -> None:
        observers = Observers(MagicMock(), MagicMock(), GatewayTiming(), lambda: 0.0)
        loop = BatchLoop(view, ledger, observers, asyncio.Event(), MagicMock(), MagicMock())
        starting = asyncio.create_task(loop.start(SlotLease("g", lambda: None)))
        await asyncio.sleep(0)  # Nobody listens there: what is given up is given up before that is known.
        kept.append(ledger.scheduler.pages.ids)
        with pytest.raises(Unavailable):
            await starting
        await loop.close()

    asyncio.run(start())
    assert len(kept[0]) == 4
    assert ledger.scheduler.pages.ids == kept[0]
    found = ledger.scheduler.pages.find(ROOT, chunks(1, 2, 3, 4, 5, 6))
    assert set(found) <= kept[0], cached
