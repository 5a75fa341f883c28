"""What the scheduler plans: steps, and the rows that they are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from .sequence import Sequence

Stages = tuple[int, int]
"""Stages first .. last, both included."""


@dataclass
class Row:
    """`count` tokens of a sequence from position `start`."""

    sequence: Sequence
    start: int
    count: int
    new_pages: list[int]
    samples: bool
    """Whether the row ends at the last token there is, so that the next one is drawn."""
    result_of: int = 0
    """The step whose result the row's token is; 0: it is known."""
    draft: list[int] = field(default_factory=list)
    """Guesses for all tokens of the row but the first."""
    guesses: int = 0
    """How many tokens the last stage shall guess behind what the row draws."""


@dataclass
class Plan:
    """One step: its rows, and the sequences that the workers must know of before it, or can forget."""

    step: int
    rows: list[Row]
    opened: list[Sequence] = field(default_factory=list)
    alone: bool = False
    """No other step computes while this one does."""
    replay: Stages | None = None
    """The rows were computed before, and these stages alone compute them again."""
