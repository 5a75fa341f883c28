"""When a draft model on the last stage is asked, and for how many tokens."""

from __future__ import annotations

import pytest

from stagemesh.gateway.schedule.draft_model import TRY_EVERY, DraftModelGuesser, GuessCosts, best_count
from stagemesh.gateway.schedule.pages import PageAllocator
from stagemesh.gateway.schedule.scheduler import Scheduler
from stagemesh.gateway.schedule.sequence import Sequence, State
from stagemesh.gateway.schedule.speculation import Speculation

TWO_STAGES = [(0.5, 0.01), (0.5, 0.01)]
"""Seconds of a step and of a token."""


@pytest.mark.parametrize(
    ("chance", "guess_s", "streams", "expected"),
    [
        (0.95, 0.1, 1, 4),
        (0.5, 0.1, 1, 2),
        (0.05, 0.1, 1, 0),
        (0.6, 0.7, 1, 0),
        (0.6, 0.2, 1, 2),
        (0.5, 0.3, 1, 1),
        (0.5, 0.3, 4, 0),
        (0.5, 0.05, 64, 0),
    ],
    ids=["sure", "even", "hardly ever", "dear", "cheap", "alone", "one of many", "where a token more is dear"],
)
def test_as_many_as_bring_most_tokens_a_second(chance: float, guess_s: float, streams: int, expected: int) -> None:
    assert best_count(chance, 4, GuessCosts(TWO_STAGES, guess_s), streams, 2) == expected


def test_before_costs_are_known_what_is_likely_is_asked_for() -> None:
    assert [best_count(chance, 4, GuessCosts(), 1, 2) for chance in (0.1, 0.5, 0.8)] == [0, 1, 4]


def test_where_guesses_fail_it_stops_and_tries_again_now_and_then() -> None:
    guesser = DraftModelGuesser(4, 2, GuessCosts(TWO_STAGES, 0.3))
    sequence = Sequence((1,) * 5, 0, 1000)
    asked = []
    for _ in range(3 * TRY_EVERY):
        wanted = guesser.ask(sequence, 1)
        asked.append(wanted)
        if wanted:
            guesser.told(sequence, [9] * wanted)
            guesser.verified(sequence, wanted, 0)
        sequence.log.append(1)
    assert asked[0] > 0
    tries = [i for i, wanted in enumerate(asked) if i > TRY_EVERY / 2 and wanted]
    assert len(tries) == 2
    assert tries[1] - tries[0] == TRY_EVERY


def test_a_try_holds_nobody_up_and_what_pays_does() -> None:
    guesser = DraftModelGuesser(4, 2, GuessCosts(TWO_STAGES, 0.1))
    good, bad = Sequence((1,), 0, 100), Sequence((2,), 0, 100)
    for _ in range(50):
        guesser.verified(bad, 1, 0)
        guesser.verified(good, 4, 4)
    assert guesser.ask(good, 2) == 4
    assert [guesser.ask(bad, 2) for _ in range(TRY_EVERY)][-1] == 1
    assert (guesser.waits(good), guesser.gathers(good)) == (True, True)
    assert (guesser.waits(bad), guesser.gathers(bad)) == (True, False)


def test_nothing_is_kept_of_a_sequence_that_ended_on_a_draft_row() -> None:
    guesser = DraftModelGuesser(2, 2, GuessCosts(TWO_STAGES, 0.01))
    scheduler = Scheduler(
        PageAllocator(20, 4), steps_in_flight=2, max_num_seqs=4, max_num_batched_tokens=64, guesser=guesser
    )
    scheduler.add(Sequence((1, 2, 3), 0, 40))
    while (plan := scheduler.next_plan()) is not None:
        row = plan.rows[0]
        start = row.start + row.count - len(row.draft)
        for position in range(start, row.start + row.count + 1):
            # A stop string in the midst of what was guessed.
            if scheduler.append_token(row.sequence, position, 7) and row.draft and len(row.sequence.log) == 8:
                scheduler.finish(row.sequence)
        if row.sequence.state is not State.FINISHED and row.guesses:
            scheduler.speculation.guesser.told(row.sequence, [7] * row.guesses)
        scheduler.step_done(plan.step)
    assert not scheduler.running
    assert scheduler.speculation.take_counts()[1] > 4
    assert not len(guesser), "nothing is remembered of what has ended"


