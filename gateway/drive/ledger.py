"""The requests that one gateway has accepted on one pipeline. They outlive an epoch, and go on at the next. Pure.

A sequence keeps its pages and the positions that every stage has confirmed. At a new epoch, each stage says whether its
pages still hold them. The other stages are refilled (schedule/recovery.py) before anything new is computed. Events come
in, and plans go out; there are no callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from stagemesh.protos.v1 import stage_pb2, types_pb2
from stagemesh.settings.gateway import GatewaySettings

from ..schedule.budget import DecodeSteps, StepCosts
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
        """For each stage, the generation of pages that hold all confirmed positions. 0: they are being refilled."""
        self._now: list[int] = []
        """For each stage, the generation of its pages at this epoch."""
        self._expecting: set[int] = set()
        """Stages to which pages are still being copied."""
        self._replays: set[int] = set()
        """Steps of this epoch that compute positions again."""
        self.replayed_tokens = 0
        """Number of positions that this epoch computes again."""
        self._quarantined: list[int] = []
        """Pages of no sequence, which probes may write until this epoch is over."""
        self.scheduler: Scheduler
        self.live: dict[TokenSequence, LiveRequest] = {}
        """Sequence that has not ended -> its request. The ledger stores requests and does not call them."""
        self.copier: PageCopier | None = None
        """Pages to copy to other workers, while a switch copies."""
        self._out_at_end: list[Plan] = []
        """Steps that were in flight when the last epoch ended. Empty from the next epoch on."""
        self.costs = StepCosts()
        self.guess_costs = GuessCosts()
        self.decode_steps = DecodeSteps()

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(self, live: LiveRequest) -> None:
        """Queues all choices of a request."""
        for choice in live.choices:
            if not choice.finished:
                self.live[choice.sequence] = live
                self.scheduler.add(choice.sequence)

    def remove(self, live: LiveRequest) -> None:
        """Removes the sequences of a request that ended. Their pages are freed when no step names them."""
        for choice in live.choices:
            self.finish(choice.sequence)

    def finish(self, sequence: TokenSequence) -> None:
        """Removes a choice that ended."""
        if self.live.pop(sequence, None) is not None:
            self.scheduler.finish(sequence)

    def withdraw(self, live: LiveRequest) -> None:
        """Removes a request that goes on at another pipeline. No step may be in flight."""
        for choice in live.choices:
            if self.live.pop(choice.sequence, None) is not None:
                self.scheduler.withdraw(choice.sequence)

    @property
    def requests(self) -> list[LiveRequest]:
        """Requests that have not ended, in the order of their arrival."""
        return list(dict.fromkeys(self.live.values()))

    # -- epochs -----------------------------------------------------------------------------------------------------

    def begin(self, shape: Shape, stages: Sequence[stage_pb2.RunOpened]) -> None:
        """Begins an epoch. `stages`: what each stage said of its pages."""
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
        """Begins an epoch at which all stages hold all confirmed positions."""
        self._shape = shape
        self.scheduler.pages.restrict(shape.pages)
        self._now = [opened.kv_generation for opened in stages]
        self._filled = list(self._now)
        self._expecting.clear()
        self._replays.clear()
        self.replayed_tokens = 0

    def arrived(self) -> None:
        """All copied pages have arrived."""
        self._expecting.clear()

    def quarantine_page(self) -> int | None:
        """A page for a probe, if one is free. The probe has it until it is released, or a later epoch begins."""
        pages = self.scheduler.pages.allocate(1)
        self._quarantined += pages or ()
        return pages[0] if pages is not None else None

    def release(self, pages: Sequence[int]) -> None:
        """Frees pages of probes, which are not written any more. Those that are free already stay as they are."""
        self.scheduler.pages.free([page for page in pages if page in self._quarantined])
        self._quarantined = [page for page in self._quarantined if page not in pages]

    def fits(self, shape: Shape) -> bool:
        """Whether running sequences can go on with pages of this shape."""
        before = self._shape
        if before is None:
            return False
        return (shape.page_size, shape.steps_in_flight) == (before.page_size, before.steps_in_flight)

    def pages_for(self, share: int) -> list[int] | None:
        """Ids of the `share` pages to ask for at the next epoch. None before the first epoch.

        From now on only pages among these are used, of those that there are now. `stay` takes that back.
        """
        if self._shape is None:
            return None
        self.scheduler.fit(share)
        pages = self.scheduler.pages.choose(share)
        self.scheduler.pages.restrict(self.scheduler.pages.ids & set(pages))
        return pages

    def stay(self) -> None:
        """Takes `pages_for` back: the next epoch does not begin."""
        assert self._shape is not None
        self.scheduler.pages.restrict(self._shape.pages)

    def move(
        self, shape: Shape, stages: Sequence[stage_pb2.RunOpened], next_step: int, expecting: Iterable[int]
    ) -> None:
        """Begins an epoch whose stages hold all confirmed positions. No step may be in flight.

        `expecting`: stages that hold them only when `arrived` is called.
        """
        self.release(self._quarantined)
        self._enter(shape, stages)
        self._expecting.update(expecting)
        self.scheduler.rewind(next_step)

    def _start_over(self, shape: Shape) -> None:
        """The pages have another shape: every sequence is computed again, in the order of arrival."""
        before = self.scheduler if self._shape is not None else None
        self.scheduler, self._filled = self._make_scheduler(shape), []
        if before is None:
            return
        for sequence in [*before.running, *before.waiting]:
            before.withdraw(sequence)
            self.scheduler.add(sequence)

    def end(self) -> None:
        """Ends the epoch: steps in flight will never come back."""
        self._out_at_end = list(self.scheduler.out.values())
        self.scheduler.rewind()

    def ranks_died(self) -> list[TokenSequence]:
        """Ranks died at the epoch that is over. Returns the sequences that caused it, if they are known by now.

        Call it before the next epoch begins.
        """
        out, self._out_at_end = self._out_at_end, []
        culprits, given_up = note_deaths(out)
        for sequence in given_up:
            self.scheduler.preempt(sequence)
        return culprits

    # -- recovery ---------------------------------------------------------------------------------------------------

    @property
    def recovering(self) -> bool:
        """Whether stages are being refilled."""
        return self._filled != self._now

    def note_sent(self, plan: Plan) -> None:
        """A step was sent."""
        if self.copier is not None:
            self.copier.note(plan)
        if plan.replay is not None:
            first, last = plan.replay
            # This includes stages that were not lost: writing the first position of a page wipes the rest of it.
            self._filled[first : last + 1] = [0] * (last + 1 - first)
            self._replays.add(plan.step)
            self.replayed_tokens += sum(row.count for row in plan.rows)

    def expected_s(self, gateways: int) -> float | None:
        """Expected seconds of all steps in flight, summed over the stages. None if that is not known yet."""
        total_s = 0.0
        for plan in self.scheduler.out.values():
            step_s = self.costs.expected_s(sum(row.count for row in plan.rows))
            if step_s is None:
                return None
            total_s += step_s
        return gateways * total_s

    def is_replay(self, step: int) -> bool:
        """Whether a step of this epoch computes positions again."""
        return step in self._replays

    def recovered(self) -> bool:
        """True once: when the lost stages hold all confirmed positions again."""
        if not self.recovering or self.scheduler.recovery is not None:
            return False
        if any(plan.replay is not None for plan in self.scheduler.out.values()):
            return False
        self._filled = list(self._now)
        return True


def make_ledger(view: types_pb2.PipelineView, settings: GatewaySettings) -> Ledger:
    """An empty ledger whose scheduler follows the settings."""

    def make(shape: Shape) -> Scheduler:
        guesser = NO_GUESSES
        # The gateway's own settings override the pipeline's draft model.
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
