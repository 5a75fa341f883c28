"""Decides which pages must still be copied to the next epoch's workers. Pure.

Pages change while they are copied: a page that a step writes is copied again. Pages that are being written wait. In the
end only pages remain that steps write all the time. They are copied when planning has stopped, as their steps come
back.
"""

from __future__ import annotations

from .plan import Plan
from .scheduler import Scheduler


class PageCopier:
    """Tracks which pages of one scheduler are not copied yet."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        pages = scheduler.pages
        self._size = pages.page_size
        self._dirty = set(pages.idle)
        """Pages whose content is not copied yet."""
        for sequence in scheduler.running:
            self._dirty.update(sequence.pages[: pages.pages_for(sequence.computed)])

    def note(self, plan: Plan) -> None:
        """A step is sent."""
        self._dirty |= self._written(plan)

    def next(self, at_most: int | None = None) -> list[int]:
        """Pages to copy now, which no step is writing. They count as copied from here on."""
        busy: set[int] = set()
        for plan in self._scheduler.out.values():
            busy |= self._written(plan)
        found = sorted(page for page in self._dirty - busy if self._scheduler.pages.in_use(page))[:at_most]
        self._dirty.difference_update(found)
        return found

    def _written(self, plan: Plan) -> set[int]:
        """Pages that a step writes, with those for guesses of the last stage."""
        written: set[int] = set()
        for row in plan.rows:
            end = row.start + row.count + row.guesses
            written.update(row.sequence.pages[row.start // self._size : -(-end // self._size)])
        return written
