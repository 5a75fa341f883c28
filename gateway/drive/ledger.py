"""What one gateway has accepted on one pipeline: it outlives an epoch, and goes on at the next. Pure.

A sequence keeps its pages and what every stage has confirmed of it. A new epoch tells which stages still hold that; the
others are refilled (schedule/recovery.py) before anything new is computed. Events come in, plans go out; nobody is
called back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from stagemesh.protos.v1 import stage_pb2, types_pb2
from stagemesh.settings.gateway import GatewaySettings

from ..schedule.budget import StepCosts
from ..schedule.copying import PageCopier
from ..schedule.draft_model import DraftModelGuesser, GuessCosts
from ..schedule.lookup import LookupGuesser
from ..schedule.pages import PageAllocator, Shape
from ..schedule.plan import Plan
from ..schedule.recovery import Recovery, lost_stages
from ..schedule.scheduler import Scheduler
from ..schedule.sequence import Sequence as TokenSequence
from ..schedule.speculation import NO_GUESSES
from ..schedule.suspects import note_deaths
from .live import LiveRequest


class Ledger:
    """Accepted requests and their sequences, the scheduler over them, and what their pages hold."""

    def __init__(self, make_scheduler: Callable[[Shape], Scheduler]) -> None:
        self._make_scheduler = make_scheduler
        self._shape: Shape | None = None
        self._filled: list[int] = []
        """Generations of the stages' pages that hold what is confirmed of the sequences; 0: being refilled."""
        self._now: list[int] = []
        self._expecting: set[int] = set()
        """Stages to whose pages some are still on their way from others."""
        self._replays: set[int] = set()
        """Steps of this epoch that compute what was computed before."""
        self.replayed_tokens = 0
        """Positions that this epoch computes again."""
        self._quarantined: list[int] = []
        """Pages of no sequence, which probes may write until this epoch is over."""
        self.scheduler: Scheduler
        self.live: dict[TokenSequence, LiveRequest] = {}
        """Sequences that have not ended -> their requests, which are kept and not called."""
        self.copier: PageCopier | None = None
        """What is to be copied to other workers, while a switch copies."""
        self._out_at_end: list[Plan] = []
        """Steps that were out when the last epoch ended, until another one begins."""
        self.costs = StepCosts()
        self.guess_costs = GuessCosts()

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(self, live: LiveRequest) -> None:
        """Queues all choices of a request."""
        for choice in live.choices:
            if not choice.finished:
                self.live[choice.sequence] = live
                self.scheduler.add(choice.sequence)

    def remove(self, live: LiveRequest) -> None:
        """The request ended: its sequences leave, their pages follow when no step names them."""
        for choice in live.choices:
            self.finish(choice.sequence)

    def finish(self, sequence: TokenSequence) -> None:
        """One choice ended."""
        if self.live.pop(sequence, None) is not None:
            self.scheduler.finish(sequence)

    def withdraw(self, live: LiveRequest) -> None:
        """The request goes on elsewhere. Nothing may be out."""
        for choice in live.choices:
            if self.live.pop(choice.sequence, None) is not None:
                self.scheduler.withdraw(choice.sequence)

    @property
    def requests(self) -> list[LiveRequest]:
        """Those that have not ended, in the order in which they came."""
        return list(dict.fromkeys(self.live.values()))

    # -- epochs -----------------------------------------------------------------------------------------------------

    def begin(self, shape: Shape, stages: Sequence[stage_pb2.RunOpened]) -> None:
        """An epoch begins, at which the stages' pages hold what they say."""
        self._out_at_end = []
        if self._quarantined:
            self.release(self._quarantined)
        if not self.fits(shape):
            self._start_over(shape)
        filled = [0 if stage in self._expecting else generation for stage, generation in enumerate(self._filled)]
        self._enter(shape, stages)
        runs = lost_stages(filled, self._now)
        for first, last in runs:
            self._filled[first : last + 1] = [0] * (last + 1 - first)
        if runs:
            self.scheduler.recovery = Recovery(runs, [opened.journal for opened in stages], shape.page_size)

    def _enter(self, shape: Shape, stages: Sequence[stage_pb2.RunOpened]) -> None:
        """An epoch begins, at which all stages hold what is confirmed."""
        self._shape = shape
        self.scheduler.pages.restrict(shape.pages)
        self._now = [opened.kv_generation for opened in stages]
        self._filled = list(self._now)
        self._expecting.clear()
        self._replays.clear()
        self.replayed_tokens = 0

    def arrived(self) -> None:
        """All pages that were on their way have come."""
        self._expecting.clear()

    def quarantine_page(self) -> int | None:
        """A page for a probe, if one is free. It is the probe's until it is released, or a later epoch begins."""
        pages = self.scheduler.pages.allocate(1)
        self._quarantined += pages or ()
        return pages[0] if pages is not None else None

    def release(self, pages: Sequence[int]) -> None:
        """Nothing is written to these pages of probes any more."""
        self.scheduler.pages.free([page for page in pages if page in self._quarantined])
        self._quarantined = [page for page in self._quarantined if page not in pages]

    def fits(self, shape: Shape) -> bool:
        """Whether what runs can go on with such pages."""
        before = self._shape
        if before is None:
            return False
        return (shape.page_size, shape.steps_in_flight) == (before.page_size, before.steps_in_flight)

    def pages_for(self, share: int) -> list[int] | None:
        """Ids of the pages to ask for where a coming epoch has so many; None before anything was. What is out fits into
        them already. The others are done without from here on; `stay` takes that back."""
        if self._shape is None:
            return None
        self.scheduler.fit(share)
        pages = self.scheduler.pages.choose(share)
        self.scheduler.pages.restrict(self.scheduler.pages.ids & set(pages))
        return pages

    def stay(self) -> None:
        """The coming epoch does not come."""
        assert self._shape is not None
        self.scheduler.pages.restrict(self._shape.pages)

    def move(
        self, shape: Shape, stages: Sequence[stage_pb2.RunOpened], next_step: int, expecting: Iterable[int]
    ) -> None:
        """An epoch begins whose stages hold all that is confirmed of every sequence; nothing is out. Those that are
        `expecting` some of it have it when `arrived` is called."""
        self.release(self._quarantined)
        self._enter(shape, stages)
        self._expecting.update(expecting)
        self.scheduler.rewind(next_step)

    def _start_over(self, shape: Shape) -> None:
        """Other pages than before: every sequence is computed anew, in the order in which they came."""
        before = self.scheduler if self._shape is not None else None
        self.scheduler, self._filled = self._make_scheduler(shape), []
        if before is None:
            return
        for sequence in [*before.running, *before.waiting]:
            before.withdraw(sequence)
            self.scheduler.add(sequence)

    def end(self) -> None:
        """The epoch is over: what is out will never come back."""
        self._out_at_end = list(self.scheduler.out.values())
        self.scheduler.rewind()

    def ranks_died(self) -> list[TokenSequence]:
        """Ranks died at the epoch that is over, as is heard before another one begins. Returns the sequences that ended
        them, if that is known by now."""
        out, self._out_at_end = self._out_at_end, []
        culprits, given_up = note_deaths(out)
        for sequence in given_up:
            self.scheduler.preempt(sequence)
        return culprits

    # -- what is computed again -------------------------------------------------------------------------------------

    @property
    def recovering(self) -> bool:
        """Whether stages are being refilled."""
        return self._filled != self._now

    def note_sent(self, plan: Plan) -> None:
        """A step went out."""
        if self.copier is not None:
            self.copier.note(plan)
        if plan.replay is not None:
            first, last = plan.replay
            # Also where a stage was not lost: who opens a page wipes what it holds behind.
            self._filled[first : last + 1] = [0] * (last + 1 - first)
            self._replays.add(plan.step)
            self.replayed_tokens += sum(row.count for row in plan.rows)

    def expected_s(self, gateways: int) -> float | None:
        """What all steps that are out take, one stage after the other; None while that is not known."""
        total_s = 0.0
        for plan in self.scheduler.out.values():
            step_s = self.costs.expected_s(sum(row.count for row in plan.rows))
            if step_s is None:
                return None
            total_s += step_s
        return gateways * total_s

    def is_replay(self, step: int) -> bool:
        """Whether a step of this epoch computes what was computed before."""
        return step in self._replays

    def recovered(self) -> bool:
        """True once: when the stages that were lost hold everything again."""
        if not self.recovering or self.scheduler.recovery is not None:
            return False
        if any(plan.replay is not None for plan in self.scheduler.out.values()):
            return False
        self._filled = list(self._now)
        return True


def make_ledger(view: types_pb2.PipelineView, settings: GatewaySettings) -> Ledger:
    """None yet, with a scheduler as the settings want it."""

    def make(shape: Shape) -> Scheduler:
        guesser = NO_GUESSES
        # The gateway's own settings come before the pipeline's draft model.
        if settings.speculative_config is not None:
            guesser = LookupGuesser(settings.speculative_config)
        elif view.model.HasField("draft"):
            guesser = DraftModelGuesser(view.model.draft.num_tokens, shape.steps_in_flight, ledger.guess_costs)
        return Scheduler(
            PageAllocator(len(shape.pages), shape.page_size),
            steps_in_flight=shape.steps_in_flight,
            max_num_seqs=view.limits.max_num_seqs,
            max_num_batched_tokens=view.limits.max_num_batched_tokens,
            prefix_caching=settings.enable_prefix_caching,
            guesser=guesser,
        )

    ledger = Ledger(make)
    return ledger
