"""The gateway's hot loop: plan, send, take results. One pipeline at one epoch; a new epoch gets a new loop.

The scheduler decides; this file turns its plans into messages, and results into tokens of requests. Both the scheduler
and the requests are the work's (work.py), which goes from one epoch's loop to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from stagemesh.errors import InternalError, NumericalError, StageLost, StagemeshError, Unavailable
from stagemesh.faults import point
from stagemesh.protos.v1 import stage_pb2, types_pb2

from ..api.request import TokenLogprob
from ..schedule.plan import Plan
from ..schedule.recovery import StageKv
from ..schedule.scheduler import Scheduler
from ..schedule.sequence import State
from ..telemetry.bubbles import Bubbles
from ..telemetry.metrics import Metrics
from ..telemetry.trace import Recorder
from .ledger import Shape, Work
from .messages import open_message, plan_message
from .probe import Probe
from .run_stream import RunStream
from .slot_lease import Seat

log = logging.getLogger(__name__)

STEP_TIMEOUT_S = 60.0
"""A step that is out longer means a link or a worker that hangs with its sockets open."""
STEP_SLACK_S, STEP_MARGIN = 1.0, 20.0
"""Once steps were measured: so long, and so many times what all that are out should take."""
RECOVERING_S = 20.0
"""Before a token has crossed, and while stages are being refilled."""
LOOK_S = 0.2
"""How often a loop that waits for steps looks for such a one."""
REACH_S = 2.5
"""How long an attempt to connect takes at most, and a little."""


class BatchLoop:
    """Drives one pipeline at one epoch, from its first plan until it is lost or closed."""

    def __init__(
        self,
        view: types_pb2.PipelineView,
        work: Work,
        metrics: Metrics,
        bubbles: Bubbles,
        recorder: Recorder,
        on_crossed: Callable[[BatchLoop], None],
        on_lost: Callable[[BatchLoop, StagemeshError], None],
    ) -> None:
        self.view = view
        self._shares = max(1, view.limits.gateways) * max(1, view.limits.pipelines)
        """How many may have steps on the same workers."""
        self.crossed = False
        """A token has crossed every stage."""
        self._work = work
        self._metrics = metrics
        self._bubbles = bubbles
        self._recorder = recorder
        self._on_crossed = on_crossed
        self._on_lost = on_lost
        self._streams = [
            RunStream(stage, self._on_result, self._on_copied, self._on_stream_lost) for stage in view.stages
        ]
        self._sent_at: dict[int, float] = {}
        self._heard_at = 0.0
        """When a step came back last."""
        self._looked_at = 0.0
        self.stuck = False
        """Lost because steps do not come back, which nobody but this side sees."""
        self._opened: list[stage_pb2.RunOpened] = []
        self._pages: tuple[int, ...] = ()
        self._paused = False
        self.copied: set[tuple[int, int]] = set()
        """Pages that have come from other workers: (copy, number)."""
        self.on_planned: Callable[[Plan], None] = lambda plan: None
        """Told of every step that goes out."""
        self.on_progress: Callable[[], None] = lambda: None
        """Told when something came back."""
        self._probe: Probe | None = None
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._preemptions_told = 0
        self.lost: StagemeshError | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Pipeline and epoch."""
        return self.view.pipeline_id, self.view.epoch

    @property
    def scheduler(self) -> Scheduler:
        """The work's."""
        return self._work.scheduler

    async def start(self, seat: Seat) -> None:
        """Opens a session on every stage, and goes on with the work. Raises the first stage's error."""
        pages = self._work.pages_for(self.share)
        if pages is not None:
            # Before anybody else can have the others: a stage may give them up, and another one refuse the session.
            self._work.keep_to(pages)
        await self.open(seat, pages)
        self._work.begin(self.shape, [StageKv(o.kv_generation, o.journal) for o in self._opened])
        self._go()

    @property
    def unreachable(self) -> list[str]:
        """Workers of which nobody answered when sessions were to be opened."""
        return [stream.stage.worker_id for stream in self._streams if stream.unreachable]

    @property
    def share(self) -> int:
        """KV pages that a gateway may have on every stage."""
        return min(stage.num_pages for stage in self.view.stages)

    async def open(self, seat: Seat, pages: Sequence[int] | None) -> None:
        """Opens a session on every stage, with these pages where some are named. Raises the first stage's error."""
        opening = [asyncio.create_task(stream.open(self.view, seat, pages)) for stream in self._streams]
        try:
            self._opened = await asyncio.gather(*opening)
        except Unavailable:
            if self.unreachable:
                # Is it that worker, or is it this gateway?
                await asyncio.wait(opening, timeout=REACH_S)
            raise
        if self.lost is not None:
            raise self.lost
        granted = min(opened.num_pages for opened in self._opened)
        self._pages = tuple(range(granted) if pages is None else pages)
        if granted < len(self._pages):
            raise Unavailable(f"{granted} KV pages are granted, and {len(self._pages)} were to be", retry_after_s=0.2)

    @property
    def shape(self) -> Shape:
        """What the stages' sessions have in common."""
        o = self._opened
        return Shape(self._pages, o[0].page_size, min(s.steps_in_flight for s in o))

    def copy_pages(self, stage: int) -> int:
        """How many pages may go to a stage at once."""
        return self._opened[stage].copy_pages

    def _go(self) -> None:
        self._preemptions_told = self.scheduler.preemptions
        self._task = asyncio.create_task(self._run())

    def wake(self) -> None:
        """There is something new in the work."""
        self._wake.set()

    # -- from one epoch to the next while requests run ----------------------------------------------------------------

    def tell(self, stage: int, message: stage_pb2.RunRequest) -> None:
        """A message to one stage."""
        self._streams[stage].send(message.SerializeToString())

    def pause(self) -> None:
        """Plans nothing more, until `resume`; what is out comes back."""
        self._paused = True

    def resume(self) -> None:
        """Plans again."""
        self._paused = False
        self._wake.set()

    def begin_probe(self, page: int) -> Probe:
        """Sends a token across all stages, before anything else; `page` is nobody's."""
        self._probe = Probe(page, len(self.view.stages) - 1)
        for message in self._probe.messages(self.view.epoch):
            self._broadcast(message)
        return self._probe

    def take_over(self, expecting: Iterable[int]) -> None:
        """Goes on with the work, whose pages all stages hold, or are `expecting`. Nothing of it is out."""
        first = 1 if self._probe is None else self._probe.STEPS + 1
        self._work.move(self.shape, [o.kv_generation for o in self._opened], first, expecting)
        self._probe = None
        self._go()

    def retire(self) -> None:
        """Another loop has taken the work over; this one is only to be closed."""
        self.lost = StageLost(f"{self.view.pipeline_id} has gone to another epoch")
        self._wake.set()

    def _on_copied(self, copied: stage_pb2.PagesCopied) -> None:
        self.copied.add((copied.index, copied.number))
        self.on_progress()

    # -- the loop ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._plan_and_send()
        except Exception as e:
            log.exception("the batch loop of %s failed", self.view.pipeline_id)
            self.fail(InternalError(f"{type(e).__name__}: {e}"))

    async def _plan_and_send(self) -> None:
        while self.lost is None:
            self._check_deadline()
            while self.lost is None and not self._paused and (plan := self.scheduler.next_plan()) is not None:
                self._send(plan)
            self._send_closed()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if self._sent_at else None):
                    await self._wake.wait()

    def _send(self, plan: Plan) -> None:
        """One plan to every worker, behind the sequences it needs them to forget and to know."""
        # Its pages are taken, and no worker has heard of it.
        point("gateway.after_plan")
        self._send_closed()
        for sequence in plan.opened:
            point("gateway.before_open")
            live = self._work.live[sequence]
            live.started()
            if self.scheduler.prefix.enabled and sequence.confirmed == sequence.taken_over:
                self._metrics.prefix_looked_up(sequence.length, sequence.taken_over)
            self._broadcast(stage_pb2.RunRequest(open_sequence=open_message(sequence, live)))
        message = plan_message(plan, self.view.epoch, alone=self._shares <= 1)
        self._sent_at[plan.step] = time.monotonic()
        self._broadcast(stage_pb2.RunRequest(plan=message))
        self._work.note_sent(plan)
        self.on_planned(plan)
        if self._recorder.active:
            self._recorder.sent(self.view, plan, message.planned_us)
        if self.scheduler.preemptions > self._preemptions_told:
            for _ in range(self.scheduler.preemptions - self._preemptions_told):
                self._metrics.preempted()
            self._preemptions_told = self.scheduler.preemptions

    def _send_closed(self) -> None:
        closed, self.scheduler.closed = self.scheduler.closed, []
        for entry in closed:
            message = stage_pb2.CloseSequence(sequence=entry.ident, after_step=entry.after_step)
            self._broadcast(stage_pb2.RunRequest(close_sequence=message))

    def _broadcast(self, message: stage_pb2.RunRequest) -> None:
        data = message.SerializeToString()
        for stream in self._streams:
            stream.send(data)

    def _on_result(self, stage: int, result: stage_pb2.StepResult) -> None:
        """A stage is done with a step; the last one's result brings tokens and ends the step."""
        if result.epoch != self.view.epoch or self.lost is not None:
            self._metrics.stale_result()
            return
        if self._probe is not None:
            if self._probe.result(stage, result):
                self.crossed = True
                self.on_progress()
            return
        if self._task is None:
            return  # Of the probe, from a stage that reports late.
        # Stages but the last report now and then: the step may be over by now.
        self._bubbles.add(stage, result.timing)
        timing = result.timing
        if not self._work.is_replay(result.step):
            self._work.costs.add(stage, timing.tokens, (timing.compute_us - timing.draft_us) * 1e-6)
        if result.step not in self.scheduler.out:
            return
        if self._recorder.active:
            self._recorder.result(self.view, stage, result)
        if stage != self._work.last_stage(result.step):
            return
        self._heard_at = time.monotonic()
        point("gateway.before_promise")
        plan = self.scheduler.out[result.step]
        by_ident = {row.sequence.ident: row.sequence for row in plan.rows}
        failed = set(result.failed_sequences)
        for ident in failed:
            self.scheduler.failed(by_ident[ident])
        logprobs = _logprobs(result)
        entries = zip(result.sequences, result.positions, result.tokens, strict=True)
        for at, (ident, position, token) in enumerate(entries, start=1):
            sequence = by_ident[ident]
            logprob = next(logprobs)
            live = self._work.live.get(sequence)
            if live is None:
                continue  # It ended while this step was out, or by an earlier token of it.
            # Of a draft row, the tokens before the last one are good.
            if ident in failed and ident not in result.sequences[at : at + 1]:
                live.fail(
                    NumericalError(f"the logits of request {live.request.request_id} are not finite at {position}")
                )
            elif self.scheduler.append_token(sequence, position, token):
                wanted = logprob if live.request.sampling.logprobs else None
                if live.on_token(sequence.choice, token, wanted):
                    self._work.finish(sequence)
        if result.tokens and not self.crossed:
            self.crossed = True
            self._on_crossed(self)
        self._take_guesses(plan, result)
        if self._recorder.active:
            self._recorder.delivered(self.view, result.step)
        self.scheduler.step_done(result.step)
        if self._work.recovered():
            log.info("%s epoch %d holds everything again", *self.key)
        if any(counts := self.scheduler.speculation.take_counts()):
            self._metrics.speculated(*counts)
        self.scheduler.prefill_budget = self._work.costs.prefill_budget()
        self._work.guess_costs.stages = self._work.costs.lines()
        del self._sent_at[result.step]
        self._wake.set()
        self.on_progress()

    def _take_guesses(self, plan: Plan, result: stage_pb2.StepResult) -> None:
        """What the draft model guessed behind the drawn tokens, and what it took."""
        asked = [row for row in plan.rows if row.guesses]
        if not asked:
            return
        at = 0
        for row, count in zip(asked, result.guess_counts, strict=True):
            if row.sequence.state is not State.FINISHED:
                self.scheduler.speculation.told(row.sequence, list(result.guesses[at : at + count]))
            at += count
        # Only those that guessed a step ago as well have next to nothing to catch up with.
        most = max(result.guess_counts)
        if most and all(row.draft for row in asked):
            self._work.guess_costs.add(most, result.timing.draft_us * 1e-6)

    # -- the end ----------------------------------------------------------------------------------------------------

    def _on_stream_lost(self, error: StagemeshError) -> None:
        self.fail(error)

    def _check_deadline(self) -> None:
        now = time.monotonic()
        late, self._looked_at = now - self._looked_at > 3 * LOOK_S, now
        if late:
            # This process was not run: what has come meanwhile may not have been taken yet.
            self._heard_at = now
        oldest = min(self._sent_at.values(), default=None)
        if oldest is None:
            return
        out_s = now - max(oldest, self._heard_at)
        if out_s < STEP_SLACK_S:
            return
        expected_s = self._work.expected_s(self._shares)
        if not self.crossed or self._work.recovering:
            # What steps took was measured on another worker, maybe, and a first one takes longer.
            most_s = RECOVERING_S
        elif expected_s is None:
            most_s = STEP_TIMEOUT_S
        else:
            most_s = min(STEP_TIMEOUT_S, STEP_SLACK_S + STEP_MARGIN * expected_s)
        if out_s > most_s:
            self.stuck = True
            self.fail(StageLost(f"no step of {self.view.pipeline_id} came back within {most_s:.1f} s"))

    def fail(self, error: StagemeshError) -> None:
        """The pipeline is lost at this epoch. Requests wait for the next one; a bug of ours ends them at once."""
        if self.lost is not None:
            return
        self.lost = error
        self._wake.set()
        self.on_progress()
        if self._task is not None:
            self._work.end()
        if isinstance(error, InternalError):
            self._work.fail(error)
        self._on_lost(self, error)

    async def stop(self) -> None:
        """Plans nothing any more: the work is another loop's."""
        if self.lost is None:
            self.fail(StageLost("the gateway is stopping"))
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def close(self) -> None:
        """Ends the sessions on all stages."""
        await self.stop()
        await asyncio.gather(*(stream.close() for stream in self._streams))


def _logprobs(result: stage_pb2.StepResult) -> Iterator[TokenLogprob | None]:
    """One entry a token, None where the step reported none."""
    at = 0
    for row, token in enumerate(result.tokens):
        if not result.logprobs:
            yield None
            continue
        count = result.top_counts[row]
        top = tuple(zip(result.top_ids[at : at + count], result.top_logprobs[at : at + count], strict=True))
        at += count
        yield TokenLogprob(token, result.logprobs[row], top)
