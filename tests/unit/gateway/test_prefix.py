"""Prefix caching: which pages are taken over, and when they are offered."""

from __future__ import annotations

from prefix_world import SIZE, come_back, make

from stagemesh.gateway.schedule.scheduler import Scheduler
from stagemesh.gateway.schedule.sequence import Sequence, State


def run_all(scheduler: Scheduler) -> list[tuple[Sequence, int, int]]:
    """(sequence, start, count) of every row until nothing is left to do."""
    rows: list[tuple[Sequence, int, int]] = []
    for _ in range(5000):
        while (plan := scheduler.next_plan()) is not None:
            rows += [(row.sequence, row.start, row.count) for row in plan.rows]
        if not scheduler.out:
            return rows
        come_back(scheduler, next(iter(scheduler.out.values())))
    raise AssertionError("the sequences do not come to an end")


def prefill_of(rows: list[tuple[Sequence, int, int]], sequence: Sequence) -> list[tuple[int, int]]:
    return [(start, count) for s, start, count in rows if s is sequence and start < len(sequence.prompt)]


def test_a_prompt_that_begins_alike_starts_behind_the_common_pages() -> None:
    scheduler = make()
    first = Sequence(tuple(range(10)), 0, 1)
    scheduler.add(first)
    run_all(scheduler)
    second = Sequence((*range(9), 77, 78, 79), 0, 1)
    scheduler.add(second)
    assert prefill_of(run_all(scheduler), second) == [(8, 4)], "two full pages of four are common"
    assert second.cached_tokens == 8


def test_one_token_at_least_is_computed() -> None:
    scheduler = make()
    for expected in ([(0, 8)], [(4, 4)]):
        sequence = Sequence(tuple(range(8)), 0, 1)
        scheduler.add(sequence)
        assert prefill_of(run_all(scheduler), sequence) == expected


def test_equal_pages_behind_different_ones_are_not_mistaken() -> None:
    scheduler = make()
    for prompt in ((1, 1, 1, 1, 5, 5, 5, 5, 9), (2, 2, 2, 2, 5, 5, 5, 5, 9)):
        sequence = Sequence(prompt, 0, 1)
        scheduler.add(sequence)
        assert prefill_of(run_all(scheduler), sequence) == [(0, 9)]


def test_the_next_turn_of_a_chat_finds_the_answer_of_the_last() -> None:
    scheduler = make()
    first = Sequence(tuple(range(6)), 0, 7)
    scheduler.add(first)
    run_all(scheduler)
    second = Sequence((*first.prompt, *first.log, 50, 51), 0, 1)
    scheduler.add(second)
    # 13 tokens, of which the last was drawn and never computed: three full pages.
    assert prefill_of(run_all(scheduler), second) == [(12, 3)]


def test_pages_are_offered_when_their_step_is_back_and_not_before() -> None:
    scheduler = make(tokens=8, steps=4)
    first = Sequence(tuple(range(24)), 0, 100)
    scheduler.add(first)
    plans = [scheduler.next_plan() for _ in range(3)]
    come_back(scheduler, plans[0])  # type: ignore[arg-type]
    # Eight positions are confirmed, 24 planned; it shares the first 12, too little to wait for.
    second = Sequence((*range(12), *range(100, 130)), 0, 1)
    scheduler.add(second)
    plan = scheduler.next_plan()
    assert plan is not None
    assert [(row.start, row.count) for row in plan.rows if row.sequence is second] == [(8, 8)]


def test_choices_of_one_prompt_wait_for_the_first_instead_of_computing_beside_it() -> None:
    scheduler = make(tokens=8)
    choices = [Sequence(tuple(range(41)), number, 3) for number in range(8)]
    for choice in choices:
        scheduler.add(choice)
    rows = run_all(scheduler)
    assert sum(count for choice in choices for _, count in prefill_of(rows, choice)) == 41 + 7 * 1
    assert {tuple(choice.log) for choice in choices} == {tuple(choices[0].log)}
    assert scheduler.pages.num_free == scheduler.pages.num_pages


def test_who_waits_goes_on_by_itself_when_the_first_ends() -> None:
    scheduler = make(tokens=8, steps=1)
    first, second = (Sequence(tuple(range(40)), 0, 1) for _ in range(2))
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.next_plan()
    assert plan is not None
    assert [row.sequence for row in plan.rows] == [first]
    scheduler.finish(first)
    come_back(scheduler, plan)
    assert prefill_of(run_all(scheduler), second)[0] == (8, 8), "what the first had computed is used"
    assert len(second.log) == 1


def test_a_preempted_sequence_finds_its_own_pages() -> None:
    scheduler = make(pages=11, steps=1)
    sequences = [Sequence(tuple(range(at, at + 8)), 0, 24) for at in (0, 100)]
    for sequence in sequences:
        scheduler.add(sequence)
    rows = run_all(scheduler)
    assert scheduler.preemptions > 0
    again = [start for s, start, count in rows if s is sequences[1] and count > 1]
    assert again[0] == 0
    assert all(start > 0 for start in again[1:])
    assert all(len(sequence.log) == 24 for sequence in sequences)


def test_shared_pages_need_not_be_free_to_be_admitted() -> None:
    scheduler = make(pages=12, tokens=256)
    long = tuple(range(32))
    scheduler.add(first := Sequence((*long, 1), 0, 3))
    come_back(scheduler, scheduler.next_plan())  # type: ignore[arg-type]
    scheduler.add(second := Sequence((*long, 2), 0, 3))
    scheduler.next_plan()
    assert [first.state, second.state] == [State.RUNNING] * 2, "9 pages each, 8 of them shared, of 12"


def test_without_caching_everything_is_computed() -> None:
    scheduler = make(caching=False)
    for _ in range(2):
        sequence = Sequence(tuple(range(10)), 0, 1)
        scheduler.add(sequence)
        assert prefill_of(run_all(scheduler), sequence) == [(0, 10)]


def test_pages_of_a_failed_sequence_are_not_offered() -> None:
    scheduler = make(tokens=8)
    first = Sequence(tuple(range(16)), 0, 1)
    scheduler.add(first)
    chunk, last = scheduler.next_plan(), scheduler.next_plan()
    assert chunk is not None
    assert last is not None
    come_back(scheduler, chunk)
    scheduler.failed(first)
    scheduler.finish(first)
    scheduler.step_done(last.step)
    second = Sequence(tuple(range(16)), 0, 1)
    scheduler.add(second)
    assert prefill_of(run_all(scheduler), second)[0][0] == 0


def test_what_was_computed_behind_pages_of_a_failed_sequence_is_not_taken_over() -> None:
    scheduler = make(steps=1, tokens=4)
    first = Sequence((0,) * 6, 0, 1)
    scheduler.add(first)
    plans = [scheduler.next_plan(), scheduler.next_plan()]
    assert plans[0] is not None
    come_back(scheduler, plans[0])
    # Both begin with the first one's page; one of them waits for the other's next.
    others = [Sequence((0,) * 20, number, 1) for number in range(2)]
    for other in others:
        scheduler.add(other)
    scheduler.next_plan()
    assert [other.taken_over for other in others] == [SIZE, SIZE]
    assert others[1].follows is others[0]
    scheduler.failed(first)
    scheduler.finish(first)
    assert plans[1] is not None
    scheduler.step_done(plans[1].step)
    rows = run_all(scheduler)
    assert sum(count for start, count in prefill_of(rows, others[1])) == 16, "took over what the other computed"
    last = Sequence((0,) * 20, 0, 1)
    scheduler.add(last)
    assert prefill_of(run_all(scheduler), last)[0][0] == 0
