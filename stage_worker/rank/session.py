"""The state of one gateway's session on one rank: its sequences, and the steps whose plans have come.

A plan is prepared when it arrives, before its activation arrives: index tensors are built and the receive is posted.
Steps of a session run in the order of their numbers. Among ready steps of several sessions, the oldest plan runs first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from stagemesh.errors import InternalError, InvalidRequest, StaleEpoch
from stagemesh.protos.v1 import stage_pb2

from ..model.batch import StepBatch
from ..sampling.drafter import Drafted
from ..sampling.guessing import StepRow, check_guesses, step_rows
from ..sampling.sampler import SequenceSampler

TOKENS_KEPT_STEPS = 256
"""Number of steps for which results are kept, for plans that refer to them. A gateway refers to a result only until it
has received it."""


@dataclass
class Sequence:
    """One open sequence: its pages, and its sampler (last stage, rank 0)."""

    pages: list[int] = field(default_factory=list)
    """Pages in this worker's pool, in the order of positions."""
    length: int = 0
    """Number of positions that plans have covered, including guessed tokens."""
    certain: int = 0
    """Number of positions that are certain to stay. After a draft row it is less than `length`, until the next row says
    where the sequence continues."""
    sampler: SequenceSampler | None = None
    drafted: Drafted | None = None
    """The draft model's state of it, if there is a draft model and a plan has named the sequence."""


@dataclass(frozen=True)
class SampledRow:
    """A row after which a token is drawn. After a draft row, one more token is drawn for each right guess."""

    sequence: int
    position: int
    """Position of the first new token."""
    sampler: SequenceSampler
    draft: tuple[int, ...] = ()
    """Guesses of the new tokens."""


@dataclass
class Step:
    """A step that is ready except for its input."""

    number: int
    epoch: int
    batch: StepBatch
    num_tokens: int
    arrived_at: float
    sampled: list[SampledRow] = field(default_factory=list)
    """Rows that sample. Filled only on the rank that draws tokens."""
    sampled_sequences: list[int] = field(default_factory=list)
    """Sequences for which this step draws a token that later plans may refer to. Filled only on the first stage. It has
    no draft rows: the number of their tokens is not known in advance."""
    references: list[tuple[int, int, int]] = field(default_factory=list)
    """(index in the step's tokens, earlier step, sequence): tokens that are the earlier step's result. Filled only on
    the first stage."""
    referred_tokens: list[int] = field(default_factory=list)
    """The tokens for `references`, once they are known."""
    tokens_known_at: float = 0.0
    """Time when the last result that the step refers to had arrived."""
    drafter_rows: list[StepRow] = field(default_factory=list)
    """Its rows for the draft model, if there is one."""
    receives: bool = True
    """Whether an activation comes over the link."""
    computes: bool = True
    sends: bool = True
    """Whether its output, computed or from the journal, is sent to the next stage."""
    behind: frozenset[tuple[int, int]] = frozenset()
    """Page frames that must arrive before the step runs: (KvCopy, number)."""


@dataclass(frozen=True)
class SessionContext:
    """The properties of a stage that a session needs."""

    epoch: int
    stage: int
    is_last: bool
    samples: bool
    """Whether this rank draws tokens: rank 0 of the last stage."""
    vocab_size: int
    page_size: int
    pages: tuple[int, ...]
    """Pages granted to the session. A plan names them by their index here; -1 is no page."""
    max_tokens: int
    device: torch.device
    guesses: bool = False
    """Whether this rank has a draft model."""

    @property
    def is_first(self) -> bool:
        """Whether the stage embeds tokens."""
        return self.stage == 0


