"""The engine of one rank: a loop that takes messages, drives the links, runs the next ready step, or sleeps.

One thread does everything: it reads the control socket, drives the transports (between layers, too) and computes. When
there is nothing to do, it spins briefly, because the next activation is usually microseconds away. Then it sleeps in
`poll` on the control socket and the transports' descriptors.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator

import torch

from stagemesh.errors import InternalError, StageLost, StagemeshError, TransportError
from stagemesh.faults import point
from stagemesh.protos.v1 import stage_pb2, types_pb2, worker_pb2
from stagemesh.transport.base import Transport

from ..messages.control import Kind, failure_of
from ..sampling.guessing import run_drafter
from ..sampling.sampler import sample
from ..timing import StageTiming
from .assignment import Assignment
from .control_socket import ControlSocket
from .heartbeat import Heartbeat
from .order import OrderReceiver, OrderSender
from .reports import Reports
from .session import Session, Step


class Engine:
    """Runs the steps of its assignments until the control socket closes."""

    def __init__(
        self,
        control: ControlSocket,
        transports: dict[str, Transport],
        orders_out: OrderSender | None,
        orders_in: OrderReceiver | None,
        heartbeat: Heartbeat,
        timing: StageTiming,
    ) -> None:
        self.control = control
        self.heartbeat = heartbeat
        self.timing = timing
        self.transports = transports
        self.assignments: dict[tuple[str, int], Assignment] = {}
        """Assignments by (pipeline, epoch)."""
        self.stopping = False
        self.handle: Callable[[Kind, int, bytes], None] = lambda kind, ident, payload: None
        """Handles a control frame. `RankCommands` sets it."""
        self.background: Callable[[], bool] = lambda: False
        """Polls work of other threads, and returns whether there was news. `RankCommands` sets it."""
        self._orders_out = orders_out
        self._orders_in = orders_in
        self._waiting_calls: dict[int, tuple[Kind, int, bytes]] = {}
        self._poll = select.poll()
        self._poll.register(control.fileno(), select.POLLIN)
        self._polled: set[int] = set()
        self._free_at = time.monotonic()
        self._reports = Reports(control, timing.results_s)
        self._late_told = 0

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs until `stopping` is set or the agent is gone."""
        spin_until = 0.0
        while not self.stopping and not self.control.closed:
            worked = self.take_messages()
            worked |= self.progress()
            worked |= self.run_next_step()
            worked |= self.background()
            now = time.monotonic()
            self._reports.send_due(now)
            self._tell_late_frames()
            self.heartbeat.alive()
            if worked:
                spin_until = now + self.timing.spin_s
            elif now > spin_until:
                self.sleep()

    def take_messages(self) -> bool:
        """Handles the control frames that have come. Returns whether there were any."""
        frames = self.control.receive()
        for kind, ident, payload in frames:
            if kind.is_call and self._orders_in is not None:
                self._waiting_calls[ident] = kind, ident, payload
                continue
            if kind.is_call and self._orders_out is not None:
                self._orders_out.take_call(ident)
            self.handle(kind, ident, payload)
        return bool(frames)

    def progress(self) -> bool:
        """Drives transports and links. Reports links that broke. Returns whether anything happened."""
        worked = False
        for transport in self.transports.values():
            worked |= transport.progress()
        for assignment in self.assignments.values():
            assignment.progress_links()
            worked |= assignment.take_tokens()
            for ident, index, number in assignment.take_pages():
                # The agent tells the gateway when all ranks have the pages.
                self.control.send(Kind.PAGES_COPIED, ident, stage_pb2.PagesCopied(index=index, number=number))
                worked = True
            broken = assignment.take_broken_link()
            if broken is not None:
                # The agent ends the sessions on all ranks.
                pipeline_id, epoch = assignment.pipeline_id, assignment.epoch
                told = worker_pb2.LinkBroken(pipeline_id=pipeline_id, epoch=epoch, reason=broken.message)
                self.control.send(Kind.LINK_BROKEN, 0, told)
        return worked

    def _tell_late_frames(self) -> None:
        """Tells the agent how many frames came over closed links and were dropped."""
        late = sum(transport.late_count for transport in self.transports.values())
        if late > self._late_told:
            self.control.send(Kind.LATE_FRAMES, 0, worker_pb2.LateFrames(count=late - self._late_told))
            self._late_told = late

    def drive_transports(self) -> None:
        """Drives the transports between two layers, so that a long step does not stall a neighbour's transfer."""
        for transport in self.transports.values():
            transport.progress()
        for assignment in self.assignments.values():
            assignment.note_completed()
        self.heartbeat.alive()

    def sleep(self) -> None:
        """Waits for a message, an event of a transport, or a time-out."""
        due_s = self._reports.due_in_s(time.monotonic())
        timeout_s = self.timing.idle_s if due_s is None else due_s
        if any(a.links_pending for a in self.assignments.values()):
            timeout_s = min(timeout_s, self.timing.links_look_s)
        if any(a.awaits_pages for a in self.assignments.values()):
            timeout_s = min(timeout_s, self.timing.pages_look_s)
        if self._orders_out is None and self._orders_in is not None:
            self._watch(self._orders_in.fileno())
        for transport in self.transports.values():
            for fd, events in transport.fds():
                self._watch(fd, events)
            if not transport.arm():
                return
        for fd, events in self._poll.poll(timeout_s * 1000):
            if events & (select.POLLHUP | select.POLLERR | select.POLLNVAL) and fd in self._polled:
                # Polling a descriptor in an error state would return at once every time.
                self._poll.unregister(fd)
                self._polled.discard(fd)

    def _watch(self, fd: int, events: int = select.POLLIN) -> None:
        self._poll.register(fd, events)
        self._polled.add(fd)

    # -- steps ------------------------------------------------------------------------------------------------------

    def run_next_step(self) -> bool:
        """Runs the ready step whose plan arrived first. Returns False if no step is ready."""
        if self._orders_in is not None:
            return self._carry_out_order(self._orders_in)
        ready = min(self._ready_steps(), key=lambda entry: entry[2].arrived_at, default=None)
        if ready is None:
            return False
        assignment, session, step = ready
        if self._orders_out is not None:
            self._orders_out.run_step(session.ident, step.number, step.referred_tokens)
        self.run_step(assignment, session, step)
        return True

    def _ready_steps(self) -> Iterator[tuple[Assignment, Session, Step]]:
        for assignment in self.assignments.values():
            for session in assignment.sessions.values():
                step = session.steps.get(session.next_step)
                if step is not None and assignment.can_run(session, step):
                    yield assignment, session, step

    def _carry_out_order(self, orders_in: OrderReceiver) -> bool:
        """Carries out the next order of rank 0, once its inputs have arrived. Only for ranks above 0."""
        current = orders_in.current()
        if current is None:
            return False
        kind, ident, order = current
        if kind is Kind.ORDER_CALL:
            waiting = self._waiting_calls.pop(ident, None)
            if waiting is not None:
                orders_in.done()
                self.handle(*waiting)
                return True
        else:
            found = self._find(ident, order.step)
            if found is not None and (found[0].broken or found[1].failed):
                # Rank 0 already runs the step and waits for this rank. Only the end of the group frees it.
                raise InternalError(f"step {order.step} was ordered, and its link or session has failed on this rank")
            if found is not None:
                found[1].give_tokens(found[2], order.tokens)
            if found is not None and found[0].can_run(found[1], found[2]):
                orders_in.done()
                self.run_step(*found)
                return True
        orders_in.check_deadline()
        return False

    def _find(self, ident: int, number: int) -> tuple[Assignment, Session, Step] | None:
        for assignment in self.assignments.values():
            session = assignment.sessions.get(ident)
            if session is not None and number in session.steps and session.next_step == number:
                return assignment, session, session.steps[number]
        return None

    def run_step(self, assignment: Assignment, session: Session, step: Step) -> None:
        """Runs one step, with heartbeats around it."""
        self.heartbeat.begin_step(step.num_tokens)
        self._run_step(assignment, session, step)
        self.heartbeat.end_step()

    @torch.inference_mode()
    def _run_step(self, assignment: Assignment, session: Session, step: Step) -> None:
        """Computes, sends the output, returns the input's credit, then reports. Others wait for output and credit."""
        began, cpu_before = time.monotonic(), time.process_time()
        complete_at = assignment.input_complete_at(session, step)
        point("rank.before_compute")
        try:
            output = assignment.output_of(session, step)
        except StageLost as e:
            self.end_session(session, e)
            return
        result = stage_pb2.StepResult(step=step.number, epoch=step.epoch)
        certain = draw(step, output, result) if step.sampled and output is not None else []
        output_at = time.monotonic()
        point("rank.before_send")
        try:
            if output is not None and not assignment.is_last:
                assignment.send(session, step, output)
            elif certain:
                assignment.send_tokens(session, step, certain)
        except TransportError as e:
            if self._orders_out is not None or self._orders_in is not None:
                raise  # The other ranks run the same step and would wait, so the group ends together.
            self.end_session(session, StageLost(e.message))
            return
        point("rank.after_send")
        assignment.release_input(session, step)
        point("rank.after_release")
        guessed_s = (
            run_drafter(assignment.drafter, step.drafter_rows, result) if assignment.drafter is not None else 0.0
        )
        ended = time.monotonic()
        point("rank.before_report")
        if self._orders_in is None:
            waited_s = max(0.0, began - max(step.arrived_at, self._free_at))
            wait_send_s = assignment.take_wait_send_s(session)
            timing = types_pb2.StepTiming(
                wait_input_us=int(max(0.0, waited_s - wait_send_s) * 1e6),
                compute_us=int((ended - began) * 1e6),
                wait_send_us=int(wait_send_s * 1e6),
                tokens=step.num_tokens,
                plan_arrived_us=int(step.arrived_at * 1e6),
                began_us=int(began * 1e6),
                ended_us=int(ended * 1e6),
                input_complete_us=int(complete_at * 1e6),
                output_us=int(output_at * 1e6),
                draft_us=int(guessed_s * 1e6),
                compute_cpu_us=int((time.process_time() - cpu_before) * 1e6),
                result_sent_us=time.monotonic_ns() // 1000,
            )
            result.timing.CopyFrom(timing)
            self._reports.add(session.ident, result, at_once=assignment.is_last)
        if output is not None and not assignment.is_last:
            point("rank.before_journal")
            assignment.keep_output(step, output)
        session.finish(step)
        self._free_at = time.monotonic()

    # -- what goes wrong --------------------------------------------------------------------------------------------

    def end_session(self, session: Session, error: StagemeshError) -> None:
        """Fails a session. The gateway is told the reason, and the agent closes the session on every rank."""
        if session.failed:
            return
        session.failed = True
        self.control.send(Kind.SESSION_ENDED, session.ident, failure_of(error))


def draw(step: Step, logits: torch.Tensor, result: stage_pb2.StepResult) -> list[int]:
    """Samples the step's tokens into `result`. Returns those of rows without a draft: later plans may refer to them."""
    rows = step.sampled
    drawn = sample(logits, [r.sampler for r in rows], [r.position for r in rows], [r.draft for r in rows])
    certain, at = [], 0
    for row, count in zip(rows, drawn.counts, strict=True):
        result.sequences.extend([row.sequence] * count)
        result.positions.extend(range(row.position, row.position + count))
        if not row.draft:
            certain.append(drawn.tokens[at])
        at += count
    result.tokens.extend(drawn.tokens)
    result.logprobs.extend(drawn.logprobs)
    result.top_counts.extend(drawn.top_counts)
    result.top_ids.extend(drawn.top_ids)
    result.top_logprobs.extend(drawn.top_logprobs)
    result.failed_sequences.extend(r.sequence for r, bad in zip(rows, drawn.failed, strict=True) if bad)
    return certain
