"""Guesses from a sequence's own past, and draft rows: what is guessed, when, and that nothing else changes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagemesh.gateway.schedule.lookup import INDEXED_AT_ONCE, PLACES, LookupGuesser, PromptLookup
from stagemesh.gateway.schedule.pages import PageAllocator
from stagemesh.gateway.schedule.plan import Plan, Row
from stagemesh.gateway.schedule.scheduler import Scheduler
from stagemesh.gateway.schedule.sequence import Sequence, State
from stagemesh.gateway.schedule.speculation import NO_GUESSES, Speculation
from stagemesh.settings.speculative import SpeculativeConfig

SIZE = 4
"""Tokens of a page."""


def lookup(num_tokens: int, longest: int, shortest: int) -> SpeculativeConfig:
    return SpeculativeConfig(
        method="ngram", num_speculative_tokens=num_tokens, prompt_lookup_max=longest, prompt_lookup_min=shortest
    )


LIMITS = lookup(num_tokens=4, longest=3, shortest=2)


def naive(tokens: list[int], limits: SpeculativeConfig) -> list[int]:
    """By searching all of the past: the longest run that stood before, the latest place of it, what followed there."""
    places = [
        end
        for end in range(len(tokens) - 2, limits.prompt_lookup_min - 2, -1)
        if tokens[end - limits.prompt_lookup_min + 1 : end + 1] == tokens[-limits.prompt_lookup_min :]
    ][:PLACES]
    for run in range(limits.prompt_lookup_max, limits.prompt_lookup_min - 1, -1):
        for end in places:
            if end - run + 1 >= 0 and tokens[end - run + 1 : end + 1] == tokens[-run:]:
                grown = list(tokens)
                for i in range(limits.num_speculative_tokens):
                    grown.append(grown[end + 1 + i])
                return grown[len(tokens) :]
    return []


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=2, max_size=80),
    split=st.integers(1, 79),
    shortest=st.integers(1, 3),
    more=st.integers(0, 3),
)
def test_what_is_guessed_is_what_a_plain_search_finds(tokens: list[int], split: int, shortest: int, more: int) -> None:
    limits = lookup(4, shortest + more, shortest)
    split = min(split, len(tokens) - 1)
    sequence = Sequence(tuple(tokens[:split]), 0, 1000)
    guesser = PromptLookup(limits)
    assert guesser.guess(sequence) == naive(tokens[:split], limits)[:3], "three at a time, before anything is known"
    for at in range(split, len(tokens)):
        sequence.log.append(tokens[at])
        guess = guesser.guess(sequence)
        assert guess == naive(tokens[: at + 1], limits)[: len(guess)]
    afresh = PromptLookup(limits).guess(Sequence(tuple(tokens), 0, 1000))
    assert afresh == naive(tokens, limits)[:3]


def follow(tokens: list[int], split: int, limits: SpeculativeConfig = LIMITS) -> tuple[int, int, int]:
    """(draft rows, tokens guessed, accepted) of an output that is known, one step after the other."""
    sequence, speculation = Sequence(tuple(tokens[:split]), 0, len(tokens)), Speculation(LookupGuesser(limits))
    while sequence.length < len(tokens):
        start, draft = sequence.length, speculation.guess(sequence)
        held = 0
        while held < len(draft) and start + held < len(tokens) and draft[held] == tokens[start + held]:
            held += 1
        sequence.log.extend(tokens[start : start + held + 1])
        if draft:
            speculation.verified(sequence, start, draft)
    return speculation.take_counts()


def test_an_output_that_repeats_itself_is_guessed() -> None:
    drafts, guessed, accepted = follow([5, 6, 7] * 40, 9)
    assert accepted > 0.9 * guessed
    assert drafts < 111 / 4, "five tokens a step, in the end"


def test_runs_that_go_on_differently_each_time_are_soon_guessed_no_more() -> None:
    rng = random.Random(4)
    tokens = [token for _ in range(300) for token in (1, 2, rng.randrange(10, 10000))]
    drafts, _, accepted = follow(tokens, 6)
    assert accepted < 20
    assert drafts < 40, "300 times there was something to guess"


def test_guessing_comes_back_when_the_text_begins_to_repeat() -> None:
    rng = random.Random(4)
    wild = [token for _ in range(300) for token in (1, 2, rng.randrange(10, 10000))]
    _, _, before = follow(wild, 6)
    _, _, after = follow(wild + [5, 6, 7, 1, 2] * 30, 6)
    assert after - before > 75


def test_a_long_prompt_is_taken_in_by_pieces() -> None:
    sequence = Sequence((*range(10, 10 + 2 * INDEXED_AT_ONCE), 20, 21, 22), 0, 9)
    guesser = PromptLookup(LIMITS)
    assert [guesser.guess(sequence) for _ in "123"] == [[], [], [23, 24, 25]]


def test_what_would_be_too_many_is_not_guessed() -> None:
    speculation = Speculation(LookupGuesser(LIMITS))
    assert [len(speculation.guess(Sequence((1, 2) * 5, 0, wanted))) for wanted in (1, 2, 3, 9)] == [0, 1, 2, 3]


# -- draft rows -------------------------------------------------------------------------------------------------------


def true_token(sequence: Sequence, position: int) -> int:
    """What the model draws there: mostly a round of five, with a hiccup here and there."""
    if random.Random(f"{sequence.choice} {position}").random() < 0.15:
        return 900 + (position * 7 + sequence.choice) % 50
    return position % 5


@dataclass
class Mesh:
    """A pipeline that computes: pages hold tokens instead of keys and values, and reading a wrong one is noticed."""

    scheduler: Scheduler
    lengths: dict[int, int]
    certain: dict[int, int]
    tables: dict[int, list[int]]
    memory: dict[int, int]
    planned: int = 0
    drafted: int = 0
    stops: dict[Sequence, int] = field(default_factory=dict)
    """Tokens after which a sequence is ended by a stop string."""

    @staticmethod
    def make(
        pages: int, steps: int = 2, tokens: int = 64, seqs: int = 8, limits: SpeculativeConfig | None = LIMITS
    ) -> Mesh:
        allocator = PageAllocator(pages, SIZE)
        scheduler = Scheduler(
            allocator,
            steps_in_flight=steps,
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            guesser=LookupGuesser(limits) if limits else NO_GUESSES,
        )
        return Mesh(scheduler, {}, {}, {}, {})

    def plan(self) -> Plan | None:
        """The next plan, as the workers check it: starts, pages, who may be referred to."""
        plan = self.scheduler.next_plan()
        if plan is None:
            return None
        self.planned += 1
        closed, self.scheduler.closed = self.scheduler.closed, []
        for entry in closed:
            del self.lengths[entry.sequence], self.tables[entry.sequence]
        for opened in plan.opened:
            self.lengths[opened.ident], self.tables[opened.ident] = 0, []
        for row in plan.rows:
            ident = row.sequence.ident
            if not self.tables[ident]:
                self.lengths[ident] = self.certain[ident] = row.start
            assert self.certain[ident] <= row.start <= self.lengths[ident]
            self.lengths[ident] = row.start + row.count
            self.certain[ident] = row.start + 1 if row.draft else self.lengths[ident]
            self.tables[ident] += row.new_pages
            assert len(self.tables[ident]) * SIZE >= self.lengths[ident]
            if row.draft:
                self.drafted += 1
                assert row.samples
                assert not row.result_of
                assert row.count == 1 + len(row.draft)
                assert row.sequence.unsampled == 1, "no other token of it is out"
            if row.result_of:
                (earlier,) = (r for r in self.scheduler.out[row.result_of].rows if r.sequence is row.sequence)
                assert not earlier.draft
        assert sum(row.count for row in plan.rows) <= self.scheduler.max_num_batched_tokens
        return plan

    def come_back(self) -> None:
        """The oldest step runs, on pages that must hold what the sequence is made of."""
        plan = next(iter(self.scheduler.out.values()))
        for row in plan.rows:
            self._run(row)
        self.scheduler.step_done(plan.step)

    def _run(self, row: Row) -> None:
        sequence, table = row.sequence, self.tables[row.sequence.ident]

        def slot(position: int) -> int:
            return table[position // SIZE] * SIZE + position % SIZE

        def real(position: int) -> int:
            known = len(sequence.prompt)
            return sequence.prompt[position] if position < known else true_token(sequence, position)

        if sequence.state in (State.RUNNING, State.PREEMPTED):
            for position in range(row.start):
                assert self.memory[slot(position)] == real(position), f"position {position} of {row}"
        tokens = [real(row.start + i) for i in range(row.count - len(row.draft))] + row.draft
        for i, token in enumerate(tokens):
            self.memory[slot(row.start + i)] = token
        if not row.samples:
            return
        position = row.start + row.count - len(row.draft)
        for guess in (*row.draft, None):
            token = true_token(sequence, position)
            entered = self.scheduler.append_token(sequence, position, token)
            if entered and len(sequence.log) >= self.stops.get(sequence, sequence.max_tokens):
                self.scheduler.finish(sequence)
            if token != guess:
                break
            position += 1

    def finish(self) -> None:
        """Runs until nothing is left to do."""
        for _ in range(20000):
            while self.plan() is not None:
                pass
            if not self.scheduler.out:
                return
            self.come_back()
        raise AssertionError("the sequences do not come to an end")


def expect_all(sequences: list[Sequence]) -> None:
    for sequence in sequences:
        first = len(sequence.prompt)
        assert sequence.log == [true_token(sequence, first + i) for i in range(sequence.max_tokens)]


def test_fewer_steps_and_the_same_tokens() -> None:
    steps = []
    for limits in (None, LIMITS):
        mesh, sequence = Mesh.make(100, limits=limits), Sequence(tuple(i % 5 for i in range(20)), 3, 120)
        mesh.scheduler.add(sequence)
        mesh.finish()
        expect_all([sequence])
        steps.append(mesh.planned)
    assert mesh.drafted > 10
    drafts, guessed, accepted = mesh.scheduler.speculation.take_counts()
    assert (drafts, guessed > accepted > 40) == (mesh.drafted, True)
    assert steps[1] < 0.75 * steps[0]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), pages=st.integers(24, 80), steps=st.integers(1, 4), tokens=st.integers(4, 64))
def test_any_story_with_drafts_ends_with_the_same_tokens(seed: int, pages: int, steps: int, tokens: int) -> None:
    rng = random.Random(seed)
    mesh = Mesh.make(pages, steps, tokens, rng.randint(1, 8), lookup(rng.randint(1, 6), 3, rng.randint(1, 3)))
    # Some begin alike, so that pages are shared, and some are the same all through.
    wanted = [
        Sequence(tuple(i % 5 for i in range(rng.randint(1, 30))), rng.randrange(3), rng.randint(1, 60))
        for _ in range(10)
    ]
    pending, cancelled = list(wanted), set()
    for _ in range(400):
        if pending and rng.random() < 0.3:
            mesh.scheduler.add(pending.pop())
        if rng.random() < 0.01 and (target := rng.choice(wanted)) not in pending:
            mesh.scheduler.finish(target)
            cancelled.add(target)
        if rng.random() < 0.5:
            mesh.plan()
        elif mesh.scheduler.out:
            mesh.come_back()
    for left in pending:
        mesh.scheduler.add(left)
    mesh.finish()
    expect_all([s for s in wanted if s not in cancelled])
    assert mesh.scheduler.pages.num_free == pages


def test_a_page_that_others_may_need_is_not_taken_for_a_guess() -> None:
    """Two positions are left of five pages; for more guesses a page is taken, if one stays free for each that runs."""
    for pages, guesses in ((6, 2), (7, 4)):
        mesh = Mesh.make(pages, steps=1)
        mesh.scheduler.add(Sequence(tuple(i % 5 for i in range(17)), 3, 60))
        mesh.plan()
        mesh.come_back()
        plan = mesh.plan()
        assert plan is not None
        assert [len(row.draft) for row in plan.rows] == [guesses]
        assert mesh.scheduler.pages.num_free == 1


def test_guesses_of_a_step_are_bounded_by_what_they_cost() -> None:
    mesh = Mesh.make(400, steps=1, tokens=64, seqs=16)
    mesh.scheduler.prefill_budget = 48
    for number in range(8):
        mesh.scheduler.add(Sequence((number + 1000, *(i % 5 for i in range(12))), number, 60))
    seen = 0
    for _ in range(3000):
        plan = mesh.plan()
        if plan is None:
            if not mesh.scheduler.out:
                break
            mesh.come_back()
            continue
        guessed = sum(len(row.draft) for row in plan.rows)
        assert not guessed or sum(row.count for row in plan.rows) <= 48 / 3
        seen += guessed
    assert seen > 50


@pytest.mark.parametrize("caching", [True, False])
def test_pages_with_guesses_that_did_not_hold_are_not_found_by_others(caching: bool) -> None:
    """Whatever token ends the first one, in the midst of a draft row, too: the next finds only what is right."""
    drafted = 0
    for end in range(1, 80):
        mesh = Mesh.make(200, steps=2)
        mesh.scheduler.prefix.enabled = caching
        first = Sequence(tuple(i % 5 for i in range(20)), 3, 100)
        mesh.stops[first] = end
        mesh.scheduler.add(first)
        mesh.finish()
        assert len(first.log) == end
        again = Sequence((*first.prompt, *first.log, 1, 2, 3), 3, 20)
        mesh.scheduler.add(again)
        mesh.finish()
        expect_all([again])
        drafted += mesh.drafted
        # All but the last drawn token were computed, and that one where a step was ahead.
        computed = (19 + end, 20 + end) if caching else (0,)
        assert again.cached_tokens in [positions // SIZE * SIZE for positions in computed]
    assert drafted > 300