def test_a_new_sequence_begins_with_what_others_showed() -> None:
    guesser = DraftModelGuesser(4, 2, GuessCosts(TWO_STAGES, 0.2))
    for _ in range(100):
        guesser.verified(Sequence((1,), 0, 10), 4, 0)
    assert guesser.ask(Sequence((1,), 0, 10), 1) == 0
    for _ in range(100):
        guesser.verified(Sequence((1,), 0, 10), 4, 4)
    assert guesser.ask(Sequence((1,), 0, 10), 1) == 4


def test_guesses_behind_other_tokens_are_not_used() -> None:
    guesser = DraftModelGuesser(4, 2, GuessCosts(TWO_STAGES, 0.01))
    sequence = Sequence((1, 2), 0, 10)
    guesser.told(sequence, [3, 4])
    assert guesser.guess(sequence) == [3, 4]
    sequence.log.append(3)
    assert guesser.guess(sequence) == []


def test_no_more_are_asked_for_than_are_wanted() -> None:
    for left, expected in ((1, 0), (2, 0), (3, 1), (9, 4)):
        speculation = Speculation(DraftModelGuesser(4, 2, GuessCosts(TWO_STAGES, 0.01)))
        assert speculation.ask(Sequence((1,), 0, left), 1, 8) == expected


def test_those_that_come_back_go_on_as_one_batch() -> None:
    """Four that started one by one: without waiting for each other they would stay alone for ever."""
    guesser = DraftModelGuesser(2, 2, GuessCosts())
    scheduler = Scheduler(
        PageAllocator(200, 4), steps_in_flight=2, max_num_seqs=8, max_num_batched_tokens=64, guesser=guesser
    )
    rows = []
    for i in range(40):
        if i < 4:
            scheduler.add(Sequence((1, 2, i), 0, 150))
        while (plan := scheduler.next_plan()) is not None:
            rows.append(len(plan.rows))
        plan = next(iter(scheduler.out.values()))
        for row in plan.rows:
            for position in range(row.start + row.count - len(row.draft), row.start + row.count + 1):
                scheduler.append_token(row.sequence, position, 7)
            scheduler.speculation.guesser.told(row.sequence, [7, 7])
        scheduler.step_done(plan.step)
    assert rows[-10:] == [2] * 10


def test_who_was_asked_waits_for_the_answer_and_has_pages_for_it() -> None:
    """Behind the row that asks nothing of the sequence is planned; its guesses go as one draft row."""
    speculating = DraftModelGuesser(3, 2, GuessCosts(TWO_STAGES, 0.01))
    scheduler = Scheduler(
        PageAllocator(20, 4), steps_in_flight=2, max_num_seqs=4, max_num_batched_tokens=64, guesser=speculating
    )
    sequence = Sequence((1, 2, 3), 0, 20)
    scheduler.add(sequence)
    plan = scheduler.next_plan()
    assert plan is not None
    assert plan.rows[0].guesses == 3
    assert sequence.pages_sent * 4 >= 3 + 3, "positions of the guesses that the model computes"
    assert scheduler.next_plan() is None
    scheduler.append_token(sequence, 3, 4)
    scheduler.speculation.guesser.told(sequence, [5, 6, 7])
    scheduler.step_done(plan.step)
    plan = scheduler.next_plan()
    assert plan is not None
    assert plan.rows[0].draft == [5, 6, 7]
    assert plan.rows[0].start == 3
