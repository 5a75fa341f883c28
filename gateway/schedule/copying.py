"""Which pages are still to be copied to the workers that are going to hold them. Pure.

What lies in pages changes while they are copied: a page that a step writes is copied again. Pages that are being
written wait, so that in the end those are left that steps write all the time: they follow when nothing more is planned,
as their steps come back.
"""

from __future__ import annotations

from .plan import Plan
from .scheduler import Scheduler


class PageCopier:
    """Pages of one scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        pages = scheduler.pages
        self._size = pages.page_size
        self._dirty = set(pages.idle)
        """Pages that hold what was not copied."""
        for sequence in scheduler.running:
            self._dirty.update(sequence.pages[: pages.pages_for(sequence.computed)])

    def note(self, plan: Plan) -> None:
        """A step goes out."""
        self._dirty |= self._written(plan)

    def next(self, at_most: int | None = None) -> list[int]:
        """Pages that no step writes now; they are taken as copied."""
        busy: set[int] = set()
        for plan in self._scheduler.out.values():
            busy |= self._written(plan)
        found = sorted(page for page in self._dirty - busy if self._scheduler.pages.in_use(page))[:at_most]
        self._dirty.difference_update(found)
        return found

    def _written(self, plan: Plan) -> set[int]:
        """Pages that a step writes, with those of guesses that the last stage is asked for."""
        written: set[int] = set()
        for row in plan.rows:
            end = row.start + row.count + row.guesses
            written.update(row.sequence.pages[row.start // self._size : -(-end // self._size)])
        return written
