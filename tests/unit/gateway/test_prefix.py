"""Prefix caching: which pages are taken over, when they are offered, who holds and who evicts them."""

from __future__ import annotations

import zlib
from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stagemesh.gateway.pages import ROOT, PageAllocator
from stagemesh.gateway.scheduler import Plan, Scheduler
from stagemesh.gateway.sequence import Sequence, State

SIZE = 4
"""Tokens of a page, in all of these tests."""


def make(pages: int = 100, steps: int = 3, tokens: int = 64, seqs: int = 8, caching: bool = True) -> Scheduler:
    return Scheduler(
        PageAllocator(pages, SIZE),
        steps_in_flight=steps,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        prefix_caching=caching,
    )


def draw(prefix: list[int]) -> int:
    """The token behind a prefix: a function of all of it, as a greedy model's is."""
    return zlib.crc32(bytes(prefix)) % 3


def come_back(scheduler: Scheduler, plan: Plan) -> None:
    for row in plan.rows:
        sequence = row.sequence
        if (
            row.samples
            and scheduler.append_token(sequence, row.start + row.count, draw(sequence.tokens(0, sequence.length)))
            and len(sequence.log) >= sequence.max_tokens
        ):
            scheduler.finish(sequence)
    scheduler.step_done(plan.step)


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


def chunks(*values: int) -> list[bytes]:
    return [bytes([value] * SIZE) for value in values]


def fill(allocator: PageAllocator, *values: int) -> list[int]:
    """Pages that hold the prefix `values`, offered and let go."""
    pages = allocator.allocate(len(values))
    assert pages is not None
    node = ROOT
    for page, content in zip(pages, chunks(*values), strict=True):
        node = allocator.offer(page, node, content)
    allocator.free(pages)
    return pages


def test_empty_pages_go_before_offered_ones_and_the_last_of_a_prefix_before_its_first() -> None:
    allocator = PageAllocator(5, SIZE)
    pages = fill(allocator, 1, 2, 3)
    assert allocator.num_free == 5
    empty = allocator.allocate(2)
    assert empty is not None
    assert not set(empty) & set(pages)
    assert allocator.find(ROOT, chunks(1, 2, 3)) == pages
    assert allocator.allocate(1) == [pages[2]]
    assert allocator.find(ROOT, chunks(1, 2, 3)) == pages[:2]


def test_what_was_used_last_stays_longest() -> None:
    allocator = PageAllocator(4, SIZE)
    old, new = fill(allocator, 1), fill(allocator, 2)
    assert allocator.allocate(0, old) == []
    allocator.free(old)
    allocator.allocate(3)
    assert (allocator.find(ROOT, chunks(1)), allocator.find(ROOT, chunks(2))) == (old, []), new


def test_pages_that_are_to_be_shared_are_not_evicted_for_the_rest() -> None:
    allocator = PageAllocator(4, SIZE)
    shared = fill(allocator, 1, 2)
    assert allocator.allocate(3, shared) is None
    assert allocator.num_free == 4, "refused as a whole"
    fresh = allocator.allocate(2, shared)
    assert fresh is not None
    assert not set(fresh) & set(shared)
    assert allocator.num_free == 0


def test_what_hangs_below_a_withdrawn_page_is_gone() -> None:
    allocator = PageAllocator(4, SIZE)
    pages = fill(allocator, 1, 2)
    allocator.allocate(0, pages[:1])
    allocator.withdraw(pages[:1])
    allocator.free(pages[:1])
    again = fill(allocator, 1)
    assert allocator.find(ROOT, chunks(1, 2)) == again


def test_a_shared_page_freed_once_too_often_is_noticed() -> None:
    allocator = PageAllocator(4, SIZE)
    pages = fill(allocator, 1)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(pages)


Slot = tuple[tuple[int, ...], frozenset[int]]
"""What a position holds: the prefix it was computed from, and the corruptions that went into it."""


