"""Which gateway holds which of the equal ranges of a worker's pages. Pure.

A range stays its gateway's after the session ended, with what was written into its pages, until another gateway needs
one: so a gateway that comes back at a later epoch goes on where it was. One that moves to a later epoch has it open at
both for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stagemesh.errors import Unavailable


@dataclass(frozen=True)
class Grant:
    """A gateway's range."""

    index: int
    generation: int
    """The same as long as nobody else may have written into the range's pages."""


class PageRanges:
    """`count` ranges; `nonce` makes a generation that was never given before, and is not 0."""

    def __init__(self, count: int, nonce: Callable[[], int]) -> None:
        self.count = count
        self._nonce = nonce
        self._grants: dict[str, Grant] = {}
        """By holder, the one that came longest ago first."""
        self._open: set[tuple[str, int]] = set()
        """Holders and epochs."""

    def open(self, holder: str, epoch: int) -> Grant:
        """The holder's own range, else a free one, else that of one that has gone. Raises Unavailable (retry)."""
        if (holder, epoch) in self._open:
            raise Unavailable(f"{holder} holds a range of pages already", retry_after_s=0.2)
        grant = self._grants.pop(holder, None)
        if grant is None:
            taken = {other.index for other in self._grants.values()}
            free = next((i for i in range(self.count) if i not in taken), None)
            if free is None:
                here = {name for name, _ in self._open}
                gone = next((name for name in self._grants if name not in here), None)
                if gone is None:
                    raise Unavailable(
                        f"all {self.count} page ranges are held by gateways: start the coordinator with --gateways for "
                        "more",
                        retry_after_s=0.5,
                    )
                free = self._grants.pop(gone).index
            grant = Grant(free, self._nonce())
        self._grants[holder] = grant
        self._open.add((holder, epoch))
        return grant

    def close(self, holder: str, epoch: int) -> None:
        """The holder's session is over; it may come back."""
        self._open.discard((holder, epoch))
