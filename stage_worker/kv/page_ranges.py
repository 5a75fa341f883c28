"""Records which gateway holds which of a worker's pages. Pure.

A holder names its pages by its own ids. After its session has ended, it keeps the pages and their content until another
holder needs them. So a gateway that returns at a later epoch continues where it was. A gateway that moves to a later
epoch has sessions at both epochs for a while. If it gets fewer pages at the later one, it says which it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from stagemesh.errors import InvalidRequest, Unavailable

_NONE = -1
"""The value for "no journal": no journal has this number."""


@dataclass(frozen=True)
class Grant:
    """Pages granted to a session."""

    pages: tuple[int, ...]
    """Pages, indexed by the holder's ids; -1 for ids without a page."""
    generation: int
    """A number that changes when another holder may have written into the pages."""
    fresh: tuple[int, ...]
    """Pages that the holder did not have before with this journal. Their journal entries belong to other holders, or to
    earlier content of the pages."""

    @property
    def count(self) -> int:
        """Number of pages."""
        return sum(page >= 0 for page in self.pages)


@dataclass
class _Holder:
    generation: int
    pages: dict[int, int] = field(default_factory=dict)
    """The holder's id of a page -> page."""
    life: int = 0
    """Identity of the holder's process."""
    open: dict[int, frozenset[int]] = field(default_factory=dict)
    """Epoch -> ids granted to the session at that epoch."""
    journal: int = _NONE
    """Number of the journal that its last session used."""


class PageRanges:
    """The allocation of `num_pages` pages. `nonce` returns a generation that was never used before and is not 0."""

    def __init__(self, num_pages: int, nonce: Callable[[], int]) -> None:
        self.num_pages = num_pages
        self._nonce = nonce
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders: dict[str, _Holder] = {}
        """Name -> holder, in the order in which their last sessions started."""

    def open(
        self, name: str, epoch: int, count: int, ids: Iterable[int] = (), journal: int = 0, life: int = 0
    ) -> Grant:
        """Grants the pages with these ids, at most `count`. Without ids, grants the lowest `count` ids.

        The holder gets its own pages for the ids that it has, then free pages, then pages of holders without a session.

        Args:
            journal: number of the journal that the session writes.
            life: identity of the holder's process. Pages that another process of this name wrote count as lost.

        Raises:
            InvalidRequest: more than `count` ids.
            Unavailable: others still hold the pages; the caller may retry.
        """
        wanted = frozenset(ids) or frozenset(range(count))
        if len(wanted) > count:
            raise InvalidRequest(f"{name} asks for {len(wanted)} pages and may have {count}")
        holder = self._holders.pop(name, None) or _Holder(self._nonce())
        try:
            if life != holder.life:
                holder.life, holder.generation, holder.journal = life, self._nonce(), _NONE
            if epoch in holder.open:
                raise Unavailable(f"{name} holds a range of pages already", retry_after_s=0.2)
            if not holder.open:
                self._trim(holder, wanted)
            new = sorted(wanted - holder.pages.keys())
            self._reclaim(len(new))
            if len(self._free) < len(new):
                raise Unavailable(
                    f"of {self.num_pages} pages {len(self._free)} are free and {len(new)} wanted: others still have "
                    "them, or start the coordinator with --gateways for more",
                    retry_after_s=0.5,
                )
            for ident in new:
                holder.pages[ident] = self._free.pop()
            holder.open[epoch] = wanted
            fresh = wanted if journal != holder.journal else new
            holder.journal = journal
        finally:
            if holder.pages:
                self._holders[name] = holder
        table = [-1] * (max(wanted) + 1)
        for ident in wanted:
            table[ident] = holder.pages[ident]
        return Grant(tuple(table), holder.generation, tuple(holder.pages[ident] for ident in fresh))

    def close(self, name: str, epoch: int) -> None:
        """Ends the holder's session at an epoch. The holder may come back."""
        holder = self._holders.get(name)
        if holder is not None and holder.open.pop(epoch, None) is not None and holder.open:
            self._trim(holder, frozenset().union(*holder.open.values()))

    def _trim(self, holder: _Holder, kept: frozenset[int]) -> None:
        """Frees pages that none of the holder's sessions uses."""
        for ident in [ident for ident in holder.pages if ident not in kept]:
            self._free.append(holder.pages.pop(ident))

    def _reclaim(self, count: int) -> None:
        """Frees pages of holders without a session, the oldest holder first, until `count` pages are free."""
        for name in [name for name, holder in self._holders.items() if not holder.open]:
            if len(self._free) >= count:
                return
            self._free.extend(reversed(self._holders.pop(name).pages.values()))
