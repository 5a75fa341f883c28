"""Pages that go to another worker while steps write them: in the end they hold there what they hold here."""

from __future__ import annotations

import random

import pytest
from prefix_world import SIZE, come_back, make

from stagemesh.gateway.schedule.copying import PageCopier
from stagemesh.gateway.schedule.plan import Plan
from stagemesh.gateway.schedule.scheduler import Scheduler
from stagemesh.gateway.schedule.sequence import Sequence

Store = dict[int, dict[int, int]]
"""Page -> offset in it -> token."""


def write(store: Store, plan: Plan) -> None:
    """What a worker does with a step."""
    for row in plan.rows:
        for position in range(row.start, row.start + row.count):
            known = row.sequence.tokens(position, 1)
            page = store.setdefault(row.sequence.pages[position // SIZE], {})
            page[position % SIZE] = known[0] if known else -1


def read(store: Store, scheduler: Scheduler) -> list[list[int | None]]:
    """What every running sequence finds in its pages."""
    return [[store.get(s.pages[p // SIZE], {}).get(p % SIZE) for p in range(s.computed)] for s in scheduler.running]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_runs_meanwhile(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    scheduler = make(pages=60, steps=3, tokens=24)
    here: Store = {}
    there: Store = {}
    out: list[Plan] = []
    copier: PageCopier | None = None

    def step() -> None:
        """Something happens: a request comes, a step goes out, or the oldest one runs and comes back."""
        what = rng.random()
        if what < 0.2:
            prompt = tuple(rng.randrange(3) for _ in range(rng.randrange(1, 40)))
            scheduler.add(Sequence(prompt, 0, rng.randrange(1, 30)))
        elif what < 0.6:
            plan = scheduler.next_plan()
            if plan is not None:
                out.append(plan)
                if copier is not None:
                    copier.note(plan)
        elif out:
            plan = out.pop(0)
            write(here, plan)
            come_back(scheduler, plan)

    def copy(pages: list[int]) -> None:
        for page in pages:
            there[page] = dict(here.get(page, {}))

    for _ in range(rng.randrange(200)):
        step()
    copier = PageCopier(scheduler)
    for _ in range(rng.randrange(200)):
        step()
        if rng.random() < 0.3:
            copy(copier.next(rng.randrange(1, 6)))
    while out:
        plan = out.pop(0)
        write(here, plan)
        come_back(scheduler, plan)
        # As a step comes back, behind which nothing is planned any more.
        copy(copier.next())
    assert not scheduler.out
    copy(copier.next())
    assert read(there, scheduler) == read(here, scheduler)
    for page in scheduler.pages.idle:
        assert there.get(page) == here.get(page), "a page that others can still take over"


def test_only_pages_that_are_written_all_the_time_are_left_for_the_end() -> None:
    scheduler = make(pages=100)
    scheduler.add(Sequence(tuple(range(20)), 0, 50))
    for _ in range(8):
        while (plan := scheduler.next_plan()) is not None:
            last = plan
        come_back(scheduler, scheduler.out[min(scheduler.out)])
    copier = PageCopier(scheduler)
    copied: list[int] = []
    while pages := copier.next(2):
        copied += pages
    (sequence,) = scheduler.running
    assert copied == sorted(sequence.pages[: len(copied)])
    assert len(copied) >= 5
    computed = sequence.computed
    while scheduler.out:
        come_back(scheduler, scheduler.out[min(scheduler.out)])
    assert set(copier.next()) == set(sequence.pages[len(copied) : -(-computed // SIZE)])
    assert last.rows[0].sequence is sequence
