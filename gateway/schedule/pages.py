"""Allocates KV pages: the gateway assigns ids. An id means the same tokens on every worker of a pipeline.

A full page can be offered to other sequences. It is then found by the page before it and its own tokens. So pages form
a tree whose paths are prefixes: SGLang's radix tree (Zheng et al. 2024), with a page as an edge. An offered page that
no sequence holds is idle: free, but filled until its memory is needed. The page that was released first is reused
first.

Pure: no I/O, no clock. A page is freed only when no step in flight names it. The scheduler ensures that; the prefix
cache (`prefix.py`) and the ledger (pages of probes) free pages, too.
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
    """The pages and steps that the stages of an epoch grant to a gateway."""

    pages: tuple[int, ...]
    """Ids of the pages."""
    page_size: int
    """Tokens per page."""
    steps_in_flight: int


@dataclass(frozen=True, slots=True)
class _Offer:
    """A page in the tree. Its key has the tokens themselves, not a hash, so prefixes are never confused."""

    node: int
    """Number of the node. It is never used twice, so pages below a withdrawn or evicted page are never found again."""
    key: tuple[int, bytes]
    """(number of the node before, the page's tokens)."""


class PageAllocator:
    """Allocates page ids, 0 .. num_pages-1 at first.

    Empty pages are used first, from a stack, which keeps recently used ones in caches. Then idle ones are used.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.ids = frozenset(range(num_pages))
        """Ids of all pages."""
        self.page_size = page_size
        self.budget = num_pages
        """Number of pages that may be held at once."""
        self._empty = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Offered pages that no sequence holds, the one that was released first at the front."""
        self._holders = defaultdict[int, int](int)
        """Page -> number of sequences that hold it."""
        self._offers: dict[int, _Offer] = {}
        self._found: dict[tuple[int, bytes], int] = {}
        self._nodes = itertools.count(ROOT + 1)

    # -- holding ----------------------------------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        return len(self.ids)

    @property
    def num_held(self) -> int:
        """Number of pages that sequences hold."""
        return len(self.ids) - len(self._empty) - len(self._idle)

    @property
    def num_free(self) -> int:
        """Number of pages that can be allocated: empty or idle ones, within the budget."""
        return max(0, self.budget - self.num_held)

    @property
    def usage(self) -> float:
        """Share of the pages in use, 0 to 1."""
        return 1 - self.num_free / self.num_pages

    def num_free_beside(self, shared: Sequence[int]) -> int:
        """Number of free pages, without `shared`."""
        return self.num_free - sum(not self._holders[page] for page in shared)

    def holders(self, page: int) -> int:
        """Number of sequences that hold a page."""
        return self._holders[page]

    def pages_for(self, tokens: int) -> int:
        """Number of pages that `tokens` positions need."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int, shared: Sequence[int] = ()) -> list[int] | None:
        """Allocates `count` pages, and holds `shared` too. Does neither and returns None if too few are free."""
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
        """One holder releases `pages`, given in the order of positions.

        Later pages are evicted before earlier ones, since a page is useless without those before it.
        """
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
        """The ids of `count` pages for `restrict`: all held ones, then those used last, then new ids."""
        if count < self.num_held:
            raise AssertionError(f"{self.num_held} pages are held, more than {count}")
        free = [*reversed(self._idle), *reversed(self._empty)]
        chosen = self.ids.difference(free[max(0, count - self.num_held) :])
        new = (page for page in itertools.count() if page not in self.ids)
        return sorted([*chosen, *itertools.islice(new, max(0, count - len(chosen)))])

    def restrict(self, ids: Iterable[int]) -> None:
        """Sets the ids of all pages. They must include the held ones. The content of dropped pages is lost."""
        wanted = frozenset(ids)
        for page in [page for page in self._idle if page not in wanted]:
            del self._idle[page]
            self._forget(page)
        self._empty = [page for page in self._empty if page in wanted]
        self._empty[:0] = sorted(wanted - self.ids, reverse=True)
        self.ids, self.budget = wanted, len(wanted)

    def in_use(self, page: int) -> bool:
        """Whether a sequence holds the page, or its content can be found."""
        return self._holders[page] > 0 or page in self._idle

    @property
    def idle(self) -> list[int]:
        """Offered pages that no sequence holds."""
        return list(self._idle)

    # -- sharing ----------------------------------------------------------------------------------------------------

    def find(self, node: int, tokens: Iterable[bytes]) -> list[int]:
        """Offered pages that continue the prefix `node`, as far as there are any. `tokens`: those of one page each."""
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
        """Lets others find a held page that is full and written: `tokens` after the prefix `node`.

        Returns the node of the prefix with this page. If an equal page is offered already, that one stays in the tree.
        """
        key = (node, tokens)
        if (found := self._found.get(key)) is not None:
            return self.node_of(found)
        offer = _Offer(next(self._nodes), key)
        self._offers[page] = offer
        self._found[key] = page
        return offer.node

    def withdraw(self, pages: Sequence[int]) -> None:
        """Removes held pages from the tree. They cannot be found any more, nor pages after them."""
        for page in pages:
            self._forget(page)

    def empty_idle(self) -> None:
        """Drops the content of all idle pages."""
        for page in self._idle:
            self._forget(page)
        self._empty.extend(self._idle)
        self._idle.clear()

    def _forget(self, page: int) -> None:
        if (offer := self._offers.pop(page, None)) is not None:
            del self._found[offer.key]
