"""Decides which rows go into the next step. Pure: no I/O, no clock; events in, plans out.

This is continuous batching over a pipeline. Decode rows are spread over `decode_steps` steps of equal size, at most
ceil(decoding sequences / decode steps) per step: over as many as may be in flight, or over one. The next step of the
same rows is planned while the one before is in flight: its tokens are "the result of step N", which the last stage
sends directly to the first. So no stage waits for the gateway.

Prefill goes in chunks with the decode rows, under a token budget (budget.py), so that steps take equally long. Chunks
of one prompt follow each other without waiting for results (Sarathi-Serve, Agrawal et al. 2024). The prompt that has
waited longest goes first, but gets only half of the budget if others have less left.

With speculation, a sequence whose next tokens can be guessed goes as a draft row: its last known token and the guess,
verified in one step. No other step of it is in flight meanwhile, as its next position is known only when the row is
back.
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
"""Steps of one sequence that may be in flight: one runs, and the next waits for its token."""


class Scheduler:
    """Schedules the sequences of one pipeline, over its epochs."""

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
        self.decode_steps = steps_in_flight
        """Steps over which decode rows are spread. The caller lowers it where fewer are faster."""
        self.prefill_budget = max_num_batched_tokens
        """Number of prompt tokens in one step. The caller adapts it to the measured costs of steps."""
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """Sequences in the order of admission. The last is the youngest, which is preempted first."""
        self.out: dict[int, Plan] = {}  # steps in flight
        self.closed: list[CloseSequence] = []
        """Messages that close sequences on the workers. The caller takes and sends them."""
        self.recovery: Recovery | None = None
        """Plans what stages must compute again before anything else. Set it after `rewind`."""
        self.preemptions = 0  # since the caller reset it
        self._next_step = 1
        self._turn = 0  # steps planned, over all epochs
        self._guesses_a_row = 0
        """Most tokens that the last stage may be asked to guess for each row of the step that is being planned."""

    # -- events -----------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Its prompt + max_tokens must fit into the pages."""
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence. Its pages are freed once no step in flight names it."""
        if sequence.state is State.FINISHED:
            return
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED
        self.speculation.guesser.forget(sequence)
        self._settle(sequence)

    def step_done(self, step: int) -> Plan:
        """Every stage has run the step. Call `append_token` for its tokens before this."""
        plan = self.out.pop(step)
        for row in plan.rows:
            row.sequence.in_flight -= 1
            if row.samples:
                row.sequence.unsampled -= 1
            if row.draft:
                # Positions after a wrong guess are void: the sequence goes on where the sampled tokens end. The newest
                # token of the log is not computed yet, whether it was guessed or not.
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
        """A sequence has computed values that are not finite. Call it before `step_done`, and then `finish`."""
        self.prefix.fail(sequence, self.running)

    def rewind(self, next_step: int = 1) -> None:
        """Drops the steps in flight, which will never come back. Every sequence goes on after its confirmed positions.

        New steps are numbered from `next_step` on. The workers know no sequence any more.
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
        """Reserves `count` step numbers for the caller. Returns the first."""
        self._next_step += count
        return self._next_step - count

    def fit(self, num_pages: int) -> None:
        """Limits the number of held pages. The youngest sequences are preempted until the others need no more.

        `fits` says when that has come true.
        """
        self.pages.budget = min(num_pages, self.pages.num_pages)
        others = self.pages.num_held - len({page for sequence in self.running for page in sequence.pages})
        for sequence in reversed(self.running[:]):
            going_on = [s for s in self.running if s.state is State.RUNNING]
            if len({page for s in going_on for page in s.pages}) + others <= self.pages.budget:
                return
            self.preempt(sequence)

    @property
    def fits(self) -> bool:
        """Whether the held pages are within the limit of `fit`. Preempted ones are freed when their steps are back."""
        return self.pages.num_held <= self.pages.budget

    def withdraw(self, sequence: Sequence) -> None:
        """Removes a sequence, which goes on elsewhere from its log. No step of it may be in flight."""
        assert not sequence.in_flight
        self.finish(sequence)
        sequence.state = State.WAITING

    def preempt(self, sequence: Sequence) -> None:
        """Takes the pages of a running sequence, once no step names it. It is computed again, from its log."""
        if sequence.state is State.RUNNING:
            sequence.state = State.PREEMPTED
            self.preemptions += 1
            self._settle(sequence)

    def append_token(self, sequence: Sequence, position: int, token: int) -> bool:
        """Appends a token to the log, if it is the next one of a sequence that goes on. Returns whether it was."""
        if sequence.state not in (State.RUNNING, State.PREEMPTED) or position != sequence.length:
            return False
        sequence.log.append(token)
        return True

    def _settle(self, sequence: Sequence) -> None:
        """Frees the pages of a finished or preempted sequence, when no step in flight names it."""
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
        """The next step. None if the pipeline is full, or if nothing can run before a step comes back."""
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
            return None  # The steps in flight must come back first.
        for suspect in suspects:
            if (plan := self._plan_for([suspect])) is not None:
                return plan
        return self._plan_for([s for s in self.running if not s.alone])

    def _plan_for(self, sequences: list[Sequence]) -> Plan | None:
        """A step with rows of some of these sequences."""
        prefilling = self._prefilling(sequences)
        rows = self._decode_rows(sequences, beside_prompts=bool(prefilling))
        left = self.max_num_batched_tokens - sum(row.count for row in rows)
        # Decode rows may have preempted some of them.
        prefilling = [s for s in prefilling if s.state is State.RUNNING]
        counts = share_among([s.remaining_prefill for s in prefilling], min(self.prefill_budget, left))
        rows += [self._row(s, count) for s, count in zip(prefilling, counts, strict=True) if count]
        return Plan(self._next_step, rows, alone=self._runs_alone(rows)) if rows else None

    def _next_replay(self) -> Plan | None:
        if self.recovery is None:
            return None
        found = self.recovery.next(self.running, self.max_num_batched_tokens)
        if found is None:
            # Idle pages were not refilled, nor were pages of sequences that have ended meanwhile.
            for sequence in self.running:
                if sequence.state is State.FINISHED:
                    self.pages.withdraw(sequence.pages)
            self.pages.empty_idle()
            self.recovery = None
            return None
        rows, stages = found
        for row in rows:
            row.new_pages = self._new_pages(row.sequence, row.start + row.count)
        # No other step runs during recovery, so a single stage that is refilled may use its neighbours' cores.
        return Plan(self._next_step, rows, alone=stages[0] == stages[1], replay=stages)

    def _new_pages(self, sequence: Sequence, end: int) -> list[int]:
        """Pages of positions before `end` that the workers do not know of yet. They count as sent from here on."""
        last_page = self.pages.pages_for(end)
        new_pages = sequence.pages[sequence.pages_sent : last_page]
        sequence.pages_sent = max(sequence.pages_sent, last_page)
        return new_pages

    def _runs_alone(self, rows: list[Row]) -> bool:
        """Whether no other step runs beside this one: it waits for the newest step in flight, and the next for it.

        That is so with a single sequence, or if all sequences are in each step.
        """
        if not any(row.samples for row in rows) or (len(self.running) > 1 and self.decode_steps > 1):
            return False
        newest = max(self.out, default=0)
        return not newest or any(row.result_of == newest for row in rows)

    def _admit(self) -> None:
        """Admits sequences from the queue, oldest first, while enough pages are free.

        A sequence needs pages for all its known tokens and one more. One page for each running sequence must also stay
        free, or the new one would soon be preempted. Pages that already hold a prefix of it are shared.
        """
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
        """Rows of sequences whose next token can be computed, in equal shares per step.

        A sequence whose token is still in flight must wait until every other share has had its turn. If there are also
        prompts to compute, it waits for `decode_steps` steps. Otherwise the first stage would wait for the token,
        and all later steps with it.
        """
        decoding = [s for s in sequences if s.state is State.RUNNING and (s.log or s.unsampled)]
        share = min(-(-len(decoding) // self.decode_steps), self.max_num_batched_tokens)
        apart = self.decode_steps if beside_prompts or not share else -(-len(decoding) // share)
        # Guessed tokens may add the cost of one step without tokens. So a single stream guesses freely. When many run,
        # one more token is not cheap, and no sequence guesses.
        drafts_left = max(0, min(int(self.prefill_budget / LONGER), self.max_num_batched_tokens) - share)
        self._guesses_a_row = drafts_left // max(1, share)
        ready = [s for s in decoding if s.decodes and s.unsampled < STEPS_AHEAD]
        if len(self.out) >= self.steps_in_flight and any(
            s.unsampled and self.speculation.guesser.gathers(s) for s in decoding
        ):
            # Planning ahead gains nothing here. Rows that come back wait for the others, and go on as one batch.
            return []
        # The sequence whose last step is longest ago goes first, also after an epoch's end, so that all wait equally.
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
        # A later row may have preempted the sequence of an earlier one.
        kept = []
        for row in rows:
            if row.sequence.state is State.RUNNING:
                kept.append(row)
            elif row.guesses:
                # Its guesses will never come.
                self.speculation.guesser.told(row.sequence, [])
        return kept

    def _draft(self, sequence: Sequence, at_most: int) -> list[int]:
        """Guesses after the sequence's last token. It uses only pages that no other sequence will soon need."""
        if sequence.unsampled or at_most <= 0:
            return []
        draft = self.speculation.guess(sequence)[:at_most]
        return draft[: self._reserve(sequence, sequence.length + len(draft)) - sequence.length]

    def _reserve(self, sequence: Sequence, positions: int) -> int:
        """Allocates pages for `positions`, if no other sequence will soon need them. Returns the positions that fit."""
        missing = self.pages.pages_for(positions) - len(sequence.pages)
        if missing > 0 and self.pages.num_free >= missing + len(self.running):
            sequence.pages.extend(self.pages.allocate(missing) or ())
        return len(sequence.pages) * self.pages.page_size

    def _grow(self, sequence: Sequence) -> bool:
        """Allocates a page for the next position if needed. Preempts the youngest sequence if none is free.

        Returns whether the sequence has the page.
        """
        missing = self.pages.pages_for(sequence.computed + 1) - len(sequence.pages)
        if missing <= 0:
            return True
        while self.pages.num_free < missing:
            if any(s.state is not State.RUNNING for s in self.running):
                # Pages will be free when steps in flight are back, so no further sequence is preempted.
                return False
            victim = self.running[-1]
            self.preempt(victim)
            if victim is sequence or victim.in_flight:
                # It is the youngest itself, or the pages are free only when the victim's steps are back.
                return False
        sequence.pages.extend(self.pages.allocate(missing) or ())
        return True

    def _prefilling(self, sequences: list[Sequence]) -> list[Sequence]:
        """Sequences with prompt tokens to compute, the oldest first."""
        return [
            s
            for s in sequences
            # The order matters: a sequence that stops following may have taken pages of all its prompt.
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
