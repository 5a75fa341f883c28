"""One choice of one request as the scheduler sees it: a prompt, the token log, pages, and what is in flight."""

from __future__ import annotations

import enum
import functools
import itertools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from .pages import ROOT

_numbers = itertools.count(1)


class State(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    """In the admission queue: no pages."""
    RUNNING = "running"
    """Has pages; prefills or decodes."""
    PREEMPTED = "preempted"
    """To be put back into the queue, without pages, when its last step is back."""
    FINISHED = "finished"
    """Ended; its pages go when its last step is back."""


@dataclass(eq=False)
class Sequence:
    """A choice: `prompt` and `log` are what it holds for certain; `computed` is how far plans have covered them.

    The log is the promise to the client: a token is appended at position = length and never changed. After a
    preemption or a new epoch, prompt + log is what is prefilled.
    """

    prompt: tuple[int, ...]
    choice: int
    max_tokens: int
    log: list[int] = field(default_factory=list)
    state: State = State.WAITING
    ident: int = field(default_factory=lambda: next(_numbers))
    """Its number on the wire; a preempted sequence comes back under a fresh one."""
    pages: list[int] = field(default_factory=list)
    pages_sent: int = 0
    """How many of `pages` the workers have been told of."""
    computed: int = 0
    """Positions covered by plans that were sent, guessed tokens among them until their row is back."""
    confirmed: int = 0
    """Positions that every stage has computed for certain: their step is back."""
    in_flight: int = 0
    """Steps that name it and are not back."""
    unsampled: int = 0
    """Steps out that sample a token of it: tokens that are sure to come and not known yet."""
    opened: bool = False
    """Whether the workers know it."""
    last_step: int = 0
    turn: int = 0
    """When it was planned last, as a count of steps that goes on over epochs."""
    offered: int = 0
    """Leading pages that others can find, its own or equal ones; those it took over are among them."""
    node: int = ROOT
    """The prefix that these pages are, in the allocator's tree."""
    taken_over: int = 0
    """Positions that others had computed when it started."""
    cached_tokens: int | None = None
    """`taken_over` of its first start; None until then."""
    failed: bool = False
    """What it computed is not to be relied on."""
    steps_back: int = 0
    """Steps of it that every stage has run, over all epochs."""
    deaths: int = 0
    """How often in a row ranks died while a step of it was out, and none of it came back between (suspects.py)."""
    died_at: int = -1
    """`steps_back` at the last of these deaths."""
    alone: bool = False
    """It may be what ends ranks: nothing else is out while a step of it is."""
    follows: Sequence | None = None
    """One that computes a prefix of it right now: it starts when that one has offered `follows_until` pages."""
    follows_until: int = 0

    @property
    def length(self) -> int:
        """Tokens known: prompt and log."""
        return len(self.prompt) + len(self.log)

    @property
    def expected(self) -> int:
        """Tokens known or on their way."""
        return self.length + self.unsampled

    @property
    def decodes(self) -> bool:
        """Whether just its newest token, known or on its way, is left to compute, and another one is wanted."""
        new = len(self.log) + self.unsampled
        return 0 < new < self.max_tokens and self.expected - self.computed == 1

    @property
    def prefills(self) -> bool:
        """Whether known tokens are left to compute, other than the one newest token of a decode."""
        return self.remaining_prefill > 1 or (self.remaining_prefill == 1 and not self.log)

    @property
    def remaining_prefill(self) -> int:
        """Known tokens that no plan has covered."""
        return self.length - self.computed

    def tokens(self, start: int, count: int) -> list[int]:
        """Ids of positions start .. start+count-1."""
        split = len(self.prompt)
        if start >= split:
            return self.log[start - split : start - split + count]
        return [*self.prompt[start : start + count], *self.log[: max(0, start + count - split)]]

    def page_tokens(self, page: int, page_size: int) -> bytes:
        """Ids of the positions of one page, packed: all of them have to be known."""
        start, end = page * page_size, (page + 1) * page_size
        if end <= len(self.prompt):
            return self._packed_prompt[4 * start : 4 * end]
        return _pack(self.tokens(start, page_size))

    @functools.cached_property
    def _packed_prompt(self) -> bytes:
        return _pack(self.prompt)

    def forget_pages(self) -> list[int]:
        """Takes its pages away, and with them everything that was computed; it comes back as another number."""
        pages, self.pages = self.pages, []
        self.pages_sent = self.computed = self.confirmed = self.last_step = 0
        self.offered = self.taken_over = 0
        self.node = ROOT
        self.follows = None
        self.failed = False
        self.opened = False
        self.ident = next(_numbers)
        return pages


def _pack(tokens: Iterable[int]) -> bytes:
    """Four bytes a token."""
    return array("I", tokens).tobytes()
