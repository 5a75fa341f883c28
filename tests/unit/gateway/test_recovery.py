"""What is computed again when stages were lost: which stages, which positions, and what the scheduler makes of it."""

from __future__ import annotations

import random

import pytest
from prefix_world import SIZE, come_back, draw, make

from stagemesh.gateway.drive.ledger import Ledger
from stagemesh.gateway.schedule.pages import Shape
from stagemesh.gateway.schedule.plan import Plan
from stagemesh.gateway.schedule.recovery import Recovery, lost_stages
from stagemesh.gateway.schedule.scheduler import Scheduler
from stagemesh.gateway.schedule.sequence import Sequence, State
from stagemesh.protos.v1.stage_pb2 import RunOpened

EVERYTHING = b"\xff" * 16


def running(*computed: int, prompt: int = 40) -> list[Sequence]:
    """Sequences with pages of their own, of which so many positions are computed."""
    sequences = []
    for number, count in enumerate(computed):
        pages = list(range(20 * number, 20 * number + 20))
        sequence = Sequence(tuple(range(prompt)), 0, 10, state=State.RUNNING, pages=pages)
        sequence.computed = sequence.confirmed = count
        sequences.append(sequence)
    return sequences


def taken(
    recovery: Recovery, sequences: list[Sequence], budget: int
) -> list[tuple[list[tuple[int, int, int]], tuple[int, int]]]:
    """All steps: (index of the sequence, start, count) of each part, and the stages."""
    steps = []
    while (found := recovery.next(sequences, budget)) is not None:
        parts, stages = found
        steps.append(([(sequences.index(p.sequence), p.start, p.count) for p in parts], stages))
    return steps


@pytest.mark.parametrize(
    ("filled", "now", "lost"),
    [
        ((1, 2, 3), (1, 2, 3), []),
        ((1, 2, 3), (1, 9, 3), [(1, 1)]),
        ((1, 2, 3, 4), (1, 9, 9, 4), [(1, 2)]),
        ((1, 2, 3), (9, 2, 9), [(0, 0), (2, 2)]),
        ((1, 0, 3), (1, 2, 3), [(1, 1)]),
        ((1, 2), (1, 2, 3), [(0, 2)]),
        ((), (1, 2), [(0, 1)]),
    ],
)
def test_stages_that_are_not_what_they_were(
    filled: tuple[int, ...], now: tuple[int, ...], lost: list[tuple[int, int]]
) -> None:
    assert lost_stages(filled, now) == lost


def test_a_lost_stage_is_refilled_from_the_one_before_it_the_shortest_first() -> None:
    sequences = running(9, 5, 0)
    recovery = Recovery([(1, 1)], [EVERYTHING, b"", b""], SIZE)
    assert taken(recovery, sequences, 100) == [([(1, 0, 5), (0, 0, 9)], (1, 1))]


def test_steps_are_bounded_and_a_sequence_goes_on_where_it_was_cut() -> None:
    sequences = running(11, 18)
    recovery = Recovery([(1, 1)], [EVERYTHING, b""], SIZE)
    assert [parts for parts, _ in taken(recovery, sequences, 7)] == [
        [(0, 0, 7)], [(0, 7, 4), (1, 0, 3)], [(1, 3, 7)], [(1, 10, 7)], [(1, 17, 1)],
    ]  # fmt: skip


def test_shared_pages_are_filled_once() -> None:
    sequences = running(12, 14)
    sequences[1].pages[:2] = sequences[0].pages[:2]
    recovery = Recovery([(0, 0)], [b"", b""], SIZE)
    assert taken(recovery, sequences, 100) == [([(0, 0, 12), (1, 8, 6)], (0, 0))]


def test_where_the_journal_has_gaps_the_stage_before_is_asked_and_at_last_the_tokens() -> None:
    # Stage 1 has the first sequence's pages, stage 0 those of the first two.
    low, both = bytes([0b11, 0, 0, 0, 0, 0]), bytes([0b11, 0, 0b110000, 0, 0, 0])
    for number, stages in ((0, (2, 2)), (1, (1, 2)), (2, (0, 2))):
        sequences = running(8, 8, 8)
        for other in sequences:
            other.computed *= other is sequences[number]
        steps = taken(Recovery([(2, 2)], [both, low, b""], SIZE), sequences, 100)
        assert steps == [([(number, 0, 8)], stages)]


