"""One choice of one request as the scheduler sees it: the prompt, the token log, pages, and steps in flight."""

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
    """State of a sequence."""

    WAITING = "waiting"
    """It is in the admission queue, without pages."""
    RUNNING = "running"
    """It has pages, and prefills or decodes."""
    PREEMPTED = "preempted"
    """It returns to the queue, without pages, when its last step is back."""
    FINISHED = "finished"
    """It has ended. Its pages are freed when its last step is back."""


@dataclass(eq=False)
class Sequence:
    """A choice. `prompt` and `log` are its known tokens; `computed` is how many of them plans have covered.

    The log is the promise to the client: a token is appended at position = length and never changes. After a
    preemption or a new epoch, prompt + log are prefilled.
    """

    prompt: tuple[int, ...]
    choice: int
    max_tokens: int
    log: list[int] = field(default_factory=list)
    state: State = State.WAITING
    ident: int = field(default_factory=lambda: next(_numbers))
    """Its number in messages. A preempted sequence comes back with a new one."""
    pages: list[int] = field(default_factory=list)
    pages_sent: int = 0
    """Number of its pages that the workers know of."""
    computed: int = 0
    """Number of positions that plans have covered. Guessed tokens count until their row is back."""
    confirmed: int = 0
    """Number of positions that every stage has computed for certain: their steps are back."""
    in_flight: int = 0
    """Number of steps in flight that name it."""
    unsampled: int = 0
    """Number of steps in flight that sample a token of it: these tokens will come and are not known yet."""
    opened: bool = False
    """Whether the workers know it."""
    last_step: int = 0
    """Number of the last step that names it."""
    turn: int = 0
    """Count of steps, over all epochs, at which it was last planned."""
    offered: int = 0
    """Number of its first pages that others can find: its own or equal ones, and those that it shares."""
    node: int = ROOT
    """Node of the prefix of these pages in the allocator's tree."""
    taken_over: int = 0
    """Number of positions that others had computed when it started."""
    cached_tokens: int | None = None
    """`taken_over` at its first start. None until then."""
    failed: bool = False
    """Whether its pages may hold wrong values."""
    steps_back: int = 0
    """Number of its steps that every stage has run, over all epochs."""
    deaths: int = 0
    """Number of times that ranks died while a step of it was in flight, and no step of it came back between them."""
    died_at: int = -1
    """`steps_back` at the last of these deaths."""
    alone: bool = False
    """Whether it may be what makes ranks die. Then its steps run with no other in flight."""
    follows: Sequence | None = None
    """Another sequence that computes a prefix of it. It starts when that one has offered `follows_until` pages."""
    follows_until: int = 0

    @property
    def length(self) -> int:
        """Number of known tokens: prompt and log."""
        return len(self.prompt) + len(self.log)

    @property
    def expected(self) -> int:
        """Number of tokens that are known or in flight."""
        return self.length + self.unsampled

    @property
    def decodes(self) -> bool:
        """Whether only its newest token, known or in flight, is left to compute, and it may have more tokens."""
        new = len(self.log) + self.unsampled
        return 0 < new < self.max_tokens and self.expected - self.computed == 1

    @property
    def prefills(self) -> bool:
        """Whether known tokens are left to compute, other than the newest token of a decode."""
        return self.remaining_prefill > 1 or (self.remaining_prefill == 1 and not self.log)

    @property
    def remaining_prefill(self) -> int:
        """Number of known tokens that no plan has covered."""
        return self.length - self.computed

    def tokens(self, start: int, count: int) -> list[int]:
        """Token ids of positions start .. start+count-1."""
        split = len(self.prompt)
        if start >= split:
            return self.log[start - split : start - split + count]
        return [*self.prompt[start : start + count], *self.log[: max(0, start + count - split)]]

    def page_tokens(self, page: int, page_size: int) -> bytes:
        """Token ids of one page, packed. All of them must be known."""
        start, end = page * page_size, (page + 1) * page_size
        if end <= len(self.prompt):
            return self._packed_prompt[4 * start : 4 * end]
        return _pack(self.tokens(start, page_size))

    @functools.cached_property
    def _packed_prompt(self) -> bytes:
        return _pack(self.prompt)

    def forget_pages(self) -> list[int]:
        """Takes its pages, and resets all that was computed. It gets a new number. Returns the pages."""
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
    """Packs token ids, four bytes each."""
    return array("I", tokens).tobytes()
