"""Runs the draft model over the rows of a step: it takes the new tokens, and makes the guesses that the plan wants."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from stagemesh.errors import InvalidRequest
from stagemesh.protos.v1 import stage_pb2

from .drafter import Drafted, Drafter, DraftRow

CATCH_UP = 64
"""The draft model computes drawn tokens without a request when at least this many have accumulated. The exact number
differs between sequences, up to twice this many, so that they do not all come at once."""
MOST_GUESSES = 32
"""Largest number of guesses after one row."""


@dataclass(frozen=True)
class StepRow:
    """A row of a step, for the draft model."""

    sequence: int
    drafted: Drafted
    table: Sequence[int]
    start: int
    tokens: Sequence[int]
    """Known tokens from `start` on. Empty if they are an earlier step's result, which was noted with that step."""
    is_prompt: bool
    wanted: int
    """Number of guesses after the tokens that the row draws."""


def check_guesses(plan: stage_pb2.StepPlan) -> None:
    """Raises InvalidRequest for too many guesses, or for guesses after a row that draws nothing."""
    if len(plan.guess_rows) != len(plan.guess_counts) or any(not 0 < n <= MOST_GUESSES for n in plan.guess_counts):
        raise InvalidRequest(f"step {plan.step} must ask for 1 to {MOST_GUESSES} guesses after a row")
    if not set(plan.guess_rows) <= set(plan.sample_rows):
        raise InvalidRequest(f"step {plan.step} asks for guesses after a row that draws nothing")


def step_rows(
    plan: stage_pb2.StepPlan, tables: Sequence[Sequence[int]], drafted: Callable[[int, int], Drafted]
) -> list[StepRow]:
    """Returns all rows of a plan. `drafted(sequence, start)` returns the draft state of a sequence."""
    wanted = dict(zip(plan.guess_rows, plan.guess_counts, strict=True))
    drafts, references = set(plan.draft_rows), set(plan.ref_rows)
    rows = []
    for i, (ident, start, count, end) in enumerate(
        zip(plan.sequences, plan.starts, plan.counts, accumulate(plan.counts), strict=True)
    ):
        certain = 0 if i in references else 1 if i in drafts else count
        rows.append(
            StepRow(
                sequence=ident,
                drafted=drafted(ident, start),
                table=tables[i],
                start=start,
                tokens=plan.tokens[end - count : end - count + certain],
                is_prompt=certain > 1,
                wanted=wanted.get(i, 0),
            )
        )
    return rows


def run_drafter(drafter: Drafter, rows: Sequence[StepRow], result: stage_pb2.StepResult) -> float:
    """Takes the step's new tokens, and adds the guesses that its plan wants to `result`.

    Returns the seconds that this took, or 0 for a step with prompts, which the draft model computes in any case.
    """
    began = time.monotonic()
    drawn: dict[int, tuple[int, list[int]]] = {}
    for ident, position, token in zip(result.sequences, result.positions, result.tokens, strict=True):
        drawn.setdefault(ident, (position, []))[1].append(token)
    failed = set(result.failed_sequences)
    work: list[DraftRow] = []
    asking: list[int] = []
    for row in rows:
        row.drafted.note(row.start, row.tokens)
        position, tokens = drawn.get(row.sequence, (0, []))
        if tokens and row.sequence not in failed:
            row.drafted.note(position, tokens)
        wanted = row.wanted if tokens and row.sequence not in failed else 0
        if row.wanted:
            asking.append(len(work))
        # Other sequences may reuse pages of this prefix, so the draft model's pages must be filled, too.
        if row.wanted or row.is_prompt or len(row.drafted.behind) >= CATCH_UP + row.sequence % CATCH_UP:
            work.append(DraftRow(row.drafted, tokens[-1] if tokens else 0, row.table, wanted))
    guesses = drafter.guess(work)
    for at in asking:
        result.guess_counts.append(len(guesses[at]))
        result.guesses.extend(guesses[at])
    return 0.0 if any(row.is_prompt for row in rows) else time.monotonic() - began
