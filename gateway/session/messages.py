"""Builds the messages that tell workers of sequences and steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

from stagemesh.protos.v1 import stage_pb2

from ..api.request import GenerationRequest
from ..schedule.plan import Plan, Row
from ..schedule.sequence import Sequence


def open_message(sequence: Sequence, request: GenerationRequest) -> stage_pb2.OpenSequence:
    """The message that opens a sequence, when it starts or comes back after a preemption."""
    message = stage_pb2.OpenSequence(
        sequence=sequence.ident,
        sampling=request.sampling,
        choice=sequence.choice,
        prompt_len=len(sequence.prompt),
        log=sequence.log,
    )
    if request.sampling.repetition_penalty != 1.0:
        message.prompt.extend(sequence.prompt)
    return message


def page_bits(pages: Iterable[int]) -> bytes:
    """A bit set of page ids: one bit per page, the lowest first."""
    bits = bytearray()
    for page in pages:
        bits.extend(bytes(max(0, (page >> 3) + 1 - len(bits))))
        bits[page >> 3] |= 1 << (page & 7)
    return bytes(bits)


def plan_message(plan: Plan, epoch: int, *, alone: bool = True) -> stage_pb2.StepPlan:
    """The message of a plan, with its rows in packed arrays. `alone`: no other gateway or pipeline plans steps."""
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
    """The row's tokens. 0 stands for a token that is not sampled yet."""
    if row.result_of:
        return [0]
    return row.sequence.tokens(row.start, row.count - len(row.draft)) + row.draft
