"""Which gateway holds which of a worker's pages, on which pipeline. Pure.

Pages stay their holder's after the session ended, with what was written into them, until another one needs them: so a
gateway that comes back at a later epoch goes on where it was. One that moves to a later epoch has them open at both for
a while. They need not lie together, so they can be split anew: a holder that comes back for fewer keeps the first ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from stagemesh.errors import Unavailable


@dataclass(frozen=True)
class Grant:
    """What a session may use."""

    pages: tuple[int, ...]
    """The holder's page 0, 1, 2, ..."""
    generation: int
    """The same as long as nobody else may have written into the pages."""


@dataclass
class _Holder:
    generation: int
    pages: list[int] = field(default_factory=list)
    open: dict[int, int] = field(default_factory=dict)
    """Epoch -> pages of the session."""


class PageRanges:
    """`num_pages` pages; `nonce` makes a generation that was never given before, and is not 0."""

    def __init__(self, num_pages: int, nonce: Callable[[], int]) -> None:
        self.num_pages = num_pages
        self._nonce = nonce
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders: dict[str, _Holder] = {}
        """The one that came longest ago first."""

    def open(self, name: str, epoch: int, count: int) -> Grant:
        """`count` pages: the holder's own as far as it has any, then free ones, then those of holders that have gone.

        One that has some goes on with what there is; one that has none raises Unavailable (retry).
        """
        holder = self._holders.pop(name, None) or _Holder(self._nonce())
        try:
            if epoch in holder.open:
                raise Unavailable(f"{name} holds a range of pages already", retry_after_s=0.2)
            self._reclaim(count - len(holder.pages))
            if not holder.pages and len(self._free) < count:
                raise Unavailable(
                    f"all {self.num_pages} pages are held, {len(self._free)} are free and {count} wanted: start the "
                    "coordinator with --gateways for more",
                    retry_after_s=0.5,
                )
            while len(holder.pages) < count and self._free:
                holder.pages.append(self._free.pop())
            holder.open[epoch] = min(count, len(holder.pages))
            self._trim(holder)
        finally:
            if holder.pages:
                self._holders[name] = holder
        return Grant(tuple(holder.pages[: holder.open[epoch]]), holder.generation)

    def close(self, name: str, epoch: int) -> None:
        """The holder's session is over; it may come back."""
        holder = self._holders.get(name)
        if holder is not None and holder.open.pop(epoch, None) is not None and holder.open:
            self._trim(holder)

    def _trim(self, holder: _Holder) -> None:
        """Pages that none of its sessions has are free."""
        most = max(holder.open.values())
        while len(holder.pages) > most:
            self._free.append(holder.pages.pop())

    def _reclaim(self, count: int) -> None:
        """Makes so many pages free, if those of holders that have gone are enough; the one longest gone loses first."""
        for name in [name for name, holder in self._holders.items() if not holder.open]:
            if len(self._free) >= count:
                return
            self._free.extend(reversed(self._holders.pop(name).pages))
