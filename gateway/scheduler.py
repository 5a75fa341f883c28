"""Which rows go into the next step. Pure: no I/O, no clock; events in, plans out.

Continuous batching over a pipeline: up to `steps_in_flight` steps of disjoint decode rows are out at once. Decode rows
are spread so that steps stay equal: at most ceil(live / steps in flight) a step. Prefill goes in chunks beside them
under a token budget, and the chunks of one prompt follow each other without waiting for results. Half of what a step
can prefill goes to the prompt that has waited longest, the rest to the shortest remaining ones first, so that a long
prompt neither starves the short ones nor is starved by them (the idea of Sarathi-Serve's chunks, Agrawal et al. 2024).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .pages import PageAllocator
from .prefix import PrefixCache
from .sequence import Sequence, State


@dataclass
class Row:
    """`count` tokens of a sequence from position `start`."""

    sequence: Sequence
    start: int
    count: int
    new_pages: list[int]
    samples: bool
    """Whether the row ends at the last known token, so that the next one is drawn."""


@dataclass
class Plan:
    """One step: its rows, and the sequences that the workers must know of before it, or can forget."""

    step: int
    rows: list[Row]
    opened: list[Sequence] = field(default_factory=list)


@dataclass(frozen=True)
class Closed:
    """A sequence number that the workers can forget."""

    ident: int
    after_step: int


class Scheduler:
    """Sequences that wait, run and end on one pipeline at one epoch."""

    def __init__(
        self,
        pages: PageAllocator,
        *,
        steps_in_flight: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool = True,
    ) -> None:
        self.pages = pages
        self.prefix = PrefixCache(pages, prefix_caching)
        self.steps_in_flight = steps_in_flight
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In the order of admission: the last is the youngest, preempted first."""
        self.out: dict[int, Plan] = {}
        """Steps in flight."""
        self.closed: list[Closed] = []
        """What the workers have not yet been told to forget; the caller takes it."""
        self.preemptions = 0
        self._next_step = 1

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
        self._settle(sequence)

    def step_done(self, step: int) -> Plan:
        """Every stage has run the step. Tokens are entered by `append_token` before this."""
        plan = self.out.pop(step)
        for row in plan.rows:
            row.sequence.in_flight -= 1
            if row.samples:
                row.sequence.awaiting_token = False
            self.prefix.confirm(row.sequence, row.start + row.count)
        for row in plan.rows:
            self._settle(row.sequence)
        return plan

    def failed(self, sequence: Sequence) -> None:
        """What a sequence computed is not finite; its end is told by `finish`. To be called before `step_done`."""
        self.prefix.fail(sequence)

    def append_token(self, sequence: Sequence, position: int, token: int) -> bool:
        """Enters a token into the log, if it is the next one of a sequence that still wants it."""
        if sequence.state is not State.RUNNING or position != sequence.length:
            return False
        sequence.log.append(token)
        return True

    def _settle(self, sequence: Sequence) -> None:
        """Frees what a finished or preempted sequence holds, when no step that names it is out."""
        if sequence.in_flight or sequence not in self.running:
            return
        if sequence.state is State.FINISHED:
            self._release(sequence)
        elif sequence.preempted:
            self._release(sequence)
            sequence.preempted = False
            sequence.state = State.WAITING
            self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence.opened:
            self.closed.append(Closed(sequence.ident, sequence.last_step))
        self.pages.free(sequence.forget_pages())

    # -- planning ---------------------------------------------------------------------------------------------------

    def next_plan(self) -> Plan | None:
        """The next step, or None: the pipeline is full, or nothing can run before something comes back."""
        if len(self.out) >= self.steps_in_flight:
            return None
        self._admit()
        rows = self._decode_rows()
        rows += self._prefill_rows(self.max_num_batched_tokens - len(rows))
        if not rows:
            return None
        plan = Plan(self._next_step, rows)
        self._next_step += 1
        for row in rows:
            sequence = row.sequence
            if not sequence.opened:
                sequence.opened = True
                if sequence.cached_tokens is None:
                    sequence.cached_tokens = sequence.taken_over
                plan.opened.append(sequence)
            sequence.computed = row.start + row.count
            sequence.in_flight += 1
            sequence.last_step = plan.step
            sequence.awaiting_token = sequence.awaiting_token or row.samples
        self.out[plan.step] = plan
        return plan

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

    def _decode_rows(self) -> list[Row]:
        """Sequences whose next token can be computed now, in equal shares a step."""
        decoding = [s for s in self.running if s.log and s.length - s.computed <= 1 and s.state is State.RUNNING]
        share = -(-len(decoding) // self.steps_in_flight)
        ready = [s for s in decoding if not s.awaiting_token and not s.in_flight and not s.preempted]
        # The one whose last step is longest ago goes first, so that none waits a round more than another.
        ready.sort(key=lambda s: s.last_step)
        rows: list[Row] = []
        for sequence in ready:
            if len(rows) == min(share, self.max_num_batched_tokens):
                break
            if sequence.preempted or sequence.state is not State.RUNNING or not self._grow(sequence):
                continue
            rows.append(self._row(sequence, 1))
        return [row for row in rows if not row.sequence.preempted and row.sequence.state is State.RUNNING]

    def _grow(self, sequence: Sequence) -> bool:
        """A page for the next position, if it needs one; preempts the youngest when none is free."""
        missing = self.pages.pages_for(sequence.computed + 1) - len(sequence.pages)
        if missing <= 0:
            return True
        while self.pages.num_free < missing:
            if any(s.preempted or s.state is State.FINISHED for s in self.running):
                # Pages are on their way back with steps in flight; another victim would be one too many.
                return False
            victim = next((s for s in reversed(self.running) if not s.preempted and s.state is State.RUNNING), None)
            if victim is None:
                return False
            victim.preempted = True
            self.preemptions += 1
            self._settle(victim)
            if victim is sequence or victim.in_flight:
                # Itself the youngest, or the pages come when the victim's steps are back.
                return False
        pages = self.pages.allocate(missing)
        assert pages is not None
        sequence.pages.extend(pages)
        return True

    def _prefill_rows(self, budget: int) -> list[Row]:
        """Chunks of prompts: half of the budget to the oldest, the rest to the shortest first."""
        prefilling = [
            s
            for s in self.running
            if s.state is State.RUNNING
            and not s.preempted
            and not s.awaiting_token
            and self._prefills(s)
            and not self.prefix.still_follows(s)
        ]
        if not prefilling or budget <= 0:
            return []
        oldest, others = prefilling[0], sorted(prefilling[1:], key=lambda s: s.remaining_prefill)
        counts = {oldest.ident: min(oldest.remaining_prefill, budget if not others else -(-budget // 2))}
        left = budget - counts[oldest.ident]
        for sequence in others:
            counts[sequence.ident] = min(sequence.remaining_prefill, left)
            left -= counts[sequence.ident]
        counts[oldest.ident] += min(left, oldest.remaining_prefill - counts[oldest.ident])
        return [self._row(s, counts[s.ident]) for s in [oldest, *others] if counts[s.ident]]

    @staticmethod
    def _prefills(sequence: Sequence) -> bool:
        """Whether known tokens are left to compute, other than the one newest token of a decode."""
        return sequence.remaining_prefill > 1 or (sequence.remaining_prefill == 1 and not sequence.log)

    def _row(self, sequence: Sequence, count: int) -> Row:
        start = sequence.computed
        last_page = self.pages.pages_for(start + count)
        new_pages = sequence.pages[sequence.pages_sent : last_page]
        sequence.pages_sent = max(sequence.pages_sent, last_page)
        return Row(sequence, start, count, new_pages, samples=start + count == sequence.length)
