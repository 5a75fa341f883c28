"""Prefix caching: what a sequence takes over from others instead of computing it, and what it offers to them.

A page is offered when the step that wrote its last position is confirmed by the last stage, never when it is merely
planned: what others find is there on every stage. Pages that are shared are full, so nobody writes into them.

A sequence that could take over most of its prompt from one that computes it right now waits for it, instead of
computing the same beside it: choices of one request, or a burst of requests behind one system prompt. It holds its
place and its pages meanwhile. Whoever is followed follows nobody at that time, so nobody waits in a ring.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from .pages import PageAllocator
from .sequence import Sequence, State


class PrefixCache:
    """Sequences on one side, the allocator's tree of pages on the other."""

    def __init__(self, pages: PageAllocator, enabled: bool = True) -> None:
        self.pages = pages
        self.enabled = enabled

    def find(self, sequence: Sequence) -> list[int]:
        """Offered pages behind those it shares already. One token at least is left to compute: it gives the logits."""
        if not self.enabled or sequence.failed:
            return []
        size = self.pages.page_size
        known = range(sequence.offered, (sequence.length - 1) // size)
        return self.pages.find(sequence.node, (sequence.page_tokens(i, size) for i in known))

    def take(self, sequence: Sequence, found: list[int]) -> None:
        """`found` are its own from here on; prefill starts behind them."""
        if found:
            sequence.offered += len(found)
            sequence.node = self.pages.node_of(found[-1])
            sequence.computed = sequence.confirmed = sequence.taken_over = sequence.offered * self.pages.page_size

    def confirm(self, sequence: Sequence, computed: int) -> None:
        """The last stage has run its positions up to `computed`: the pages that are full by now are offered."""
        if not self.enabled or sequence.failed:
            return
        size = self.pages.page_size
        for i in range(sequence.offered, min(computed, sequence.length) // size):
            sequence.node = self.pages.offer(sequence.pages[i], sequence.node, sequence.page_tokens(i, size))
            sequence.offered += 1

    def fail(self, sequence: Sequence, running: Iterable[Sequence]) -> None:
        """It computed something that is not a number: who knows in which page. None of its pages is offered.

        Those that share some go on, but what they compute behind them is nothing to offer or take over either.
        """
        sequence.failed = True
        self.pages.withdraw(sequence.pages)
        pages = set(sequence.pages)
        for other in running:
            other.failed |= not pages.isdisjoint(other.pages)

    # -- waiting for a prefix that is being computed ----------------------------------------------------------------

    def follow(self, sequence: Sequence, running: Iterable[Sequence]) -> None:
        """Lets a sequence that was just admitted wait for one that computes more than half of what it has to."""
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
        """Whether it waits on; when it does not any more, it has taken over what is there."""
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
