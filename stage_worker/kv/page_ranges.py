"""Which gateway holds which of a worker's pages, on which pipeline. Pure.

A holder names its pages by ids of its own. They stay its own after the session ended, with what was written into them,
until another holder needs them: so a gateway that comes back at a later epoch goes on where it was. One that moves to a
later epoch has them open at both for a while; where it is to have fewer then, it says which it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from stagemesh.errors import InvalidRequest, Unavailable

_NONE = -1
"""Stands for no journal: none has this number."""


@dataclass(frozen=True)
class Grant:
    """Pages granted to a session."""

    pages: tuple[int, ...]
    """Page by the holder's id; -1 for ids without a page."""
    generation: int
    """Changes when another holder may have written into the pages."""
    fresh: tuple[int, ...]
    """Of the pages those that the holder has not written with this journal ever since: its entries are of others, or of
    what the pages held before."""

    @property
    def count(self) -> int:
        """Number of pages."""
        return sum(page >= 0 for page in self.pages)


@dataclass
class _Holder:
    generation: int
    pages: dict[int, int] = field(default_factory=dict)
    """Id -> page."""
    life: int = 0
    """Identity of its process."""
    open: dict[int, frozenset[int]] = field(default_factory=dict)
    """Epoch -> ids granted to the session at that epoch."""
    journal: int = _NONE
    """Number of the journal beside which it wrote last."""


class PageRanges:
    """`num_pages` pages; `nonce` makes a generation that was never given before, and is not 0."""

    def __init__(self, num_pages: int, nonce: Callable[[], int]) -> None:
        self.num_pages = num_pages
        self._nonce = nonce
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders: dict[str, _Holder] = {}
        """Name -> holder, in the order of their sessions' starts."""

    def open(
        self, name: str, epoch: int, count: int, ids: Iterable[int] = (), journal: int = 0, life: int = 0
    ) -> Grant:
        """The pages with these ids, at most `count`; without ids, with the lowest. They are the holder's own as far as
        it has them, else free ones, else those of holders that have gone. `journal`: the number of the one that is
        written beside them. `life`: of the holder's process; what another one of its name has written is not its own.

        Raises InvalidRequest for more than `count`, Unavailable (retry) where pages are still held by others.
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
        """Frees so many pages, if holders without a session have them; of the one gone longest first."""
        for name in [name for name, holder in self._holders.items() if not holder.open]:
            if len(self._free) >= count:
                return
            self._free.extend(reversed(self._holders.pop(name).pages.values()))
