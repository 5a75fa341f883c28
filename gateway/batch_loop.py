"""The gateway's hot loop: plan, send, take results. One pipeline at one epoch; a new epoch gets a new loop.

The scheduler decides; this file turns its plans into messages, and results into tokens of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator

from stagemesh.errors import InternalError, NumericalError, StageLost, StagemeshError
from stagemesh.protocol import PROTOCOL
from stagemesh.protos.v1 import stage_pb2, types_pb2

from .bubbles import Bubbles
from .budget import StepCosts
from .draft_model import DraftModelGuesser, GuessCosts
from .live import LiveRequest
from .lookup import LookupGuesser, LookupLimits
from .metrics import Metrics
from .pages import PageAllocator
from .request import Sampling, TokenLogprob
from .run_stream import RunStream
from .scheduler import Plan, Row, Scheduler
from .sequence import Sequence, State
from .speculation import Guesser
from .trace import Recorder

log = logging.getLogger(__name__)

STEP_TIMEOUT_S = 60.0
"""A step that is out longer means a worker that hangs with its sockets open."""
RETRY_AFTER_S = 5.0
LOOK_S = 1.0
"""How often an idle loop looks for such a step."""


class BatchLoop:
    """Drives one pipeline at one epoch, from its first plan until it is lost or closed."""

    def __init__(
        self,
        view: types_pb2.PipelineView,
        metrics: Metrics,
        bubbles: Bubbles,
        recorder: Recorder,
        on_lost: Callable[[BatchLoop, StagemeshError], None],
    ) -> None:
        self.view = view
        self.scheduler: Scheduler
        self._metrics = metrics
        self._bubbles = bubbles
        self._costs = StepCosts()
        self._guess_costs = GuessCosts()
        self._recorder = recorder
        self._on_lost = on_lost
        self._streams = [RunStream(stage, self._on_result, self._on_stream_lost) for stage in view.stages]
        self._live: dict[Sequence, LiveRequest] = {}
        self._sent_at: dict[int, float] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._preemptions_told = 0
        self.lost: StagemeshError | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Pipeline and epoch."""
        return self.view.pipeline_id, self.view.epoch

    async def start(
        self, gateway_id: str, instance: int, slot: int, *, prefix_caching: bool, lookup: LookupLimits | None
    ) -> None:
        """Opens a session on every stage. Raises the first stage's error."""
        opened = await asyncio.gather(
            *(
                stream.open(
                    stage_pb2.RunOpen(
                        key=stage_pb2.PipelineKey(pipeline_id=self.view.pipeline_id, epoch=self.view.epoch),
                        stage=stream.stage.stage,
                        gateway_id=gateway_id,
                        instance=instance,
                        slot=slot,
                        protocol=PROTOCOL,
                    )
                )
                for stream in self._streams
            )
        )
        batches = min(o.steps_in_flight for o in opened)
        self.scheduler = Scheduler(
            PageAllocator(min(o.num_pages for o in opened), opened[0].page_size),
            steps_in_flight=batches,
            max_num_seqs=self.view.limits.max_num_seqs,
            max_num_batched_tokens=self.view.limits.max_num_batched_tokens,
            prefix_caching=prefix_caching,
            guesser=self._guesser(lookup, batches),
        )
        self._task = asyncio.create_task(self._run())

    def _guesser(self, lookup: LookupLimits | None, batches: int) -> Guesser | None:
        """The gateway's own settings come before the pipeline's draft model."""
        if lookup is not None:
            return LookupGuesser(lookup)
        if self.view.model.HasField("draft"):
            return DraftModelGuesser(self.view.model.draft.num_tokens, batches, self._guess_costs)
        return None

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(self, live: LiveRequest) -> None:
        """Queues all choices of a request; one that comes after the loss ends at once."""
        if self.lost is not None:
            live.fail(StageLost(self.lost.message, retry_after_s=RETRY_AFTER_S))
            return
        for choice in live.choices:
            self._live[choice.sequence] = live
            self.scheduler.add(choice.sequence)
        self._wake.set()

    def remove(self, live: LiveRequest) -> None:
        """The request ended: its sequences leave, their pages follow when no step names them."""
        for choice in live.choices:
            if self._live.pop(choice.sequence, None) is not None:
                self.scheduler.finish(choice.sequence)
        self._wake.set()

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self.scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self.scheduler.running)

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
            while (plan := self.scheduler.next_plan()) is not None:
                self._send(plan)
            self._send_closed()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()

    def _send(self, plan: Plan) -> None:
        """One plan to every worker, behind the sequences it needs them to forget and to know."""
        self._send_closed()
        for sequence in plan.opened:
            live = self._live[sequence]
            live.started()
            if self.scheduler.prefix.enabled:
                self._metrics.prefix_looked_up(sequence.length, sequence.taken_over)
            self._broadcast(stage_pb2.RunRequest(open_sequence=open_message(sequence, live)))
        message = plan_message(plan, self.view.epoch, alone=self.view.limits.gateways <= 1)
        self._sent_at[plan.step] = time.monotonic()
        self._broadcast(stage_pb2.RunRequest(plan=message))
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
            return
        self._bubbles.add(stage, result.timing)
        timing = result.timing
        self._costs.add(stage, timing.tokens, (timing.compute_us - timing.draft_us) * 1e-6)
        if self._recorder.active:
            self._recorder.result(self.view, stage, result)
        if stage != len(self._streams) - 1:
            return
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
            live = self._live.get(sequence)
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
                    self._live.pop(sequence, None)
                    self.scheduler.finish(sequence)
        self._take_guesses(plan, result)
        if self._recorder.active:
            self._recorder.delivered(self.view, result.step)
        self.scheduler.step_done(result.step)
        if any(counts := self.scheduler.speculation.take_counts()):
            self._metrics.speculated(*counts)
        self.scheduler.prefill_budget = self._costs.prefill_budget()
        self._guess_costs.stages = self._costs.lines()
        del self._sent_at[result.step]
        self._wake.set()

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
            self._guess_costs.add(most, result.timing.draft_us * 1e-6)

    # -- the end ----------------------------------------------------------------------------------------------------

    def _on_stream_lost(self, error: StagemeshError) -> None:
        self.fail(error)

    def _check_deadline(self) -> None:
        oldest = min(self._sent_at.values(), default=None)
        if oldest is not None and time.monotonic() - oldest > STEP_TIMEOUT_S:
            self.fail(StageLost(f"a step of {self.view.pipeline_id} is not back after {STEP_TIMEOUT_S:.0f} s"))

    def fail(self, error: StagemeshError) -> None:
        """The pipeline is lost at this epoch: every live request ends with a typed error, at once."""
        if self.lost is not None:
            return
        self.lost = error
        self._wake.set()
        ending = error if isinstance(error, InternalError) else StageLost(error.message, retry_after_s=RETRY_AFTER_S)
        for live in set(self._live.values()):
            live.fail(ending)
        self._on_lost(self, error)

    async def close(self) -> None:
        """Ends the sessions on all stages."""
        if self.lost is None:
            self.fail(StageLost("the gateway is stopping"))
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*(stream.close() for stream in self._streams))


