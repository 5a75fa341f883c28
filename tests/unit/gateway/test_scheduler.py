"""The scheduler: steps in flight, equal steps, chunks that follow each other, fairness, preemption, pages."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagemesh.gateway.schedule.pages import PageAllocator
from stagemesh.gateway.schedule.plan import Plan
from stagemesh.gateway.schedule.scheduler import Scheduler
from stagemesh.gateway.schedule.sequence import Sequence, State

_first = itertools.count(1000)


def make(pages: int = 1000, steps: int = 3, seqs: int = 64, tokens: int = 32, page_size: int = 4) -> Scheduler:
    allocator = PageAllocator(pages, page_size)
    return Scheduler(allocator, steps_in_flight=steps, max_num_seqs=seqs, max_num_batched_tokens=tokens)


def sequence(length: int, max_tokens: int = 8) -> Sequence:
    """Its prompt begins like no other's: what sequences share is `test_prefix.py`'s business."""
    return Sequence((next(_first), *range(1, length)), 0, max_tokens)


def drain(scheduler: Scheduler) -> list[Plan]:
    plans = []
    while (plan := scheduler.next_plan()) is not None:
        plans.append(plan)
    return plans


def come_back(scheduler: Scheduler, plan: Plan) -> None:
    """The step's result: each sampled row gets token 7; a sequence that has enough is finished."""
    for row in plan.rows:
        entered = row.samples and scheduler.append_token(row.sequence, row.start + row.count, 7)
        if entered and len(row.sequence.log) >= row.sequence.max_tokens:
            scheduler.finish(row.sequence)
    scheduler.step_done(plan.step)


def test_the_next_step_does_not_wait_for_other_sequences() -> None:
    scheduler = make(steps=3, tokens=4)
    for _ in range(3):
        scheduler.add(sequence(4))
    plans = drain(scheduler)
    assert len(plans) >= 3, "three steps must be out before any result is back"
    assert [len(plan.rows) for plan in plans[:3]] == [1, 1, 1]


def test_a_step_runs_alone_when_nothing_can_compute_beside_it() -> None:
    scheduler = make(steps=2, tokens=8)
    scheduler.add(sequence(12, 60))
    assert [plan.alone for plan in drain(scheduler)] == [False, False, True], "chunks overlap, a decode step waits"
    while scheduler.out:
        come_back(scheduler, next(iter(scheduler.out.values())))
    assert [plan.alone for plan in drain(scheduler)] == [True, True]
    scheduler.add(sequence(4, 60))
    while scheduler.out:
        come_back(scheduler, next(iter(scheduler.out.values())))
    drain(scheduler)
    while scheduler.out:
        come_back(scheduler, next(iter(scheduler.out.values())))
    for _ in range(3):
        plans = drain(scheduler)
        assert [len(plan.rows) for plan in plans[:2]] == [1, 1]
        assert not any(plan.alone for plan in plans)
        while scheduler.out:
            come_back(scheduler, next(iter(scheduler.out.values())))


def test_with_one_step_in_flight_all_sequences_have_the_machine_to_themselves() -> None:
    """Each step waits for the tokens of the one before, so stages may use each other's cores for all rows."""
    scheduler = make(steps=1, tokens=32)
    for _ in range(3):
        scheduler.add(sequence(4, 60))
    first, second = drain(scheduler)
    assert (first.alone, [row.samples for row in first.rows]) == (True, [True] * 3)
    assert (second.alone, [row.result_of for row in second.rows]) == (True, [first.step] * 3)
    come_back(scheduler, first)
    (third,) = drain(scheduler)
    assert third.alone
    scheduler.add(sequence(60, 60))
    come_back(scheduler, second)
    (fourth,) = drain(scheduler)
    assert [row.count for row in fourth.rows] == [1, 1, 1, 29]
    assert fourth.alone, "decode rows make the next step wait, whatever prompt tokens are beside them"


def test_chunks_of_a_prompt_overlap_whatever_is_in_flight() -> None:
    scheduler = make(steps=1, tokens=8)
    scheduler.add(sequence(20, 60))
    assert [plan.alone for plan in drain(scheduler)] == [False, False]


def test_no_more_steps_than_allowed() -> None:
    scheduler = make(steps=2, tokens=4)
    for _ in range(10):
        scheduler.add(sequence(4))
    assert len(drain(scheduler)) == 2 * 2, "two that run, and the ones that follow them"
    assert scheduler.next_plan() is None


def test_chunks_of_one_prompt_follow_each_other_without_results() -> None:
    scheduler = make(steps=3, tokens=8)
    scheduler.add(sequence(20))
    plans = drain(scheduler)
    assert [(row.start, row.count, row.samples) for plan in plans for row in plan.rows][:3] == [
        (0, 8, False),
        (8, 8, False),
        (16, 4, True),
    ]


