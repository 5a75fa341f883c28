"""Which sequence ends ranks: found by what was out when ranks died, and by trying those alone. Pure.

A request can make a rank die each time that it is computed: by a shape that a kernel cannot take, or by a bug of ours.
Recovery would compute it again with all others, and so end everybody's stream. So a sequence that was out at two deaths
in a row is tried alone. If ranks die once more with it alone, it is what ends them. A step of it that comes back clears
it.

What is merely computed again while a stage is refilled rarely kills: deaths with that count only from the third on.
Then the sequence's pages are given up, so that nobody has to refill them, and it is computed anew, alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from .plan import Plan
from .sequence import Sequence, State

DEATHS = 2
"""Deaths in a row after which a sequence is tried alone,"""
REPLAY_DEATHS = 3
"""and after which it is not even refilled beside others."""


def note_deaths(out: Iterable[Plan]) -> tuple[list[Sequence], list[Sequence]]:
    """Ranks died with these plans out. Returns (those that ended them, those whose pages are to be given up)."""
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
    """Every stage has run a step: none of its sequences has ended ranks."""
    if plan.replay is None:
        for row in plan.rows:
            row.sequence.steps_back += 1
            row.sequence.deaths, row.sequence.alone = 0, False
