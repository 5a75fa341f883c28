"""Which KV pages are whose: the gateway hands out ids, the same id for the same tokens on every worker of a pipeline.

A full page can be offered to others: it is then found by the page before it and its own tokens, so pages form a tree
whose paths are prefixes (SGLang's radix tree, Zheng et al. 2024, a page an edge). An offered page that nobody holds
stays, free but filled, until its memory is needed; the one let go longest ago goes first.

Pure: no I/O, no clock. A page is given back only when no step that names it is out; the scheduler sees to that.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROOT = 0
"""The node before the first page."""


@dataclass(frozen=True)
class Shape:
    """What the stages of an epoch lend to a gateway."""

    pages: tuple[int, ...]
    """Their ids."""
    page_size: int
    """Tokens of one page."""
    steps_in_flight: int


@dataclass(frozen=True, slots=True)
class _Offer:
    """A page in the tree. Tokens themselves are the key, so no two prefixes are ever taken for each other."""

    node: int
    """Never used twice: what hangs below a page that was withdrawn or evicted can not be found again."""
    key: tuple[int, bytes]
    """The node before, and the page's tokens."""


class PageAllocator:
    """Ids 0 .. num_pages-1 at first. Empty pages go first (a stack keeps the hot ones hot), then offered ones nobody
    holds."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.ids = frozenset(range(num_pages))
        """The pages there are."""
        self.page_size = page_size
        self.budget = num_pages
        """Of them may be held at once."""
        self._empty = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Offered pages that nobody holds, the one let go longest ago first."""
        self._holders = defaultdict[int, int](int)
        """How many sequences hold a page."""
        self._offers: dict[int, _Offer] = {}
        self._found: dict[tuple[int, bytes], int] = {}
        self._nodes = itertools.count(ROOT + 1)

    # -- holding ----------------------------------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        """Of all."""
        return len(self.ids)

    @property
    def num_held(self) -> int:
        """Pages that somebody holds."""
        return len(self.ids) - len(self._empty) - len(self._idle)

    @property
    def num_free(self) -> int:
        """Pages that can be had: nobody holds them, empty or offered."""
        return max(0, self.budget - self.num_held)

    @property
    def usage(self) -> float:
        """Share of the pages in use, 0 to 1."""
        return 1 - self.num_free / self.num_pages

    def num_free_beside(self, shared: Sequence[int]) -> int:
        """Pages that nobody holds, other than `shared`."""
        return self.num_free - sum(not self._holders[page] for page in shared)

    def holders(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._holders[page]

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` positions need."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int, shared: Sequence[int] = ()) -> list[int] | None:
        """`count` fresh pages, or None when there are not that many; `shared` are held with them, or not at all."""
        if count > self.num_free_beside(shared):
            return None
        for page in shared:
            if not self._holders[page]:
                del self._idle[page]
            self._holders[page] += 1
        while len(self._empty) < count:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self._empty.append(page)
        at = len(self._empty) - count
        taken = self._empty[at:][::-1]
        del self._empty[at:]
        for page in taken:
            self._holders[page] = 1
        return taken

    def free(self, pages: Sequence[int]) -> None:
        """One holder lets go of `pages`, given in the order of positions: the last are evicted before the first, since
        nobody can use a page without those before it."""
        for page in reversed(pages):
            if not self._holders[page]:
                raise AssertionError(f"page {page} was freed twice")
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._offers:
                self._idle[page] = None
            else:
                self._empty.append(page)

    def choose(self, count: int) -> list[int]:
        """The ids of `count` pages, with all that are held, and of the others those that were of use last; beyond those
        there are, new ones. To be given to `restrict`."""
        if count < self.num_held:
            raise AssertionError(f"{self.num_held} pages are held, more than {count}")
        free = [*reversed(self._idle), *reversed(self._empty)]
        chosen = self.ids.difference(free[max(0, count - self.num_held) :])
        new = (page for page in itertools.count() if page not in self.ids)
        return sorted([*chosen, *itertools.islice(new, max(0, count - len(chosen)))])

    def restrict(self, ids: Iterable[int]) -> None:
        """From now on these are the pages there are, held ones among them. What lies in the others is gone."""
        wanted = frozenset(ids)
        for page in [page for page in self._idle if page not in wanted]:
            del self._idle[page]
            self._forget(page)
        self._empty = [page for page in self._empty if page in wanted]
        self._empty[:0] = sorted(wanted - self.ids, reverse=True)
        self.ids, self.budget = wanted, len(wanted)

    def in_use(self, page: int) -> bool:
        """Whether somebody holds it, or can find what lies in it."""
        return self._holders[page] > 0 or page in self._idle

    @property
    def idle(self) -> list[int]:
        """Pages that nobody holds, with something in them that can be found."""
        return list(self._idle)

    # -- sharing ----------------------------------------------------------------------------------------------------

    def find(self, node: int, tokens: Iterable[bytes]) -> list[int]:
        """Offered pages that continue the prefix `node` with `tokens`, a page's worth each, as far as they go."""
        found: list[int] = []
        for content in tokens:
            page = self._found.get((node, content))
            if page is None:
                break
            found.append(page)
            node = self.node_of(page)
        return found

    def node_of(self, page: int) -> int:
        """The prefix that ends with an offered page."""
        return self._offers[page].node

    def offer(self, page: int, node: int, tokens: bytes) -> int:
        """Lets others find a held page that is full and written: `tokens` behind the prefix `node`.

        Returns the prefix that it ends. Where an equal page is offered already, that one stays the one to be found.
        """
        key = (node, tokens)
        if (found := self._found.get(key)) is not None:
            return self.node_of(found)
        offer = _Offer(next(self._nodes), key)
        self._offers[page] = offer
        self._found[key] = page
        return offer.node

    def withdraw(self, pages: Sequence[int]) -> None:
        """Held pages are not to be found any more, nor what was computed behind them."""
        for page in pages:
            self._forget(page)

    def empty_idle(self) -> None:
        """What lies in pages that nobody holds is gone."""
        for page in self._idle:
            self._forget(page)
        self._empty.extend(self._idle)
        self._idle.clear()

    def _forget(self, page: int) -> None:
        if (offer := self._offers.pop(page, None)) is not None:
            del self._found[offer.key]