def test_a_stage_that_computes_again_though_it_was_not_lost_promises_no_journal_any_more() -> None:
    sequences = running(8, 12)
    # Stage 1 has the second sequence's pages alone; the first is computed by stages 1 and 2 before.
    steps = taken(Recovery([(2, 2)], [EVERYTHING, bytes([0, 0, 0b1110000]), b""], SIZE), sequences, 100)
    assert steps == [([(0, 0, 8)], (1, 2)), ([(1, 0, 12)], (1, 2))]


def test_one_that_was_cut_within_a_page_goes_on_before_a_shorter_one() -> None:
    """Who opened the page must fill it: another that shares it would open it again."""
    sequences = running(4, 8, 32)
    journal = bytearray(EVERYTHING)
    journal[20 >> 3] &= ~(1 << (20 & 7))  # The first page of the second sequence: it is computed from further up.
    recovery = Recovery([(1, 1)], [bytes(journal), b""], SIZE)
    assert taken(recovery, sequences, 18) == [
        ([(0, 0, 4), (2, 0, 14)], (1, 1)),
        ([(2, 14, 18)], (1, 1)),
        ([(1, 0, 8)], (0, 1)),
    ]


def test_pages_that_are_filled_are_not_opened_again() -> None:
    """One whose first page is its own, equal to another's, and that shares what is behind it."""
    first, second = running(16, 24)
    second.pages[1:4] = first.pages[1:4]
    recovery = Recovery([(1, 1)], [EVERYTHING, b""], SIZE)
    assert taken(recovery, [first, second], 19) == [
        ([(0, 0, 16), (1, 0, 3)], (1, 1)),
        ([(1, 3, 1)], (1, 1)),
        ([(1, 16, 8)], (1, 1)),
    ]


def test_two_losses_that_are_apart_are_refilled_one_after_the_other() -> None:
    sequences = running(8)
    stages = [EVERYTHING, EVERYTHING, EVERYTHING, EVERYTHING]
    assert taken(Recovery([(1, 1), (3, 3)], stages, SIZE), sequences, 5) == [
        ([(0, 0, 5)], (1, 1)), ([(0, 5, 3)], (1, 1)), ([(0, 0, 5)], (3, 3)), ([(0, 5, 3)], (3, 3)),
    ]  # fmt: skip


def test_who_ended_is_not_computed_again() -> None:
    sequences = running(8, 9)
    recovery = Recovery([(1, 1)], [EVERYTHING, b""], SIZE)
    sequences[1].state = State.FINISHED
    assert taken(recovery, sequences, 100) == [([(0, 0, 8)], (1, 1))]


# -- the scheduler ---------------------------------------------------------------------------------------------------


def test_pages_of_one_that_ended_half_refilled_are_not_taken_over() -> None:
    scheduler = make(tokens=16, steps=2)
    first = Sequence(tuple(range(40)), 0, 5)
    scheduler.add(first)
    for _ in range(3):
        plan = scheduler.next_plan()
        assert plan is not None
        scheduler.step_done(plan.step)
    assert first.offered == 10
    scheduler.rewind()
    scheduler.recovery = Recovery([(0, 0)], [b""], SIZE)
    plan = scheduler.next_plan()
    assert plan is not None
    assert (plan.replay, plan.rows[0].count) == ((0, 0), 16)
    scheduler.finish(first)
    assert scheduler.next_plan() is None
    scheduler.step_done(plan.step)
    scheduler.add(again := Sequence(first.prompt, 0, 5))
    scheduler.next_plan()
    assert again.taken_over == 0, "what lies behind the first chunk was never computed again"