class Story(RuleBasedStateMachine):
    """Sequences with common beginnings come, go, are cancelled and fail, in any order, on few pages.

    The model of the workers' memory says what every slot of every page holds once its step has run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scheduler: Scheduler | None = None
        self.all: list[Sequence] = []
        self.slots: dict[tuple[int, int], Slot] = {}
        self.known: dict[Sequence, tuple[int, int]] = {}
        """(number on the wire, positions taken over) of running sequences."""
        self.condemned: set[int] = set()
        """Corruptions that a failure has brought to light."""
        self.corruptions = 0
        self.corrupt_next = False
        self.ended: set[Sequence] = set()

    @precondition(lambda self: self.scheduler is None)
    @rule(pages=st.integers(10, 30), steps=st.integers(1, 4), tokens=st.integers(1, 20), seqs=st.integers(1, 6))
    def start(self, pages: int, steps: int, tokens: int, seqs: int) -> None:
        self.scheduler = make(pages, steps, tokens, seqs)

    @precondition(lambda self: self.scheduler is not None)
    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        tokens=st.integers(1, 16),
        choices=st.integers(1, 3),
    )
    def add(self, prompt: list[int], tokens: int, choices: int) -> None:
        assert self.scheduler is not None
        for number in range(choices):
            # Pages alike more often than single draws would make them.
            sequence = Sequence(tuple(t for bit in prompt for t in [bit] * 2)[:20], number, tokens)
            self.all.append(sequence)
            self.scheduler.add(sequence)

    @precondition(lambda self: self.scheduler is not None)
    @rule(times=st.integers(1, 4))
    def plan(self, times: int) -> None:
        for _ in range(times):
            self._plan()

    def _plan(self) -> bool:
        scheduler = self.scheduler
        assert scheduler is not None
        plan = scheduler.next_plan()
        for sequence in scheduler.running:
            ident, taken = self.known.get(sequence, (0, 0))
            if ident != sequence.ident or taken != sequence.taken_over:
                self._check_taken(sequence)
                self.known[sequence] = sequence.ident, sequence.taken_over
        if plan is None:
            return False
        assert len({row.sequence for row in plan.rows}) == len(plan.rows), "a sequence twice in one step"
        for row in plan.rows:
            told = row.start == row.sequence.taken_over
            assert bool(row.sequence in plan.opened) <= told, "the first row starts behind what was taken over"
            assert row.sequence.pages_sent * SIZE >= row.start + row.count
        return True

    def _check_taken(self, sequence: Sequence) -> None:
        assert sequence.taken_over < sequence.length
        for position in range(sequence.taken_over):
            page = sequence.pages[position // SIZE]
            prefix, corruptions = self.slots[page, position % SIZE]
            assert list(prefix) == sequence.tokens(0, position + 1), "taken over: other tokens' page, or not yet there"
            assert not corruptions & self.condemned, "taken over from one that failed"

    @precondition(lambda self: self.scheduler is not None and self.scheduler.out)
    @rule(times=st.integers(1, 4))
    def result(self, times: int) -> None:
        for _ in range(times):
            self._result()

    def _result(self) -> None:
        scheduler = self.scheduler
        assert scheduler is not None
        if not scheduler.out:
            return
        plan = next(iter(scheduler.out.values()))
        writers: Counter[int] = Counter()
        bad: dict[Sequence, frozenset[int]] = {}
        for row in plan.rows:
            bad[row.sequence] = self._compute(row, writers)
        assert all(count == 1 for count in writers.values()), "one page, two writers"
        for row in plan.rows:
            sequence = row.sequence
            if not row.samples:
                continue
            if bad[sequence]:
                self.condemned |= bad[sequence]
                scheduler.failed(sequence)
                self._end(sequence)
            elif (
                scheduler.append_token(sequence, row.start + row.count, draw(sequence.tokens(0, sequence.length)))
                and len(sequence.log) >= sequence.max_tokens
            ):
                self._end(sequence)
        scheduler.step_done(plan.step)

    def _compute(self, row: Any, writers: Counter[int]) -> frozenset[int]:
        """Runs a row; the corruptions that its result depends on."""
        assert self.scheduler is not None
        sequence = row.sequence
        bad: frozenset[int] = frozenset()
        for position in range(row.start):
            prefix, corruptions = self.slots[sequence.pages[position // SIZE], position % SIZE]
            assert list(prefix) == sequence.tokens(0, position + 1), "somebody wrote into a page that this one reads"
            bad |= corruptions
        if self.corrupt_next:
            self.corrupt_next = False
            self.corruptions += 1
            bad |= {self.corruptions}
        pages = {sequence.pages[p // SIZE] for p in range(row.start, row.start + row.count)}
        writers.update(pages)
        for other in self.scheduler.running:
            assert other is sequence or not pages & set(other.pages), "written while another holds it"
        for position in range(row.start, row.start + row.count):
            content = tuple(sequence.tokens(0, position + 1)), bad
            self.slots[sequence.pages[position // SIZE], position % SIZE] = content
        return bad

    def _end(self, sequence: Sequence) -> None:
        assert self.scheduler is not None
        self.scheduler.finish(sequence)
        self.ended.add(sequence)

    @precondition(lambda self: self.all)
    @rule(which=st.integers(0, 1000))
    def cancel(self, which: int) -> None:
        self._end(self.all[which % len(self.all)])

    @rule()
    def corrupt(self) -> None:
        self.corrupt_next = True

    @invariant()
    def holders_add_up(self) -> None:
        if self.scheduler is None:
            return
        pages = self.scheduler.pages
        held = Counter(page for sequence in self.scheduler.running for page in sequence.pages)
        assert pages.num_free == pages.num_pages - len(held)
        for sequence in self.scheduler.running:
            assert len(sequence.pages) == len(set(sequence.pages))
        assert [held[page] for page in range(pages.num_pages)] == pages._holders

    def teardown(self) -> None:
        if self.scheduler is None:
            return
        self.corrupt_next = False
        steps = 0
        while self._plan() or self.scheduler.out:
            self._result()
            steps += 1
            assert steps < 10_000, "the sequences do not come to an end"
        assert not self.scheduler.waiting
        assert not self.scheduler.running
        assert self.scheduler.pages.num_free == self.scheduler.pages.num_pages
        for sequence in self.all:
            assert sequence in self.ended
            assert sequence.failed or len(sequence.log) <= sequence.max_tokens
            known = list(sequence.prompt)
            for token in sequence.log:
                assert token == draw(known)
                known.append(token)


Story.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestStory = Story.TestCase
