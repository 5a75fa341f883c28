"""The gateway's hot loop: plan, send, take results. One pipeline at one epoch; a new epoch gets a new loop.

The scheduler decides; this file turns its plans into messages, and results into tokens of requests. Both the scheduler
and the requests are the work's (work.py), which goes from one epoch's loop to the next.
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
from .live import LiveRequest
from .metrics import Metrics
from .plan import Plan, Row
from .recovery import StageKv
from .request import Sampling, TokenLogprob
from .run_stream import RunStream
from .scheduler import Scheduler
from .sequence import Sequence, State
from .trace import Recorder
from .work import Shape, Work

log = logging.getLogger(__name__)

STEP_TIMEOUT_S = 60.0
"""A step that is out longer means a link or a worker that hangs with its sockets open."""
STEP_SLACK_S, STEP_MARGIN = 1.0, 20.0
"""Once steps were measured: so long, and so many times what all that are out should take."""
RECOVERING_S = 20.0
"""Before a token has crossed, and while stages are being refilled."""
LOOK_S = 0.2
"""How often a loop that waits for steps looks for such a one."""


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
        self.crossed = False
        """A token has crossed every stage."""
        self._work = work
        self._metrics = metrics
        self._bubbles = bubbles
        self._recorder = recorder
        self._on_crossed = on_crossed
        self._on_lost = on_lost
        self._streams = [RunStream(stage, self._on_result, self._on_stream_lost) for stage in view.stages]
        self._sent_at: dict[int, float] = {}
        self._heard_at = 0.0
        """When a step came back last."""
        self.stuck = False
        """Lost because steps do not come back, which nobody but this side sees."""
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

    async def start(self, gateway_id: str, instance: int, slot: int) -> None:
        """Opens a session on every stage, and goes on with the work. Raises the first stage's error."""
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
        if self.lost is not None:
            raise self.lost
        shape = Shape(min(o.num_pages for o in opened), opened[0].page_size, min(o.steps_in_flight for o in opened))
        self._work.begin(shape, [StageKv(o.kv_generation, o.journal) for o in opened])
        self._preemptions_told = self.scheduler.preemptions
        self._task = asyncio.create_task(self._run())

    def wake(self) -> None:
        """There is something new in the work."""
        self._wake.set()

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
            while self.lost is None and (plan := self.scheduler.next_plan()) is not None:
                self._send(plan)
            self._send_closed()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if self._sent_at else None):
                    await self._wake.wait()

    def _send(self, plan: Plan) -> None:
        """One plan to every worker, behind the sequences it needs them to forget and to know."""
        self._send_closed()
        for sequence in plan.opened:
            live = self._work.live[sequence]
            live.started()
            if self.scheduler.prefix.enabled and sequence.confirmed == sequence.taken_over:
                self._metrics.prefix_looked_up(sequence.length, sequence.taken_over)
            self._broadcast(stage_pb2.RunRequest(open_sequence=open_message(sequence, live)))
        message = plan_message(plan, self.view.epoch, alone=self.view.limits.gateways <= 1)
        self._sent_at[plan.step] = time.monotonic()
        self._broadcast(stage_pb2.RunRequest(plan=message))
        self._work.note_sent(plan)
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
        if not self._work.is_replay(result.step):
            self._work.costs.add(stage, timing.tokens, (timing.compute_us - timing.draft_us) * 1e-6)
        if self._recorder.active:
            self._recorder.result(self.view, stage, result)
        if stage != self._work.last_stage(result.step):
            return
        self._heard_at = time.monotonic()
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
        oldest = min(self._sent_at.values(), default=None)
        if oldest is None:
            return
        out_s = time.monotonic() - max(oldest, self._heard_at)
        if out_s < STEP_SLACK_S:
            return
        expected_s = self._work.expected_s(max(1, self.view.limits.gateways))
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
        if self._task is not None:
            self._work.end()
        if isinstance(error, InternalError):
            self._work.fail(error)
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
        kind=stage_pb2.STEP_KIND_RUN if plan.replay is None else stage_pb2.STEP_KIND_REPLAY,
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
        replay_first=plan.replay[0] if plan.replay else 0,
        replay_last=plan.replay[1] if plan.replay else 0,
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