def test_the_next_token_is_planned_before_the_one_before_is_known() -> None:
    scheduler = make(steps=2)
    scheduler.add(sequence(4, max_tokens=3))
    first, second = drain(scheduler)
    assert [(row.start, row.samples, row.result_of) for row in first.rows + second.rows] == [(0, True, 0), (4, True, 1)]
    come_back(scheduler, first)
    (third,) = drain(scheduler)
    assert [(row.start, row.samples, row.result_of) for row in third.rows] == [(5, True, 2)], "its token is still out"
    come_back(scheduler, second)
    assert drain(scheduler) == [], "its last token is out: nothing is computed that nobody wants"
    come_back(scheduler, third)
    assert scheduler.pages.num_free == 1000


def test_a_token_that_is_known_is_told_as_it_is() -> None:
    scheduler = make(steps=2, tokens=4)
    scheduler.add(sequence(4, max_tokens=3))
    first, second = drain(scheduler)
    come_back(scheduler, first)
    come_back(scheduler, second)
    (third,) = drain(scheduler)
    (row,) = third.rows
    assert (row.start, row.result_of, row.sequence.tokens(5, 1)) == (5, 0, [7])


def test_a_prompt_goes_before_a_step_that_would_wait_for_its_token() -> None:
    scheduler = make(steps=3, tokens=8)
    running, prompt = sequence(4, max_tokens=9), sequence(40)
    scheduler.add(running)
    first = scheduler.next_plan()
    scheduler.add(prompt)
    plans = [first, *drain(scheduler)]
    named = [[row.sequence for row in plan.rows] for plan in plans if plan is not None]
    assert named[:3] == [[running], [prompt], [prompt]]
    assert named[3] == [running, prompt], "three stages: the token is back when two other steps have passed"


def test_sequences_take_turns_even_when_one_was_ahead() -> None:
    """In order, a stage would wait for each one's token in front of the other's step."""
    scheduler = make(steps=2)
    early, late = sequence(4, max_tokens=40), sequence(4, max_tokens=40)
    scheduler.add(early)
    drain(scheduler)
    scheduler.add(late)
    order: list[Sequence] = []
    for _ in range(30):
        order += [row.sequence for plan in drain(scheduler) for row in plan.rows]
        come_back(scheduler, next(iter(scheduler.out.values())))
    assert all(one is not two for one, two in itertools.pairwise(order[4:]))


def test_who_waited_longest_at_the_end_of_an_epoch_goes_first_at_the_next() -> None:
    scheduler = make(steps=3)
    for _ in range(6):
        scheduler.add(sequence(4, 60))
    for _ in range(10):
        # Until the last round that is out begins in the midst of those that run.
        drain(scheduler)
        come_back(scheduler, next(iter(scheduler.out.values())))
    waited: dict[int, None] = {}
    while scheduler.out:
        plan = next(iter(scheduler.out.values()))
        for row in plan.rows:
            waited.pop(row.sequence.ident, None)
            waited[row.sequence.ident] = None
        come_back(scheduler, plan)
    scheduler.rewind(next_step=3)
    named = [row.sequence.ident for plan in drain(scheduler)[:3] for row in plan.rows]
    assert named == list(waited)
    assert named != [s.ident for s in scheduler.running], "the story shows nothing"


def test_a_prompt_is_cut_by_the_budget_that_steps_cost() -> None:
    scheduler = make(tokens=256)
    scheduler.prefill_budget = 16
    scheduler.add(sequence(100))
    assert {row.count for plan in drain(scheduler)[:6] for row in plan.rows} == {16}


def test_prompts_of_a_length_go_one_after_the_other() -> None:
    scheduler = make(tokens=16)
    one, two = sequence(24), sequence(24)
    scheduler.add(one)
    scheduler.add(two)
    counts = [{row.sequence: row.count for row in plan.rows} for plan in drain(scheduler)[:3]]
    assert counts == [{one: 16}, {one: 8, two: 8}, {two: 16}]


def test_decode_rows_are_spread_over_steps() -> None:
    scheduler = make(steps=3, tokens=256)
    for _ in range(16):
        scheduler.add(sequence(2, max_tokens=1000))
    for _ in range(60):
        drain(scheduler)
        come_back(scheduler, next(iter(scheduler.out.values())))
    drain(scheduler)
    sizes = [len(plan.rows) for plan in scheduler.out.values()]
    assert max(sizes) <= 6, f"ceil(16 / 3) rows a step at most, got {sizes}"
    assert len(sizes) == 2 * 3


