"""Which rows go into the next step. Pure: no I/O, no clock; events in, plans out.

Continuous batching over a pipeline: decode rows are spread over `steps_in_flight` steps, so that these stay equal: at
most ceil(live / steps in flight) a step. The next step of the same rows is planned while the one before is out: its
tokens are "the result of step N", which the last stage sends to the first itself, so a stage never waits for this side.

Prefill goes in chunks beside the decode rows under a token budget (budget.py), so that steps last alike whatever they
hold; the chunks of one prompt follow each other without waiting for results (Sarathi-Serve, Agrawal et al. 2024). The
prompt that has waited longest goes first, but for half of the budget if others have less left.

With speculation, a sequence whose next tokens can be guessed goes as a draft row: its last known token and the guess,
verified in one step. Nothing else of it is out meanwhile, because where it goes on is only known when the row is back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from stagemesh.protos.v1.stage_pb2 import CloseSequence

from .budget import LONGER, share_among
from .pages import PageAllocator
from .plan import Plan, Row
from .prefix import PrefixCache
from .recovery import Recovery
from .sequence import Sequence, State
from .speculation import NO_GUESSES, Guesser, Speculation
from .suspects import note_back

STEPS_AHEAD = 2
"""Steps of one sequence that may be out: one runs, the next waits for its token."""


class Scheduler:
    """Sequences that wait, run and end on one pipeline, over its epochs."""

    def __init__(
        self,
        pages: PageAllocator,
        *,
        steps_in_flight: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool = True,
        guesser: Guesser = NO_GUESSES,
    ) -> None:
        self.pages = pages
        self.prefix = PrefixCache(pages, prefix_caching)
        self.speculation = Speculation(guesser)
        self.steps_in_flight = steps_in_flight
        self.prefill_budget = max_num_batched_tokens
        """Prompt tokens of one step; the caller fits it to what steps cost."""
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In the order of admission: the last is the youngest, preempted first."""
        self.out: dict[int, Plan] = {}  # steps in flight
        self.closed: list[CloseSequence] = []
        """What the workers have not yet been told to forget; the caller takes it."""
        self.recovery: Recovery | None = None
        """What stages have to compute again before anything else; set behind `rewind`."""
        self.preemptions = 0  # since the caller set it back
        self._next_step = 1
        self._turn = 0  # steps planned, over all epochs
        self._guesses_a_row = 0
        """Tokens that the last stage may be asked to guess behind each row of the step that is planned."""

    # -- events -----------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """A sequence joins the queue. It must fit: prompt + max_tokens within the pages there are."""
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """A sequence ended, or its client went away; its pages are freed once no step names it."""
        if sequence.state is State.FINISHED:
            return
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED
        self.speculation.guesser.forget(sequence)
        self._settle(sequence)

    def step_done(self, step: int) -> Plan:
        """Every stage has run the step. Tokens are entered by `append_token` before this."""
        plan = self.out.pop(step)
        for row in plan.rows:
            row.sequence.in_flight -= 1
            if row.samples:
                row.sequence.unsampled -= 1
            if row.draft:
                # What was computed behind a guess that did not hold is dead: it goes on where the drawn tokens end. The
                # newest token of the log is never computed yet, drawn as guessed or not.
                self.speculation.verified(row.sequence, row.start + 1, row.draft)
                row.sequence.computed = row.sequence.length - 1
            done = min(row.start + row.count, row.sequence.computed)
            row.sequence.confirmed = max(row.sequence.confirmed, done)
            self.prefix.confirm(row.sequence, done)
        note_back(plan)
        for row in plan.rows:
            self._settle(row.sequence)
        return plan

    def failed(self, sequence: Sequence) -> None:
        """What a sequence computed is not finite; its end is told by `finish`. To be called before `step_done`."""
        self.prefix.fail(sequence, self.running)

    def rewind(self, next_step: int = 1) -> None:
        """The steps that are out will never come back: every sequence goes on behind what is confirmed of it.

        Steps are numbered anew, from `next_step` on, and the workers know nothing of any sequence.
        """
        self.out.clear()
        self.closed.clear()
        self.recovery = None
        self._next_step = next_step
        for sequence in list(self.running):
            sequence.in_flight = sequence.unsampled = sequence.last_step = sequence.pages_sent = 0
            sequence.opened = False
            sequence.computed = sequence.confirmed = min(sequence.confirmed, sequence.length - 1)
            self.speculation.guesser.forget(sequence)
            self._settle(sequence)

    def reserve_steps(self, count: int) -> int:
        """The numbers of so many steps are somebody else's; returns the first."""
        self._next_step += count
        return self._next_step - count

    def fit(self, num_pages: int) -> None:
        """From now on at most so many pages are held: the youngest sequences are preempted until the others do with
        them. See `fits`."""
        self.pages.budget = min(num_pages, self.pages.num_pages)
        others = self.pages.num_held - len({page for sequence in self.running for page in sequence.pages})
        for sequence in reversed(self.running[:]):
            going_on = [s for s in self.running if s.state is State.RUNNING]
            if len({page for s in going_on for page in s.pages}) + others <= self.pages.budget:
                return
            self.preempt(sequence)

    @property
    def fits(self) -> bool:
        """Whether no more pages are held than may be: steps that were out are back."""
        return self.pages.num_held <= self.pages.budget

    def withdraw(self, sequence: Sequence) -> None:
        """It goes on elsewhere, from its log. Nothing of it may be out."""
        assert not sequence.in_flight
        self.finish(sequence)
        sequence.state = State.WAITING

    def preempt(self, sequence: Sequence) -> None:
        """Takes the pages of a sequence that runs, once no step names it: it is computed anew, from its log."""
        if sequence.state is State.RUNNING:
            sequence.state = State.PREEMPTED
            self.preemptions += 1
            self._settle(sequence)

    def append_token(self, sequence: Sequence, position: int, token: int) -> bool:
        """Enters a token into the log, if it is the next one of a sequence that still wants it."""
        if sequence.state not in (State.RUNNING, State.PREEMPTED) or position != sequence.length:
            return False
        sequence.log.append(token)
        return True

    def _settle(self, sequence: Sequence) -> None:
        """Frees what a finished or preempted sequence holds, when no step that names it is out."""
        if sequence.state is State.RUNNING or sequence.in_flight or sequence not in self.running:
            return
        self.running.remove(sequence)
        if sequence.opened:
            self.closed.append(CloseSequence(sequence=sequence.ident, after_step=sequence.last_step))
        self.pages.free(sequence.forget_pages())
        if sequence.state is State.PREEMPTED:
            sequence.state = State.WAITING
            self.waiting.appendleft(sequence)

    # -- planning ---------------------------------------------------------------------------------------------------

    def next_plan(self) -> Plan | None:
        """The next step, or None: the pipeline is full, or nothing can run before something comes back."""
        if len(self.out) >= STEPS_AHEAD * self.steps_in_flight:
            return None
        plan = self._next_replay() or self._next_run()
        if plan is None:
            return None
        self._next_step += 1
        self._turn += 1
        for row in plan.rows:
            sequence = row.sequence
            if not sequence.opened:
                sequence.opened = True
                if sequence.cached_tokens is None:
                    sequence.cached_tokens = sequence.taken_over
                plan.opened.append(sequence)
            if plan.replay is None:
                sequence.computed = row.start + row.count
            sequence.in_flight += 1
            sequence.last_step, sequence.turn = plan.step, self._turn
            sequence.unsampled += row.samples
        self.out[plan.step] = plan
        return plan

    def _next_run(self) -> Plan | None:
        self._admit()
        suspects = [s for s in self.running if s.alone]
        if not suspects:
            return self._plan_for(self.running)
        if self.out:
            return None  # What is out comes back first.
        for suspect in suspects:
            if (plan := self._plan_for([suspect])) is not None:
                return plan
        return self._plan_for([s for s in self.running if not s.alone])

    def _plan_for(self, sequences: list[Sequence]) -> Plan | None:
        """A step of some of these."""
        prefilling = self._prefilling(sequences)
        rows = self._decode_rows(sequences, beside_prompts=bool(prefilling))
        left = self.max_num_batched_tokens - sum(row.count for row in rows)
        # Decode rows may have taken the pages of some meanwhile.
        prefilling = [s for s in prefilling if s.state is State.RUNNING]
        counts = share_among([s.remaining_prefill for s in prefilling], min(self.prefill_budget, left))
        rows += [self._row(s, count) for s, count in zip(prefilling, counts, strict=True) if count]
        return Plan(self._next_step, rows, alone=self._runs_alone(rows)) if rows else None

    def _next_replay(self) -> Plan | None:
        if self.recovery is None:
            return None
        found = self.recovery.next(self.running, self.max_num_batched_tokens)
        if found is None:
            # Pages that nobody holds have not been filled, nor those of sequences that ended meanwhile.
            for sequence in self.running:
                if sequence.state is State.FINISHED:
                    self.pages.withdraw(sequence.pages)
            self.pages.empty_idle()
            self.recovery = None
            return None
        rows, stages = found
        for row in rows:
            row.new_pages = self._new_pages(row.sequence, row.start + row.count)
        # Nothing else can go on before it: a single stage that is refilled has its neighbours' cores.
        return Plan(self._next_step, rows, alone=stages[0] == stages[1], replay=stages)

    def _new_pages(self, sequence: Sequence, end: int) -> list[int]:
        """Those of the positions before `end` that the workers have not been told of; now they are."""
        last_page = self.pages.pages_for(end)
        new_pages = sequence.pages[sequence.pages_sent : last_page]
        sequence.pages_sent = max(sequence.pages_sent, last_page)
        return new_pages

    def _runs_alone(self, rows: list[Row]) -> bool:
        """Whether nothing is out but what the step waits for, and nothing will be planned beside it by itself."""
        row = rows[0]
        if len(rows) > 1 or len(self.running) > 1 or not row.samples:
            return False
        out = (other for plan in self.out.values() for other in plan.rows)
        return not self.out or (row.result_of > 0 and all(other.sequence is row.sequence for other in out))

    def _admit(self) -> None:
        """Admits from the queue, oldest first, while pages for all known tokens and one more are free, and beyond
        them one for each that runs: else what is admitted now would be preempted in a moment. Pages that hold a prefix
        of it already are taken over; such as somebody runs with need not be free."""
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if self.pages.num_free <= len(self.running):
                return
            shared = self.prefix.find(sequence)
            needed = self.pages.pages_for(sequence.length + 1) - len(shared)
            if self.running and self.pages.num_free_beside(shared) < needed + len(self.running):
                return
            pages = self.pages.allocate(needed, shared)
            if pages is None:
                return
            self.waiting.popleft()
            sequence.pages = shared + pages
            sequence.state = State.RUNNING
            self.prefix.take(sequence, shared)
            self.prefix.follow(sequence, self.running)
            self.running.append(sequence)

    def _decode_rows(self, sequences: list[Sequence], *, beside_prompts: bool) -> list[Row]:
        """Sequences whose next token can be computed, in equal shares a step.

        One whose token is still out is not named again before every other share has had its turn, or, when there are
        prompts to compute meanwhile, as many steps as can run at once: the first stage would wait for the token, and
        with it all that was planned behind.
        """
        decoding = [s for s in sequences if s.state is State.RUNNING and (s.log or s.unsampled)]
        share = min(-(-len(decoding) // self.steps_in_flight), self.max_num_batched_tokens)
        apart = self.steps_in_flight if beside_prompts or not share else -(-len(decoding) // share)
        # With guessed tokens a step may cost as much again as one of no tokens. So one stream guesses freely, and where
        # many run, and a token more is no longer cheap, nobody does.
        drafts_left = max(0, min(int(self.prefill_budget / LONGER), self.max_num_batched_tokens) - share)
        self._guesses_a_row = drafts_left // max(1, share)
        ready = [s for s in decoding if s.decodes and s.unsampled < STEPS_AHEAD]
        if len(self.out) >= self.steps_in_flight and any(
            s.unsampled and self.speculation.guesser.gathers(s) for s in decoding
        ):
            # Nothing is gained by being ahead: those that come back meet the others, and go on as one batch.
            return []
        # The one whose last step is longest ago goes first, also behind an epoch's end, so that none waits a round more
        # than another.
        ready.sort(key=lambda s: s.turn)
        rows: list[Row] = []
        for sequence in ready:
            if len(rows) == share:
                break
            if sequence.unsampled and self._next_step - sequence.last_step < apart:
                break
            if sequence.unsampled and drafts_left > 0 and self.speculation.guesser.waits(sequence):
                # It goes as a draft row when its next token is known.
                continue
            if sequence.state is not State.RUNNING or not self._grow(sequence):
                continue
            draft = self._draft(sequence, drafts_left)
            drafts_left -= len(draft)
            rows.append(self._row(sequence, 1, draft))
        # A later row's page may have come from an earlier one's sequence.
        kept = []
        for row in rows:
            if row.sequence.state is State.RUNNING:
                kept.append(row)
            elif row.guesses:
                # It was asked, and nobody will answer.
                self.speculation.guesser.told(row.sequence, [])
        return kept

    def _draft(self, sequence: Sequence, at_most: int) -> list[int]:
        """What to guess behind the sequence's last token. Only pages that nobody is about to need are taken for it."""
        if sequence.unsampled or at_most <= 0:
            return []
        draft = self.speculation.guess(sequence)[:at_most]
        return draft[: self._reserve(sequence, sequence.length + len(draft)) - sequence.length]

    def _reserve(self, sequence: Sequence, positions: int) -> int:
        """Pages for so many positions, if nobody is about to need them; how many positions there are pages for."""
        missing = self.pages.pages_for(positions) - len(sequence.pages)
        if missing > 0 and self.pages.num_free >= missing + len(self.running):
            sequence.pages.extend(self.pages.allocate(missing) or ())
        return len(sequence.pages) * self.pages.page_size

    def _grow(self, sequence: Sequence) -> bool:
        """A page for the next position, if it needs one; preempts the youngest when none is free."""
        missing = self.pages.pages_for(sequence.computed + 1) - len(sequence.pages)
        if missing <= 0:
            return True
        while self.pages.num_free < missing:
            if any(s.state is not State.RUNNING for s in self.running):
                # Pages are on their way back with steps in flight; another victim would be one too many.
                return False
            victim = self.running[-1]
            self.preempt(victim)
            if victim is sequence or victim.in_flight:
                # Itself the youngest, or the pages come when the victim's steps are back.
                return False
        sequence.pages.extend(self.pages.allocate(missing) or ())
        return True

    def _prefilling(self, sequences: list[Sequence]) -> list[Sequence]:
        """Sequences with prompt tokens to compute, the one that has waited longest first."""
        return [
            s
            for s in sequences
            # In this order: one that stops following may have taken over all of its prompt.
            if s.state is State.RUNNING and not self.prefix.still_follows(s) and s.prefills
        ]

    def _row(self, sequence: Sequence, count: int, draft: Iterable[int] = ()) -> Row:
        start, draft = sequence.computed, list(draft)
        count += len(draft)
        samples = start + count - len(draft) == sequence.expected
        guesses = self.speculation.ask(sequence, len(self.running), self._guesses_a_row) if samples else 0
        end = start + count + guesses
        new_pages = self._new_pages(sequence, min(end, self._reserve(sequence, end)) if guesses else end)
        result_of = sequence.last_step if start >= sequence.length else 0
        return Row(sequence, start, count, new_pages, samples, result_of, draft, guesses)
