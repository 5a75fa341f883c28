"""Generations and link nonces: 32 bits, never 0, and no number twice in the life of a coordinator."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

STRIDE = 0x9E3779B1  # odd, so that the walk meets every 32-bit number once; far from 1, so that neighbours look unlike


def nonces(start: int | None = None) -> Iterator[int]:
    """A walk over all 32-bit numbers from a random start, so that a restarted coordinator soon repeats none."""
    at = secrets.randbits(32) if start is None else start
    while True:
        at = (at + STRIDE) & 0xFFFFFFFF
        if at:
            yield at