def test_a_long_prompt_does_not_starve_short_ones() -> None:
    scheduler = make(tokens=16)
    long = sequence(1000)
    scheduler.add(long)
    come_back(scheduler, scheduler.next_plan())  # type: ignore[arg-type]
    short = sequence(6)
    scheduler.add(short)
    plan = scheduler.next_plan()
    assert plan is not None
    counts = {row.sequence: row.count for row in plan.rows}
    assert counts == {long: 10, short: 6}


def test_short_prompts_do_not_starve_a_long_one() -> None:
    scheduler = make(tokens=16)
    long = sequence(64, max_tokens=1)
    scheduler.add(long)
    steps = 0
    while long.state is not State.FINISHED:
        scheduler.add(sequence(12, max_tokens=1))
        come_back(scheduler, scheduler.next_plan())  # type: ignore[arg-type]
        steps += 1
        assert steps < 20, "half of every step's budget is the oldest prompt's"


def test_pages_come_back_only_after_the_last_step_that_names_them() -> None:
    scheduler = make(pages=10)
    victim = sequence(8)
    scheduler.add(victim)
    first, second = drain(scheduler)
    scheduler.finish(victim)
    scheduler.step_done(first.step)
    assert scheduler.pages.num_free < 10, "a step is still out"
    scheduler.step_done(second.step)
    assert scheduler.pages.num_free == 10
    assert [closed.after_step for closed in scheduler.closed] == [second.step]


def test_tokens_after_the_end_are_dropped() -> None:
    scheduler = make()
    ended = sequence(4)
    scheduler.add(ended)
    plans = drain(scheduler)
    scheduler.finish(ended)
    for plan in plans:
        assert not scheduler.append_token(ended, plan.rows[0].start + plan.rows[0].count, 7)
        scheduler.step_done(plan.step)
    assert ended.log == []


def test_the_youngest_is_preempted_and_comes_back_with_its_log() -> None:
    scheduler = make(pages=9, steps=1, page_size=4)
    first, second = sequence(8, max_tokens=24), sequence(8, max_tokens=24)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(400):
        plan = scheduler.next_plan()
        if plan is None:
            break
        come_back(scheduler, plan)
    assert scheduler.preemptions > 0
    assert first.log == second.log == [7] * 24
    assert scheduler.pages.num_free == 9


class Worker:
    """What every worker checks of what it is told: order, positions, enough pages."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.lengths: dict[int, int] = {}
        self.pages: dict[int, list[int]] = {}

    def take(self, scheduler: Scheduler, plan: Plan) -> None:
        closed, scheduler.closed = scheduler.closed, []
        for entry in closed:
            del self.lengths[entry.sequence], self.pages[entry.sequence]
        for opened in plan.opened:
            assert opened.ident not in self.lengths
            self.lengths[opened.ident], self.pages[opened.ident] = 0, []
        for row in plan.rows:
            ident = row.sequence.ident
            assert row.count > 0
            if not self.pages[ident]:
                self.lengths[ident] = row.start  # Behind a prefix that others have computed.
            assert row.start == self.lengths[ident]
            self.lengths[ident] += row.count
            self.pages[ident] += row.new_pages
            assert len(self.pages[ident]) * self.page_size >= self.lengths[ident]
            assert all(0 <= page < self.num_pages for page in row.new_pages)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), pages=st.integers(12, 60), steps=st.integers(1, 5), tokens=st.integers(1, 40))
def test_any_story_ends_with_every_token_and_every_page(seed: int, pages: int, steps: int, tokens: int) -> None:
    rng = random.Random(seed)
    scheduler = make(pages=pages, steps=steps, tokens=tokens, seqs=rng.randint(1, 8))
    worker = Worker(pages, 4)
    wanted = [sequence(rng.randint(1, 30), rng.randint(1, 17)) for _ in range(12)]
    cancelled = set()
    pending = list(wanted)
    for _ in range(5000):
        if pending and rng.random() < 0.3:
            scheduler.add(pending.pop())
        if rng.random() < 0.02:
            target = rng.choice(wanted)
            if target not in pending and target.state is not State.FINISHED:
                scheduler.finish(target)
                cancelled.add(target)
        plan = scheduler.next_plan()
        if plan is not None:
            sampled = [row.sequence for row in plan.rows if row.samples]
            assert len(sampled) == len(set(sampled))
            worker.take(scheduler, plan)
        elif scheduler.out:
            come_back(scheduler, next(iter(scheduler.out.values())))
        elif not pending:
            break
    assert not scheduler.out
    assert not scheduler.waiting
    for ended in wanted:
        assert ended.state is State.FINISHED
        assert ended in cancelled or len(ended.log) == ended.max_tokens
    assert scheduler.pages.num_free == pages


def test_a_page_freed_twice_is_noticed() -> None:
    allocator = PageAllocator(4, 4)
    pages = allocator.allocate(2)
    assert pages is not None
    allocator.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(pages)
