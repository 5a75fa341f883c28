"""Prefix caching: the pages that a sequence takes from others instead of computing them, and those that it offers.

A page is offered when the last stage has confirmed the step that wrote its last position, never when it is only
planned. So a page that is found is filled on every stage. Shared pages are full, so no sequence writes into them.

If another sequence is computing most of a sequence's prompt, the sequence waits for it instead of computing the same.
Choices of one request do so, and bursts of requests with one system prompt. It keeps its place and its pages meanwhile.
A sequence that is followed does not follow another one at that time, so there are no rings.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from .pages import PageAllocator
from .sequence import Sequence, State


class PrefixCache:
    """Finds, takes and offers pages of sequences in the allocator's tree."""

    def __init__(self, pages: PageAllocator, enabled: bool = True) -> None:
        self.pages = pages
        self.enabled = enabled

    def find(self, sequence: Sequence) -> list[int]:
        """Offered pages after those that it shares already. At least one token is left to compute, for the logits."""
        if not self.enabled or sequence.failed:
            return []
        size = self.pages.page_size
        known = range(sequence.offered, (sequence.length - 1) // size)
        return self.pages.find(sequence.node, (sequence.page_tokens(i, size) for i in known))

    def take(self, sequence: Sequence, found: list[int]) -> None:
        """Gives the pages `found` to a sequence, whose prefill starts after them."""
        if found:
            sequence.offered += len(found)
            sequence.node = self.pages.node_of(found[-1])
            sequence.computed = sequence.confirmed = sequence.taken_over = sequence.offered * self.pages.page_size

    def confirm(self, sequence: Sequence, computed: int) -> None:
        """Offers the pages that are full, as the last stage has run the positions up to `computed`."""
        if not self.enabled or sequence.failed:
            return
        size = self.pages.page_size
        for i in range(sequence.offered, min(computed, sequence.length) // size):
            sequence.node = self.pages.offer(sequence.pages[i], sequence.node, sequence.page_tokens(i, size))
            sequence.offered += 1

    def fail(self, sequence: Sequence, running: Iterable[Sequence]) -> None:
        """The sequence has computed a value that is not finite, in an unknown page. None of its pages is offered.

        Sequences that share some of its pages go on, but they neither offer nor take pages any more.
        """
        sequence.failed = True
        self.pages.withdraw(sequence.pages)
        pages = set(sequence.pages)
        for other in running:
            other.failed |= not pages.isdisjoint(other.pages)

    # -- waiting for a prefix that is being computed ----------------------------------------------------------------

    def follow(self, sequence: Sequence, running: Iterable[Sequence]) -> None:
        """Lets a newly admitted sequence wait for another one that computes more than half of its prefill."""
        if not self.enabled:
            return
        size = self.pages.page_size
        last = (sequence.length - 1) // size
        enough = sequence.offered + sequence.remaining_prefill / (2 * size)
        for other in running:
            if (
                other.node != sequence.node
                or other.follows is not None
                or other.failed
                or other.state is not State.RUNNING
            ):
                continue
            until = sequence.offered
            end = min(last, other.length // size)
            while until < end and sequence.page_tokens(until, size) == other.page_tokens(until, size):
                until += 1
            if until > enough:
                sequence.follows, sequence.follows_until = other, until
                return

    def still_follows(self, sequence: Sequence) -> bool:
        """Whether the sequence still waits for another one. When it stops, it takes the pages that are there."""
        other = sequence.follows
        if other is None:
            return False
        if other.state is State.RUNNING and not other.failed and other.offered < sequence.follows_until:
            return True
        sequence.follows = None
        found = self.find(sequence)
        own = sequence.pages[sequence.offered : sequence.offered + len(found)]
        self.pages.allocate(0, found)
        sequence.pages[sequence.offered : sequence.offered + len(found)] = found
        self.pages.free(own)
        self.take(sequence, found)
        return False