class Session:
    """Sequences and steps of one gateway at one epoch."""

    def __init__(self, ident: int, slot: int, context: SessionContext) -> None:
        self.ident = ident
        self.slot = slot
        self.context = context
        self.sequences: dict[int, Sequence] = {}
        self.steps: dict[int, Step] = {}
        self.next_step = 1
        """Number of the step that runs next. Steps are numbered from 1 without gaps."""
        self.last_planned = 0
        self.failed = False
        """Whether the session failed: no step runs any more, and the gateway has been told."""
        self.copies: set[tuple[int, int]] = set()
        """Page frames that are announced and have not arrived: (KvCopy, number)."""
        self.awaited: deque[int] = deque()
        """Steps whose tokens the last stage will send, in order. Filled only on the first stage."""
        self._tokens: dict[int, tuple[float, dict[int, int]]] = {}
        """Recent step -> (time of arrival, {sequence: token}). Filled only on the first stage."""
        self._sampled: dict[int, list[int]] = {}
        """Recent step -> sequences that it samples. Filled only on the first stage."""
        self._closing: list[tuple[int, int]] = []

    def open_sequence(self, message: stage_pb2.OpenSequence) -> None:
        """Opens a sequence. Later plans may name it. Raises InvalidRequest if it is already open."""
        if message.sequence in self.sequences:
            raise InvalidRequest(f"sequence {message.sequence} is open already")
        sampler = None
        if self.context.samples:
            sampler = SequenceSampler.open(message, self.context.vocab_size, self.context.device)
        self.sequences[message.sequence] = Sequence(sampler=sampler)

    def close_sequence(self, message: stage_pb2.CloseSequence) -> None:
        """Forgets a sequence once the last step that names it has run."""
        self._closing.append((message.after_step, message.sequence))
        self._close_due()

    def _close_due(self) -> None:
        due = [entry for entry in self._closing if entry[0] < self.next_step]
        for entry in due:
            self._closing.remove(entry)
            self.sequences.pop(entry[1], None)

    def add_plan(self, plan: stage_pb2.StepPlan) -> Step:
        """Prepares a step.

        Raises:
            StaleEpoch: the plan is of another epoch.
            InvalidRequest: the plan contradicts itself or the session.
        """
        if plan.epoch != self.context.epoch:
            raise StaleEpoch(f"plan of epoch {plan.epoch} in a session of epoch {self.context.epoch}")
        if plan.kind not in (stage_pb2.STEP_KIND_RUN, stage_pb2.STEP_KIND_REPLAY):
            raise InvalidRequest(f"step {plan.step} is of kind {plan.kind}, which this release does not know")
        if plan.step != self.last_planned + 1:
            raise InvalidRequest(f"plan of step {plan.step} after step {self.last_planned}")
        counts, starts = list(plan.counts), list(plan.starts)
        total = sum(counts)
        rows = len(plan.sequences)
        lengths = {len(counts), len(starts), len(plan.new_page_counts) or rows}
        if lengths != {rows} or sum(plan.new_page_counts) != len(plan.new_pages) or 0 in counts:
            raise InvalidRequest(f"the arrays of step {plan.step} do not fit its {rows} rows")
        if any(row >= rows for row in plan.sample_rows) or any(row >= rows for row in plan.ref_rows):
            raise InvalidRequest(f"step {plan.step} samples or refers to a row beyond its {rows}")
        if len(plan.ref_rows) != len(plan.ref_steps) or any(counts[row] != 1 for row in plan.ref_rows):
            raise InvalidRequest(f"step {plan.step} has rows of other than one token that refer to a result")
        _check_drafts(plan, counts)
        check_guesses(plan)
        if plan.guess_rows and self.context.samples and not self.context.guesses:
            raise InvalidRequest(f"step {plan.step} asks for guesses, and there is no draft model here")
        if plan.tokens and max(plan.tokens) >= self.context.vocab_size:
            raise InvalidRequest(f"step {plan.step} names a token beyond the {self.context.vocab_size} there are")
        if not 0 < total <= self.context.max_tokens or len(plan.tokens) != total:
            raise InvalidRequest(
                f"step {plan.step} has {total} positions and {len(plan.tokens)} tokens; at most "
                f"{self.context.max_tokens} are allowed"
            )
        ends, drafts = list(accumulate(counts)), set(plan.draft_rows)
        tables = self._grow(plan, starts, counts, drafts)
        step = Step(
            number=plan.step,
            epoch=plan.epoch,
            batch=StepBatch(
                starts=starts,
                counts=counts,
                tables=tables,
                page_size=self.context.page_size,
                token_ids=self._tensor(plan.tokens) if self.context.is_first else None,
                alone=plan.alone,
            ),
            num_tokens=total,
            arrived_at=time.monotonic(),
            receives=not self.context.is_first,
            sends=not self.context.is_last,
            behind=frozenset(self.copies),
        )
        if plan.kind == stage_pb2.STEP_KIND_REPLAY:
            self._take_part(plan, step)
        if self.context.is_first:
            self._refer(plan, ends, drafts, step)
        if self.context.is_last:
            self._sample(plan, ends, drafts, step)
        if self.context.guesses and step.computes:
            step.drafter_rows = step_rows(plan, tables, self._drafted)
        self.last_planned = plan.step
        self.steps[plan.step] = step
        return step

    def _take_part(self, plan: stage_pb2.StepPlan, step: Step) -> None:
        """Sets whether this stage receives, computes and sends in a replay."""
        first, last, own = plan.replay_first, plan.replay_last, self.context.stage
        if first > last or plan.sample_rows or plan.ref_rows:
            raise InvalidRequest(f"step {plan.step} replays stages {first} to {last}, or samples: a replay cannot")
        step.computes = first <= own <= last
        step.receives = step.computes and own > 0
        step.sends = first - 1 <= own < last

    # -- tokens that are not known yet -------------------------------------------------------------------------------

    def _refer(self, plan: stage_pb2.StepPlan, ends: list[int], drafts: set[int], step: Step) -> None:
        """Records which tokens of the step are results of earlier steps, and which sequences the step samples."""
        for row, earlier in zip(plan.ref_rows, plan.ref_steps, strict=True):
            ident = plan.sequences[row]
            if ident not in self._sampled.get(earlier, ()):
                raise InvalidRequest(
                    f"step {plan.step} refers to sequence {ident} in step {earlier}, which has no result"
                )
            step.references.append((ends[row] - 1, earlier, ident))
        step.sampled_sequences = [plan.sequences[row] for row in plan.sample_rows if row not in drafts]
        if step.sampled_sequences:
            self._sampled[plan.step] = step.sampled_sequences

    def note_tokens(self, step: int, tokens: list[int], here_at: float) -> None:
        """Records the tokens that the last stage sampled in a step, in the order of its sampled rows without drafts."""
        self._tokens[step] = here_at, dict(zip(self._sampled[step], tokens, strict=True))

    def knows_tokens(self, step: Step) -> bool:
        """Puts results of earlier steps into the step's tokens. Returns False while one is not known."""
        while step.references:
            place, earlier, ident = step.references[-1]
            found = self._tokens.get(earlier)
            if found is None:
                return False
            here_at, tokens = found
            step.tokens_known_at = max(step.tokens_known_at, here_at)
            step.references.pop()
            self._put_token(step, place, tokens[ident])
        return True

    def give_tokens(self, step: Step, tokens: Iterable[int]) -> None:
        """Takes the tokens that rank 0 found for the step's references. Ranks above 0 call it until the step runs."""
        if not step.references:
            return
        for token in tokens:
            place, _, _ = step.references.pop()
            self._put_token(step, place, token)

    @staticmethod
    def _put_token(step: Step, place: int, token: int) -> None:
        assert step.batch.token_ids is not None
        step.batch.token_ids[place] = token
        step.referred_tokens.append(token)

    def finish(self, step: Step) -> None:
        """Drops a step that has run, and data that is no longer needed."""
        del self.steps[step.number]
        self.next_step = step.number + 1
        self._tokens.pop(step.number - TOKENS_KEPT_STEPS, None)
        self._sampled.pop(step.number - TOKENS_KEPT_STEPS, None)
        if self._closing:
            self._close_due()

    def _grow(
        self, plan: stage_pb2.StepPlan, starts: list[int], counts: list[int], drafts: set[int]
    ) -> list[list[int]]:
        """Gives each row's sequence its new pages. Returns the block table of each row."""
        tables: list[list[int]] = []
        at = 0
        replays = plan.kind == stage_pb2.STEP_KIND_REPLAY
        for i, ident in enumerate(plan.sequences):
            sequence = self.sequences.get(ident)
            if sequence is None:
                raise InvalidRequest(f"step {plan.step} names sequence {ident}, which is not open")
            if not sequence.length or replays:
                # The row follows a prefix in pages of another sequence, or one that was computed at an earlier epoch.
                sequence.length = sequence.certain = starts[i]
            if not sequence.certain <= starts[i] <= sequence.length:
                raise InvalidRequest(
                    f"step {plan.step} starts sequence {ident} at {starts[i]}, but it holds {sequence.length} "
                    f"positions, {sequence.certain} of them for certain"
                )
            new = plan.new_pages[at : at + plan.new_page_counts[i]] if plan.new_page_counts else []
            at += len(new)
            sequence.pages.extend(self.own_pages(new))
            # This row overwrites wrong guesses.
            sequence.length = starts[i] + counts[i]
            sequence.certain = starts[i] + 1 if i in drafts else sequence.length
            if len(sequence.pages) * self.context.page_size < sequence.length:
                raise InvalidRequest(f"sequence {ident} has too few pages for {sequence.length} positions")
            tables.append(sequence.pages)
            if replays:
                # Later positions may be in pages that another sequence fills. The next row says where to continue.
                sequence.length = sequence.certain = 0
        return tables

    def own_pages(self, ids: Iterable[int]) -> list[int]:
        """Returns the worker's pages for a gateway's ids. Raises InvalidRequest for one that was not granted."""
        granted = self.context.pages
        found = [granted[ident] if ident < len(granted) else -1 for ident in ids]
        if -1 in found:
            raise InvalidRequest(f"page {list(ids)[found.index(-1)]} is named, which was not granted")
        return found

    def _drafted(self, ident: int, start: int) -> Drafted:
        sequence = self.sequences[ident]
        # The sequence that computed the prefix also filled the draft model's pages of it.
        sequence.drafted = sequence.drafted or Drafted(done=start)
        return sequence.drafted

    def _tensor(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64).to(self.context.device)

    def _sample(self, plan: stage_pb2.StepPlan, ends: list[int], drafts: set[int], step: Step) -> None:
        """Records which lines of logits the step needs, and, on the sampling rank, how they are sampled."""
        lines: list[int] = []
        for row in plan.sample_rows:
            end = ends[row]
            # A draft row has one line after its first token, and one after each of its guesses.
            first = end - (step.batch.counts[row] if row in drafts else 1)
            lines.extend(range(first, end))
            if not self.context.samples:
                continue
            ident = plan.sequences[row]
            sampler = self.sequences[ident].sampler
            if sampler is None:
                raise InternalError(f"sequence {ident} has no sampler on the sampling rank")
            position = step.batch.starts[row] + step.batch.counts[row] - (end - first - 1)
            step.sampled.append(SampledRow(ident, position, sampler, tuple(plan.tokens[first + 1 : end])))
        step.batch.logit_rows = self._tensor(lines)


def _check_drafts(plan: stage_pb2.StepPlan, counts: list[int]) -> None:
    """Raises InvalidRequest for a draft row that guesses nothing, is not sampled, or whose tokens are not known."""
    sampled, referring = set(plan.sample_rows), set(plan.ref_rows)
    for row in plan.draft_rows:
        if row not in sampled or row in referring or counts[row] < 2:
            raise InvalidRequest(
                f"row {row} of step {plan.step} cannot be a draft: it needs guesses, and to be sampled"
            )