class Stages:
    """The workers' memory: what every slot of every page holds on each stage, as the prefix it was computed from."""

    def __init__(self, count: int, rng: random.Random) -> None:
        self.slots: list[dict[tuple[int, int], tuple[int, ...]]] = [{} for _ in range(count)]
        self.journals: list[dict[int, int]] = [{} for _ in range(count)]
        self.generations = list(range(1, count + 1))
        self.rng = rng

    def lose(self, stage: int) -> None:
        """Another worker takes its place."""
        self.slots[stage], self.journals[stage] = {}, {}
        self.generations[stage] = self.rng.getrandbits(60)

    def told(self) -> list[RunOpened]:
        """What they say when sessions are opened. Of each journal, some pages have gone."""
        told = []
        for journal, generation in zip(self.journals, self.generations, strict=True):
            bits = bytearray(13)
            for page in journal:
                if self.rng.random() < 0.8:
                    bits[page >> 3] |= 1 << (page & 7)
            told.append(RunOpened(kv_generation=generation, journal=bytes(bits)))
        return told

    def run(self, plan: Plan, stage: int, tokens: dict[Sequence, list[int]]) -> None:
        """One stage's part of a step."""
        first, last = plan.replay or (0, len(self.slots) - 1)
        if not first <= stage <= last:
            return
        slots = self.slots[stage]
        # As attention does it: all rows' keys and values are written before any are read.
        for row in plan.rows:
            pages = row.sequence.pages
            for position in range(row.start, row.start + row.count):
                page, offset = pages[position // SIZE], position % SIZE
                if offset == 0:
                    # Whoever opens a page wipes it.
                    for other in range(SIZE):
                        slots.pop((page, other), None)
                slots[page, offset] = tuple(tokens[row.sequence][: position + 1])
                self.journals[stage][page] = 1
        for row in plan.rows:
            pages = row.sequence.pages
            for position in range(row.start + row.count):
                slot = pages[position // SIZE], position % SIZE
                assert slots.get(slot) == tuple(tokens[row.sequence][: position + 1]), "reads what is not there"


@pytest.mark.parametrize("seed", range(60))
def test_sequences_survive_losses_at_any_moment(seed: int) -> None:
    """Random losses, also while stages are being refilled: no position is read that was not written, and every sequence
    gets the tokens that it gets without losses."""
    print("seed", seed)
    rng = random.Random(seed)
    stages = Stages(rng.randint(1, 4), rng)
    pages, steps, tokens = rng.randint(30, 100), rng.randint(1, 4), rng.choice((5, 16, 64))
    ledger = Ledger(lambda shape: make(pages=len(shape.pages), steps=shape.steps_in_flight, tokens=tokens, seqs=6))
    shape = Shape(tuple(range(pages)), SIZE, steps)
    ledger.begin(shape, stages.told())
    scheduler = ledger.scheduler
    common = tuple(rng.randrange(50) for _ in range(24))
    sequences: list[Sequence] = []
    out: list[tuple[Plan, list[int]]] = []
    for _ in range(20_000):
        if len(sequences) == 16 and all(s.state is State.FINISHED for s in sequences) and not scheduler.out:
            break
        if len(sequences) < 16 and rng.random() < 0.03:
            own = tuple(rng.randrange(50) for _ in range(rng.randint(1, 20)))
            prompt = common[: rng.randint(0, 24)] + own
            if sequences and rng.random() < 0.3:
                # A client that asks the same again.
                prompt = rng.choice(sequences).prompt
            sequences.append(Sequence(prompt, 0, rng.randint(1, 30)))
            scheduler.add(sequences[-1])
        what = rng.random()
        if what < 0.02:
            for _ in range(rng.randint(0, 2)):
                stages.lose(rng.randrange(len(stages.slots)))
            out.clear()
            ledger.end()
            ledger.begin(shape, stages.told())
        elif what < 0.03 and sequences:
            scheduler.finish(rng.choice(sequences))
        elif what < 0.5 and (plan := scheduler.next_plan()) is not None:
            ledger.note_sent(plan)
            out.append((plan, [0] * len(stages.slots)))
        elif out:
            step(out, rng, stages, scheduler)
            ledger.recovered()
    for sequence in sequences:
        assert sequence.state is State.FINISHED
        known = list(sequence.prompt)
        for token in sequence.log:
            assert token == draw(known)
            known.append(token)
    assert scheduler.pages.num_free == scheduler.pages.num_pages


def step(out: list[tuple[Plan, list[int]]], rng: random.Random, stages: Stages, scheduler: Scheduler) -> None:
    """One stage runs the next step that it can: in their order, behind the stage before."""
    last = len(stages.slots) - 1
    ready = []
    for stage in range(last + 1):
        # The first step that this stage has a part in and has not run.
        at = next((i for i, (_, done) in enumerate(out) if not done[stage]), None)
        if at is not None and (stage == 0 or out[at][1][stage - 1]):
            ready.append((at, stage))
    at, stage = rng.choice(ready)
    plan, done = out[at]
    # Tokens that the plan does not know come from the step before, which has run everywhere or is before it on stage 0.
    tokens = {row.sequence: expected(row.sequence, row.start + row.count) for row in plan.rows}
    stages.run(plan, stage, tokens)
    done[stage] = 1
    if stage == (plan.replay[1] if plan.replay else last):
        out.pop(at)
        come_back(scheduler, plan)


def expected(sequence: Sequence, count: int) -> list[int]:
    """The first `count` tokens, those on their way among them."""
    known = sequence.tokens(0, min(count, sequence.length))
    while len(known) < count:
        known.append(draw(known))
    return known
