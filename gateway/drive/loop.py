"""The gateway's hot loop: plan, send, take results. Each loop drives one pipeline at one epoch.

The scheduler decides. This file turns its plans into messages, and results into tokens of requests. The ledger has the
scheduler and the requests, and passes from one epoch's loop to the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from stagemesh.errors import InternalError, NumericalError, PoisonedRequest, RanksDied, StageLost, StagemeshError
from stagemesh.faults import point
from stagemesh.protos.v1 import stage_pb2, types_pb2

from ..api.request import TokenLogprob
from ..schedule.plan import Plan
from ..schedule.sequence import State
from ..schedule.speculation import NO_GUESSES
from ..session.messages import open_message, plan_message
from ..session.probe import STEPS, probe_messages
from ..session.session import Session
from ..session.slot_lease import SlotLease
from ..telemetry.metrics import Metrics
from ..telemetry.trace import Recorder
from ..timing import GatewayTiming
from .deadline import StepDeadline
from .ledger import Ledger
from .waiting import until_set

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observers:
    """What loops report measurements to, with their time-outs and their clock."""

    metrics: Metrics
    recorder: Recorder
    timing: GatewayTiming
    clock: Callable[[], float]


class BatchLoop:
    """Drives one pipeline at one epoch, from its first plan until it is lost or closed."""

    def __init__(
        self,
        view: types_pb2.PipelineView,
        ledger: Ledger,
        observers: Observers,
        progress: asyncio.Event,
        on_crossed: Callable[[BatchLoop], None],
        on_lost: Callable[[BatchLoop, StagemeshError], None],
    ) -> None:
        """`progress`: set when something came back, or the loop is lost. `on_crossed`: called once, when a token has
        crossed every stage. `on_lost`: called when this epoch cannot be driven any more."""
        self.view = view
        self.session = Session(view, self, observers.timing)
        self.crossed = False
        """Whether a token has crossed every stage."""
        self.stuck = False
        """Whether the loop is lost because steps do not come back. Only the gateway notices that."""
        self.lost: StagemeshError | None = None
        """Why the loop is lost. None if it is not."""
        self.copied: set[tuple[int, int]] = set()
        """(index of the copy, number of the message) of page copies that have arrived."""
        self._ledger = ledger
        self._observers = observers
        self._progress = progress
        self._on_crossed = on_crossed
        self._on_lost = on_lost
        self._shares = max(1, view.limits.gateways) * max(1, view.limits.pipelines)
        """Number of gateways and pipelines that may have steps on the same workers."""
        self._deadline = StepDeadline(observers.timing)
        self._paused = False
        self._probe = range(1, 1)
        """Step numbers of the probe. Empty if there was no probe."""
        self._probe_page: int | None = None
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Pipeline and epoch."""
        return self.view.pipeline_id, self.view.epoch

    # -- start and end ----------------------------------------------------------------------------------------------

    async def start(self, slot: SlotLease) -> None:
        """Opens a session on every stage, and goes on with the ledger. Raises the first stage's error."""
        # `pages_for` gives up other pages before the sessions open: one stage may give them to another gateway although
        # another stage refuses the session.
        await self.open(slot, self._ledger.pages_for(self.session.share))
        self._ledger.begin(self.session.shape, self.session.opened)
        self._go()

    async def open(self, slot: SlotLease, pages: Sequence[int] | None) -> None:
        """Opens the session. Raises the first stage's error, or the error by which the loop was lost meanwhile."""
        await self.session.open(slot, pages)
        if self.lost is not None:
            raise self.lost

    def probe(self) -> bool:
        """Sends a token across all stages, once, on a page of no sequence. Returns False if no page is free."""
        if not self._probe and (page := self._ledger.quarantine_page()) is not None:
            first = 1 if self._task is None else self._ledger.scheduler.reserve_steps(STEPS)
            self._probe, self._probe_page = range(first, first + STEPS), page
            for step in self._probe:
                self._deadline.sent(step, self._observers.clock())
            for message in probe_messages(page, first, self.view.epoch):
                self.session.broadcast(message)
            self._wake.set()
        return bool(self._probe)

    def take_over(self, expecting: Iterable[int]) -> None:
        """Goes on with the ledger, whose pages all stages hold or are `expecting`. No step of it may be in flight."""
        self._ledger.move(self.session.shape, self.session.opened, self._probe.stop, expecting)
        self._go()

    def retire(self) -> None:
        """Stops the loop, because another loop has taken over the ledger. Only `close` may follow."""
        self.lost = StageLost(f"{self.view.pipeline_id} has moved to another epoch")
        self._wake.set()

    def wake(self) -> None:
        """Makes the loop look for new work in the ledger."""
        self._wake.set()

    def pause(self) -> None:
        """Plans no steps until `resume`. Steps in flight come back."""
        self._paused = True

    def resume(self) -> None:
        """Plans again."""
        self._paused = False
        self._wake.set()

    def fail(self, error: StagemeshError) -> None:
        """The pipeline is lost at this epoch. Requests wait for the next epoch. An InternalError ends them at once."""
        if self.lost is not None:
            return
        self.lost = error
        self._wake.set()
        self._progress.set()
        if self._task is not None:
            self._ledger.end()
        if isinstance(error, InternalError):
            for live in self._ledger.requests:
                live.fail(error)
        self._on_lost(self, error)

    async def stop(self) -> None:
        """Stops planning for good, so that another loop may use the ledger."""
        self.fail(StageLost("the gateway is stopping"))
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def close(self, *, last_words: bool = False) -> None:
        """Ends the sessions on all stages. `last_words`: first waits for workers to say why this epoch was lost."""
        await self.stop()
        if last_words:
            await self.session.hear_out()
        await self.session.close()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _go(self) -> None:
        layers = [(stage.layers.first, stage.layers.last) for stage in self.view.stages]
        self._ledger.costs.only_for(layers)
        self._ledger.decode_steps.only_for(layers[-1])
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self._plan_and_send()
        except Exception as e:
            log.exception("the batch loop of %s failed", self.view.pipeline_id)
            self.fail(InternalError(f"{type(e).__name__}: {e}"))

    async def _plan_and_send(self) -> None:
        scheduler = self._ledger.scheduler
        while self.lost is None:
            self._check_deadline()
            while self.lost is None and not self._paused and (plan := scheduler.next_plan()) is not None:
                self._send(plan)
            self._send_closed()
            if self._ledger.recovered():
                log.info("%s epoch %d: all stages are refilled", *self.key)
            await until_set(self._wake, self._observers.timing.look_s if self._deadline.watches else None)

    def _check_deadline(self) -> None:
        out_s = self._deadline.out_s(self._observers.clock())
        if out_s < self._observers.timing.step_slack_s:
            return
        measured = self.crossed and not self._ledger.recovering
        most_s = self._deadline.most_s(self._ledger.expected_s(self._shares), measured=measured)
        if out_s > most_s:
            self.stuck = True
            self.fail(StageLost(f"no step of {self.view.pipeline_id} came back within {most_s:.1f} s"))

    def _send(self, plan: Plan) -> None:
        """Sends a plan to every worker, after the sequences that they must forget and open for it."""
        scheduler, metrics, recorder = self._ledger.scheduler, self._observers.metrics, self._observers.recorder
        # Here the plan has its pages, and no worker knows of it.
        point("gateway.after_plan")
        self._send_closed()
        for sequence in plan.opened:
            point("gateway.before_open")
            live = self._ledger.live[sequence]
            live.started()
            if scheduler.prefix.enabled and sequence.confirmed == sequence.taken_over:
                metrics.prefix_queries.inc(sequence.length)
                metrics.prefix_hits.inc(sequence.taken_over)
            self.session.broadcast(stage_pb2.RunRequest(open_sequence=open_message(sequence, live.request)))
        message = plan_message(plan, self.view.epoch, alone=self._shares <= 1)
        self._deadline.sent(plan.step, self._observers.clock())
        self.session.broadcast(stage_pb2.RunRequest(plan=message))
        self._ledger.note_sent(plan)
        recorder.sent(self.view, plan, message.planned_us)
        if scheduler.preemptions:
            metrics.preemptions.inc(scheduler.preemptions)
            scheduler.preemptions = 0

    def _send_closed(self) -> None:
        scheduler = self._ledger.scheduler
        closed, scheduler.closed = scheduler.closed, []
        for entry in closed:
            self.session.broadcast(stage_pb2.RunRequest(close_sequence=entry))

    # -- events of the session (SessionEvents) ------------------------------------------------------------------------

    def on_copied(self, copied: stage_pb2.PagesCopied) -> None:
        """Copied pages have arrived at a worker."""
        self.copied.add((copied.index, copied.number))
        self._progress.set()

    def on_lost(self, error: StagemeshError) -> None:
        """A stream ended. The news that ranks died may come after its consequences, such as a broken link."""
        self.fail(error)
        if self._task is not None and isinstance(error, RanksDied):
            culprits = self._ledger.ranks_died()
            if suspects := [s.ident for s in self._ledger.live if s.alone]:
                log.warning("%s epoch %d: sequences %s may make ranks die and run alone", *self.key, suspects)
            for sequence in culprits:
                if (live := self._ledger.live.get(sequence)) is not None:
                    name = live.request.request_id
                    live.fail(
                        PoisonedRequest(
                            f"a rank died each time request {name} was computed, the last time alone: {error.message}"
                        )
                    )

    def on_result(self, stage: int, result: stage_pb2.StepResult) -> None:
        """A stage is done with a step. The last stage's result has the tokens and ends the step."""
        ledger, scheduler, recorder = self._ledger, self._ledger.scheduler, self._observers.recorder
        if result.epoch != self.view.epoch or self.lost is not None:
            self._observers.metrics.stale_results.inc()
            return
        if result.step in self._probe:
            self._note_probe(stage, result.step)
            return
        # The other stages report from time to time, so the step may be over by now.
        timing = result.timing
        self._observers.metrics.bubbles.add(stage, timing)
        if not ledger.is_replay(result.step):
            ledger.costs.add(stage, timing.tokens, (timing.compute_us - timing.draft_us) * 1e-6)
        plan = scheduler.out.get(result.step)
        if plan is None:
            return
        recorder.result(self.view, stage, result)
        if stage != (plan.replay[1] if plan.replay is not None else len(self.view.stages) - 1):
            return
        point("gateway.before_promise")
        if plan.replay is None:
            ledger.decode_steps.add(timing.tokens, (timing.compute_us - timing.draft_us) * 1e-6, alone=plan.alone)
        self._promise(plan, result)
        self._take_guesses(plan, result)
        recorder.delivered(self.view, result.step)
        scheduler.step_done(result.step)
        self._deadline.done(result.step, self._observers.clock())
        self._note_done()

    def _note_probe(self, stage: int, step: int) -> None:
        if stage < len(self.view.stages) - 1:
            return
        self._deadline.done(step, self._observers.clock())
        if self._task is not None:
            self._note_crossed()  # Requests need not wait for the probe's second step.
        if step == self._probe[-1] and self._probe_page is not None:
            self._ledger.release([self._probe_page])
            self._note_crossed()

    def _note_crossed(self) -> None:
        if not self.crossed:
            self.crossed = True
            self._on_crossed(self)
        self._wake.set()
        self._progress.set()

    def _promise(self, plan: Plan, result: stage_pb2.StepResult) -> None:
        """Appends the step's tokens to the sequences' logs, and passes them to the requests."""
        ledger, scheduler = self._ledger, self._ledger.scheduler
        by_ident = {row.sequence.ident: row.sequence for row in plan.rows}
        failed = set(result.failed_sequences)
        for ident in failed:
            scheduler.failed(by_ident[ident])
        entries = zip(result.sequences, result.positions, result.tokens, _logprobs(result), strict=True)
        for at, (ident, position, token, logprob) in enumerate(entries, start=1):
            sequence = by_ident[ident]
            live = ledger.live.get(sequence)
            if live is None:
                continue  # It ended while this step was in flight, or by an earlier token of this step.
            # In a draft row that failed, only the last token is bad.
            if ident in failed and ident not in result.sequences[at : at + 1]:
                live.fail(
                    NumericalError(f"the logits of request {live.request.request_id} are not finite at {position}")
                )
            elif scheduler.append_token(sequence, position, token):
                wanted = logprob if live.request.sampling.logprobs else None
                if live.on_token(sequence.choice, token, wanted):
                    ledger.finish(sequence)
        if result.tokens and not self.crossed:
            self._note_crossed()

    def _take_guesses(self, plan: Plan, result: stage_pb2.StepResult) -> None:
        """Takes the draft model's guesses after the sampled tokens, and the time that they took."""
        asked = [row for row in plan.rows if row.guesses]
        if not asked:
            return
        at = 0
        for row, count in zip(asked, result.guess_counts, strict=True):
            if row.sequence.state is not State.FINISHED:
                self._ledger.scheduler.speculation.guesser.told(row.sequence, list(result.guesses[at : at + count]))
            at += count
        # Only rows that also got guesses a step ago have almost nothing to catch up with, so only they are measured.
        most = max(result.guess_counts)
        if most and all(row.draft for row in asked):
            self._ledger.guess_costs.add(most, result.timing.draft_us * 1e-6)

    def _note_done(self) -> None:
        """A step is over: updates budgets by measured costs, and lets the loop plan on."""
        ledger, scheduler = self._ledger, self._ledger.scheduler
        drafts, guessed, accepted = scheduler.speculation.take_counts()
        if drafts:
            metrics = self._observers.metrics
            metrics.drafts.inc(drafts)
            metrics.draft_tokens.inc(guessed)
            metrics.accepted_tokens.inc(accepted)
        scheduler.prefill_budget = ledger.costs.prefill_budget()
        if self._shares <= 1 and scheduler.speculation.guesser is NO_GUESSES:
            scheduler.decode_steps = ledger.decode_steps.best(
                len(scheduler.running), scheduler.steps_in_flight, len(self.view.stages), self.session.more_cores
            )
        if self.view.model.HasField("draft"):
            ledger.guess_costs.stages = ledger.costs.lines()
        self._wake.set()
        self._progress.set()


def _logprobs(result: stage_pb2.StepResult) -> Iterator[TokenLogprob | None]:
    """One entry per token. None if the step reported no log-probabilities."""
    at = 0
    for row, token in enumerate(result.tokens):
        if not result.logprobs:
            yield None
            continue
        count = result.top_counts[row]
        top = tuple(zip(result.top_ids[at : at + count], result.top_logprobs[at : at + count], strict=True))
        at += count
        yield TokenLogprob(token, result.logprobs[row], top)
