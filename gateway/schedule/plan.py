"""The scheduler's plans: steps and their rows."""

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
    """Whether the row ends at the sequence's last token, so that the next one is sampled."""
    result_of: int = 0
    """The step whose result is the row's token. 0: the token is known."""
    draft: list[int] = field(default_factory=list)
    """Guesses for all tokens of the row except the first."""
    guesses: int = 0
    """Most tokens that the last stage should guess after those that the row samples."""


@dataclass
class Plan:
    """One step: its rows, and the sequences that it opens."""

    step: int
    rows: list[Row]
    opened: list[Sequence] = field(default_factory=list)
    alone: bool = False
    """Whether no other step computes at the same time."""
    replay: Stages | None = None
    """Set if the rows were computed before: the stages that compute them again."""
