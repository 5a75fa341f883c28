"""What the tests of prefix caching share: a scheduler on small pages, and a model whose tokens follow from the text."""

from __future__ import annotations

import zlib

from stagemesh.gateway.schedule.pages import PageAllocator
from stagemesh.gateway.schedule.plan import Plan
from stagemesh.gateway.schedule.scheduler import Scheduler

SIZE = 4
"""Tokens of a page, in all of these tests."""


def make(pages: int = 100, steps: int = 3, tokens: int = 64, seqs: int = 8, caching: bool = True) -> Scheduler:
    return Scheduler(
        PageAllocator(pages, SIZE),
        steps_in_flight=steps,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        prefix_caching=caching,
    )


def draw(prefix: list[int]) -> int:
    """The token behind a prefix: a function of all of it, as a greedy model's is."""
    return zlib.crc32(bytes(prefix)) % 3


def come_back(scheduler: Scheduler, plan: Plan) -> None:
    """Every stage has run the step: its tokens are drawn."""
    for row in plan.rows:
        sequence = row.sequence
        if (
            row.samples
            and scheduler.append_token(sequence, row.start + row.count, draw(sequence.tokens(0, sequence.length)))
            and len(sequence.log) >= sequence.max_tokens
        ):
            scheduler.finish(sequence)
    scheduler.step_done(plan.step)
