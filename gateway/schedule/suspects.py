"""Finds the sequence that makes ranks die: by the steps in flight at each death, and by running suspects alone. Pure.

A request can make a rank die each time that it is computed: by a shape that a kernel cannot take, or by a bug. Recovery
would compute it again with all others, and so end all streams. So a sequence that was in flight at two deaths in a row
runs alone. If ranks die once more, it is the cause. A step of it that comes back clears it.

Sequences that are only computed again to refill a stage rarely make ranks die. For them only the third death counts.
Then the sequence's pages are given up, so that they need no refill, and it is computed again from the start, alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from .plan import Plan
from .sequence import Sequence, State

DEATHS = 2
"""Number of deaths in a row after which a sequence runs alone."""
REPLAY_DEATHS = 3
"""Number of deaths in a row after which a sequence that is being refilled gives its pages up and runs alone."""


def note_deaths(out: Iterable[Plan]) -> tuple[list[Sequence], list[Sequence]]:
    """Ranks died with these plans in flight. Returns (sequences that caused it, sequences that must give up pages)."""
    plans = list(out)
    concerned = {row.sequence: plan for plan in plans for row in plan.rows}
    named = [s for s in concerned if s.state is not State.FINISHED]
    if len(named) == 1 and named[0].alone:
        return named, []
    given_up = []
    for sequence in named:
        again = sequence.died_at == sequence.steps_back
        sequence.deaths = sequence.deaths + 1 if again else 1
        sequence.died_at = sequence.steps_back
        in_replay = concerned[sequence].replay is not None
        if in_replay and sequence.deaths >= REPLAY_DEATHS:
            given_up.append(sequence)
        sequence.alone |= sequence.deaths >= (REPLAY_DEATHS if in_replay else DEATHS)
    return [], given_up


def note_back(plan: Plan) -> None:
    """Every stage has run a step, so none of its sequences made ranks die."""
    if plan.replay is None:
        for row in plan.rows:
            row.sequence.steps_back += 1
            row.sequence.deaths, row.sequence.alone = 0, False