def open_message(sequence: Sequence, live: LiveRequest) -> stage_pb2.OpenSequence:
    """What the workers are told of a sequence that starts, or comes back after a preemption."""
    sampling = live.request.sampling
    message = stage_pb2.OpenSequence(
        sequence=sequence.ident,
        sampling=sampling_message(sampling, live),
        choice=sequence.choice,
        prompt_len=len(sequence.prompt),
        log=sequence.log,
    )
    if sampling.repetition_penalty != 1.0:
        message.prompt.extend(sequence.prompt)
    return message


def sampling_message(sampling: Sampling, live: LiveRequest) -> types_pb2.SamplingParams:
    """Sampling parameters as the wire says them."""
    return types_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=max(0, sampling.top_k),
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=live.seed,
        logprobs=sampling.logprobs,
        top_logprobs=sampling.top_logprobs,
        min_tokens=live.request.min_tokens,
        suppressed_ids=sorted(live.request.stop_token_ids) if live.request.min_tokens else [],
        bias_ids=[ident for ident, _ in sampling.logit_bias],
        bias_values=[value for _, value in sampling.logit_bias],
    )


def plan_message(plan: Plan, epoch: int, *, alone: bool = True) -> stage_pb2.StepPlan:
    """A plan in packed arrays: one message a step, no message a row. `alone`: no other gateway plans steps."""
    rows = plan.rows
    return stage_pb2.StepPlan(
        step=plan.step,
        epoch=epoch,
        kind=stage_pb2.STEP_KIND_RUN,
        sequences=[row.sequence.ident for row in rows],
        starts=[row.start for row in rows],
        counts=[row.count for row in rows],
        tokens=list(itertools.chain.from_iterable(_tokens(row) for row in rows)),
        new_page_counts=[len(row.new_pages) for row in rows],
        new_pages=list(itertools.chain.from_iterable(row.new_pages for row in rows)),
        sample_rows=[i for i, row in enumerate(rows) if row.samples],
        ref_rows=[i for i, row in enumerate(rows) if row.result_of],
        ref_steps=[row.result_of for row in rows if row.result_of],
        planned_us=time.monotonic_ns() // 1000,
        draft_rows=[i for i, row in enumerate(rows) if row.draft],
        alone=plan.alone and alone,
        guess_rows=[i for i, row in enumerate(rows) if row.guesses],
        guess_counts=[row.guesses for row in rows if row.guesses],
    )


def _tokens(row: Row) -> list[int]:
    """The row's tokens; 0 stands for one that is still to be sampled."""
    if row.result_of:
        return [0]
    return row.sequence.tokens(row.start, row.count - len(row.draft)) + row.draft


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
