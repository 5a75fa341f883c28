"""A layer range that a rank holds for a pipeline at one epoch: shard, KV pages, links and gateways' sessions."""

from __future__ import annotations

import time

import torch

from stagemesh.errors import InvalidRequest, StageLost, StagemeshError, Unavailable
from stagemesh.faults import point, poison
from stagemesh.protos.v1 import stage_pb2

from ..kv.copy import PageReceiver, PageSender
from ..links.link import LinkReceiver, LinkSender
from .memory.resources import StageResources, page_share
from .session import Session, SessionContext, Step


class Assignment:
    """The work of one rank for one stage of one pipeline, from Assign to Release."""

    def __init__(self, request: stage_pb2.AssignRequest, resources: StageResources, tp_rank: int) -> None:
        self.pipeline_id = request.key.pipeline_id
        self.epoch = request.key.epoch
        self.stage = request.stage
        self.is_first = request.stage == 0
        self.is_last = request.stage == request.num_stages - 1
        self.limits = request.limits
        self.resources = resources
        self.shard = resources.shard
        self.pool = resources.pool
        self.drafter = resources.drafter
        self.ranges = resources.ranges
        self.journal = resources.journal
        self.active = False
        self.sessions: dict[int, Session] = {}
        self.receivers: list[LinkReceiver] = []
        """The receiver of activations from the previous stage. Empty on the first stage, else one."""
        self.senders: list[LinkSender] = []
        self.token_receivers: list[LinkReceiver] = []
        """The receiver of sampled tokens from the last stage: one, on rank 0 of the first of several stages."""
        self.token_senders: list[LinkSender] = []
        """The sender of sampled tokens to the first stage: one, on rank 0 of the last of several stages."""
        self.page_senders: dict[tuple[int, int], PageSender] = {}
        """(epoch, index of the KvCopy) -> sender of pages to a worker of a later epoch."""
        self.page_receivers: dict[int, PageReceiver] = {}
        """Index of the KvCopy -> receiver of pages from a worker of the previous epoch."""
        self._tp_rank = tp_rank
        self._holders: dict[int, str] = {}
        """Session -> name of the holder of its range of pages."""
        self._told_broken = False

    # -- links ------------------------------------------------------------------------------------------------------

    @property
    def links_pending(self) -> bool:
        """Whether a handshake is under way."""
        return any(end.state == "connecting" for end in [*self._ends(), *self._copy_ends()])

    @property
    def awaits_pages(self) -> bool:
        """Whether announced pages have not arrived yet."""
        return any(session.copies for session in self.sessions.values())

    def note_completed(self) -> None:
        """Records when inputs arrived. The engine calls it between layers; `progress_links` does the same."""
        for link in (*self.receivers, *self.token_receivers):
            link.note_completed()

    def progress_links(self) -> None:
        """Drives the links, and drops links of copies that are over."""
        for end in self._ends():
            end.progress()
        for index, copy in list(self.page_receivers.items()):
            copy.link.progress()
            if copy.link.drained and not self._awaited(index):
                # The sender's epoch is over, and so is the copy.
                del self.page_receivers[index]
        for key, out in list(self.page_senders.items()):
            out.progress()
            if out.link.drained:
                del self.page_senders[key]

    def _ends(self) -> list[LinkSender | LinkReceiver]:
        return [*self.senders, *self.receivers, *self.token_senders, *self.token_receivers]

    def _copy_ends(self) -> list[LinkSender | LinkReceiver]:
        out: list[LinkSender | LinkReceiver] = [copy.link for copy in self.page_senders.values()]
        return out + [copy.link for copy in self.page_receivers.values()]

    def take_broken_link(self) -> StagemeshError | None:
        """Returns, once, the error of a link that broke while the assignment was active."""
        if self._told_broken or not self.active:
            return None
        error = self._error()
        self._told_broken = error is not None
        return error

    def _error(self) -> StagemeshError | None:
        """Returns the error of a failed link that steps need, or None."""
        copies = [copy.link for index, copy in self.page_receivers.items() if self._awaited(index)]
        return next((end.error for end in [*self._ends(), *copies] if end.error is not None), None)

    def _awaited(self, index: int) -> bool:
        """Whether pages of a KvCopy are announced and have not arrived."""
        return any(copy == index for session in self.sessions.values() for copy, _ in session.copies)

    @property
    def broken(self) -> bool:
        """Whether a link has failed, so that no step can run any more."""
        return self._error() is not None

    # -- sessions ---------------------------------------------------------------------------------------------------

    def open_session(self, ident: int, request: stage_pb2.RunOpen) -> stage_pb2.RunOpened:
        """Opens a gateway's session with its range of pages. Returns the answer for the gateway.

        Raises:
            Unavailable: the assignment is not active, or other gateways hold the pages. The caller may retry.
            TransportError: a lane cannot be opened.
        """
        if not self.active:
            raise Unavailable(f"{self.pipeline_id} epoch {self.epoch} is not active here yet", retry_after_s=0.2)
        holder = f"{self.pipeline_id}/{request.gateway_id}"
        number = self.journal.number if self.journal is not None else 0
        share = page_share(self.pool.num_pages, self.limits)
        grant = self.ranges.open(holder, self.epoch, share, _ids(request.pages), number, request.life)
        if self.journal is not None:
            self.journal.forget(grant.fresh)
        try:
            self._open_lanes(request.slot)
        except StagemeshError:
            self.ranges.close(holder, self.epoch)
            raise
        session = Session(
            ident,
            request.slot,
            SessionContext(
                epoch=self.epoch,
                stage=self.stage,
                is_last=self.is_last,
                samples=self.is_last and self._tp_rank == 0,
                guesses=self.drafter is not None,
                vocab_size=self.shard.vocab_size,
                page_size=self.limits.page_size,
                pages=grant.pages,
                max_tokens=self.limits.max_num_batched_tokens,
                device=torch.device(self.shard.device),
            ),
        )
        self._holders[ident] = holder
        self.sessions[ident] = session
        return stage_pb2.RunOpened(
            num_pages=grant.count,
            page_size=self.limits.page_size,
            steps_in_flight=self.limits.steps_in_flight,
            kv_generation=grant.generation ^ self.resources.salt,
            journal=self.journal.held(grant.pages) if self.journal is not None else b"",
            copy_pages=min((copy.frames.most_pages for copy in self.page_receivers.values()), default=0),
            cores=self.shard.cores[0],
            cores_alone=self.shard.cores[1],
        )

    def _open_lanes(self, slot: int) -> None:
        """Opens a lane for the session on every link, or on none. Raises TransportError."""
        opened: list[LinkSender | LinkReceiver] = []
        try:
            for end in [*self._ends(), *(copy.link for copy in self.page_receivers.values())]:
                end.open_lane(slot)
                opened.append(end)
        except StagemeshError:
            for end in opened:
                end.close_lane(slot)
            raise

    def close_session(self, ident: int) -> None:
        """Closes a session. Frees its lanes and pages. Its steps that have not run are dropped."""
        session = self.sessions.pop(ident, None)
        if session is None:
            return
        self.ranges.close(self._holders.pop(ident), self.epoch)
        for end in self._ends():
            end.close_lane(session.slot)
        for copy in self.page_receivers.values():
            copy.close_lane(session.slot)

    # -- pages that go to another worker ----------------------------------------------------------------------------

    def copy_pages(self, session: Session, request: stage_pb2.CopyPages) -> None:
        """Sends pages, or posts their receive, depending on which end of the copy this is.

        Raises:
            InvalidRequest: the pages were not granted, or there is no such copy.
            TransportError: the link is over.
        """
        pages = session.own_pages(request.pages)
        if request.epoch == self.epoch and request.index in self.page_receivers:
            self.page_receivers[request.index].expect(session.slot, request.number, pages)
            if self.journal is not None:
                # Journal entries of these pages are older than the content that comes.
                self.journal.forget(pages)
            session.copies.add((request.index, request.number))
        elif request.epoch > self.epoch:
            # Without the link nothing is sent. The receiving end notices that. This end goes on serving.
            if (sender := self.page_senders.get((request.epoch, request.index))) is not None:
                sender.send(request.slot, request.number, pages)
        else:
            raise InvalidRequest(f"there is no link for copy {request.index} of epoch {request.epoch} here")

    def take_pages(self) -> list[tuple[int, int, int]]:
        """Returns page frames that have arrived since the last call: (session, index of the KvCopy, number)."""
        took: list[tuple[int, int, int]] = []
        for session in self.sessions.values() if self.page_receivers else ():
            for index, copy in self.page_receivers.items():
                if (number := copy.take(session.slot)) is not None:
                    session.copies.discard((index, number))
                    took.append((session.ident, index, number))
        return took

    # -- steps ------------------------------------------------------------------------------------------------------

    def add_plan(self, session: Session, plan: stage_pb2.StepPlan) -> None:
        """Prepares a step and posts its receive."""
        point("rank.plan")
        if self.is_last:
            poison(plan.tokens)
        step = session.add_plan(plan)
        if step.computes:
            self.shard.prepare(step.batch)
        for link in self.receivers if step.receives else ():
            link.post(session.slot, step.number, (step.num_tokens, self.shard.hidden_size))
        for link in self.token_receivers if step.sampled_sequences else ():
            link.post(session.slot, step.number, (len(step.sampled_sequences),))
            session.awaited.append(step.number)

    def take_tokens(self) -> bool:
        """Gives tokens that arrived from the last stage to their sessions. Returns whether there were any."""
        took = False
        for link in self.token_receivers:
            for session in self.sessions.values():
                while session.awaited and (tokens := link.ready(session.slot, session.awaited[0])) is not None:
                    step = session.awaited.popleft()
                    session.note_tokens(step, tokens.tolist(), link.completed_at(session.slot, step))
                    link.release(session.slot, step)
                    took = True
        return took

    def can_run(self, session: Session, step: Step) -> bool:
        """Whether the step's inputs have arrived and every outgoing link has a credit for it."""
        if session.failed or self.broken or not session.knows_tokens(step):
            return False
        if step.behind and not step.behind.isdisjoint(session.copies):
            return False
        if step.receives and any(link.ready(session.slot, step.number) is None for link in self.receivers):
            return False
        if step.sampled and not all(sender.can_send(session.slot) for sender in self.token_senders):
            return False
        return not step.sends or all(sender.can_send(session.slot) for sender in self.senders)

    def output_of(self, session: Session, step: Step) -> torch.Tensor | None:
        """Returns the output of the step's rows: [T, H], or [R, V] on the last stage.

        In a replay, a stage that only sends reads its output from the journal. A stage that takes no part returns None.

        Raises:
            StageLost: the journal no longer holds the output.
        """
        if step.computes:
            for link in self.receivers if step.receives else ():
                step.batch.hidden = link.ready(session.slot, step.number)
            return self.shard.forward(step.batch)
        if not step.sends or not self.senders:
            return None
        point("rank.replay")
        sent = self.journal.read(step.batch) if self.journal is not None else None
        if sent is None:
            raise StageLost(f"stage {self.stage} no longer holds what step {step.number} is to send again")
        return sent.to(self.shard.device)

    def keep_output(self, step: Step, output: torch.Tensor) -> None:
        """Writes the output to the journal, even if this step does not send it."""
        if self.journal is not None and step.computes:
            self.journal.write(step.batch, output)

    def input_complete_at(self, session: Session, step: Step) -> float:
        """Time (`time.monotonic()`) when the input was complete: on the first stage, the plan and all its tokens."""
        if not step.receives or not self.receivers:
            return max(step.arrived_at, step.tokens_known_at)
        return self.receivers[0].completed_at(session.slot, step.number)

    def release_input(self, session: Session, step: Step) -> None:
        """Frees the receive buffer and returns the sender's credit."""
        for link in self.receivers if step.receives else ():
            link.release(session.slot, step.number)

    def send(self, session: Session, step: Step, output: torch.Tensor) -> None:
        """Sends the output [T, H] to every receiving rank that reads from this one."""
        if step.sends:
            for sender in self.senders:
                sender.send(session.slot, step.number, output)

    def send_tokens(self, session: Session, step: Step, tokens: list[int]) -> None:
        """Sends sampled tokens to the first stage, which may be waiting for them."""
        if self.is_first:
            session.note_tokens(step.number, tokens, time.monotonic())
        for sender in self.token_senders:
            sender.send(session.slot, step.number, torch.tensor(tokens, dtype=torch.int32))

    def take_wait_send_s(self, session: Session) -> float:
        """Returns the seconds that steps of the session waited for a credit since the last call."""
        return max((sender.take_wait_send_s(session.slot) for sender in self.senders), default=0.0)

    def close(self) -> None:
        """Ends all sessions and closes the links."""
        self.active = False
        for ident in list(self.sessions):
            self.close_session(ident)
        for end in [*self._ends(), *self._copy_ends()]:
            end.close()
        self.page_senders, self.page_receivers = {}, {}
        self.senders, self.receivers, self.token_senders, self.token_receivers = [], [], [], []


def _ids(bits: bytes) -> list[int]:
    """Returns the indices of the set bits, in ascending order."""
    return [8 * at + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1]
