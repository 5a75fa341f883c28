"""Which KV pages are whose: the gateway hands out ids, the same id for the same tokens on every worker of a pipeline.

Pure: no I/O, no clock. A page is given back only when no step that names it is out; the scheduler sees to that.
"""

from __future__ import annotations


class PageAllocator:
    """Ids 0 .. num_pages-1, handed out lowest-recently-freed last (a stack keeps the hot ones hot)."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` positions need."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None when there are not that many."""
        if count > len(self._free):
            return None
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken[::-1]

    def free(self, pages: list[int]) -> None:
        """Takes pages back."""
        self._free.extend(reversed(pages))
        if len(self._free) > self.num_pages:
            raise AssertionError(f"{len(self._free)} pages are free of {self.num_pages}: one was freed twice")
