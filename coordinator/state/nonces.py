"""Generations and link nonces: 32 bits, never 0, never one twice in the life of a coordinator."""

from __future__ import annotations

import secrets

STRIDE = 0x9E3779B1  # odd, so that the walk meets every 32-bit number once; far from 1, so that neighbours look unlike


class Nonces:
    """A walk over all 32-bit numbers from a random start (another life is unlikely to meet the same ones soon)."""

    def __init__(self, start: int | None = None) -> None:
        self._at = secrets.randbits(32) if start is None else start

    def next(self) -> int:
        """The next one."""
        self._at = (self._at + STRIDE) & 0xFFFFFFFF
        return self._at or self.next()
