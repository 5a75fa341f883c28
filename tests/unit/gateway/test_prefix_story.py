"""Prefix caching under whatever may happen: a model of the workers' memory beside the scheduler."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prefix_world import SIZE, draw, make

from stagemesh.gateway.schedule.scheduler import Scheduler
from stagemesh.gateway.schedule.sequence import Sequence

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
        assert all(held[page] == pages.holders(page) for page in range(pages.num_pages))

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
