"""How an agent learns that a rank hangs: the rank writes into shared memory until when it will be heard of again.

A process that hangs keeps its sockets open, so only a deadline sees it. The rank sets that deadline itself, before each
stretch of work, from what such stretches were measured to take: a large prompt on a slow core is not a hang, and a
decode step that takes half a second longer than ever is one. No thread, no message: eight bytes a rank.

What was never measured may take long, and so may an order. There it is seen whether anything goes on: a rank that is
stopped does not, and on a CPU a group of which no thread runs waits for nobody.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

ALIVE_S = 0.4
"""A rank that has nothing to do, or very little, is heard of within this time."""
MARGIN = 10.0
"""How many times longer than ever a stretch of work may take, beyond that."""
FIRST_S = 30.0
"""A stretch of a step smaller than any before: much is made when it is needed for the first time."""
CUDA_S = 5.0
"""Beyond that on a CUDA device, where a decode step of a new size is captured first."""
FORGET = 0.7
"""Of the slowest stretch of a step, for each step of its size: the first of a kind take many times as long."""

CALL_S = 120.0
"""What an order may take between two signs of life: to import a model's modules on a busy machine, a large tensor."""
STARVED_S = 3.0
"""A rank that would go on if it had a core gets so much longer."""
STOPPED_S = 0.5
"""So long beyond `ALIVE_S` a rank may be stopped: whoever looks at it with a debugger's means does so in less."""
RESTS_S = 0.6
"""So long beyond `ALIVE_S` no rank of a group runs, and it hangs, whatever time it has: one that waits for another does
so while that one runs."""
ORDER_RESTS_S = 15.0
"""The same within an order, or before the first sign of life: a file system, or a name, may be on the network."""

SLOT = 8


def make_heartbeats(size: int) -> int:
    """A descriptor of memory for `size` ranks, to be handed to each; nothing is due yet."""
    fd = os.memfd_create("stagemesh-heartbeats", os.MFD_CLOEXEC)
    os.ftruncate(fd, size * SLOT)
    with mmap.mmap(fd, size * SLOT) as memory, memoryview(memory).cast("d") as values:
        for rank in range(size):
            values[rank] = math.inf
    return fd


class Heart:
    """The rank's side."""

    def __init__(self, fd: int, rank: int, size: int, *, cuda: bool = False) -> None:
        self._values = memoryview(mmap.mmap(fd, size * SLOT)).cast("d")
        os.close(fd)
        self._rank = rank
        self._slack_s = ALIVE_S + (CUDA_S if cuda else 0.0)
        self._size: int | None = None
        """Of the step under way: its tokens' number of bits."""
        self._beat_at = self._slowest_s = self._allowed_s = 0.0
        self._stretch_s: dict[int, float] = {}
        """Size -> the slowest stretch of such steps of late."""

    def beat(self) -> None:
        """This rank goes on: it is between two layers, or has nothing to do."""
        now = time.monotonic()
        if self._size is not None:
            self._slowest_s = max(self._slowest_s, now - self._beat_at)
        self._beat_at = now
        self._values[self._rank] = now + self._slack_s + self._allowed_s

    def work(self, tokens: int) -> None:
        """A step of so many tokens begins."""
        size = tokens.bit_length()
        self._allowed_s = self._most_s(size)
        self.beat()
        self._size, self._slowest_s = size, 0.0

    def rest(self) -> None:
        """The step is over."""
        assert self._size is not None
        self._allowed_s = 0.0
        self.beat()
        self._stretch_s[self._size] = max(self._slowest_s, FORGET * self._stretch_s.get(self._size, 0.0))
        self._size = None

    def _most_s(self, size: int) -> float:
        """What a stretch of such a step may take: measured, or in proportion to the next smaller that was."""
        smaller = max((s for s in self._stretch_s if s <= size), default=None)
        if smaller is None:
            return FIRST_S
        return MARGIN * self._stretch_s[smaller] * float(1 << (size - smaller))

    def call(self) -> None:
        """A call of the agent begins, or has come further: a load says so with every tensor."""
        self._values[self._rank] = time.monotonic() + CALL_S


class Doing(Enum):
    """What the threads of a process do."""

    RUNS = "one runs, or waits for a core or a disk: it is slow, and does not hang"
    WAITS = "all wait for something"
    STOPPED = "all are stopped: nothing but a signal lets them go on"
    ENDED = "there are none: whoever waits for its end is about to hear of it"

    @property
    def blameless(self) -> bool:
        """Whether it may be silent for a while longer."""
        return self in (Doing.RUNS, Doing.ENDED)


def doing(pid: int) -> Doing:
    """What a process does."""
    states = set()
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            states.add(stat.read_text().rpartition(")")[2].split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue  # This thread has just ended.
    if states & set("RD"):
        return Doing.RUNS
    if states <= set("ZX"):
        return Doing.ENDED
    return Doing.STOPPED if states <= set("Tt") else Doing.WAITS


@dataclass(frozen=True)
class Look:
    """What one look at the hearts of a group has told."""

    overdue: list[tuple[int, float]]
    """Ranks that were overdue at the last look as well, and for how many seconds they are. One that waits for another
    is overdue like that one."""
    stopped: list[int]
    """Ranks that were stopped at every look for `STOPPED_S`."""
    rests: bool
    """No rank has run, or written, at any look for as long as it takes to say that the group is at nothing."""


class HeartWatch:
    """The agent's side: whose time is up, and who does not use his. Asked again and again; a look that itself comes
    late says nothing."""

    def __init__(self, fd: int, size: int, every_s: float) -> None:
        self._values = memoryview(mmap.mmap(fd, size * SLOT)).cast("d")
        self._every_s = every_s
        self._looked_at = 0.0
        self._seen = [0.0] * size
        self._suspects: set[int] = set()
        self._silent_s = [0.0] * size
        """Since each rank wrote, or ran."""
        self._stopped_s = [0.0] * size

    def wrote(self, rank: int) -> bool:
        """Whether a rank has written since the last look. Asked behind what it does: it may have had its core, and wait
        again by then."""
        return self._values[rank] != self._seen[rank]

    def look(self, doing: Callable[[int], Doing]) -> Look:
        """Looks; `doing` says what a rank does, and is asked of those that have not written for a while."""
        now, seen = time.monotonic(), list(self._values)
        passed_s, self._looked_at = now - self._looked_at, now
        before, self._seen = self._seen, seen
        # Where this process was not run either, the machine is busy or was asleep: nobody can be blamed for that.
        late = passed_s > 2 * self._every_s
        for rank, due in enumerate(seen):
            silent_s = 0.0 if late or due != before[rank] else self._silent_s[rank] + passed_s
            found = doing(rank) if silent_s > ALIVE_S else Doing.WAITS
            self._silent_s[rank] = ALIVE_S if found.blameless else silent_s
            self._stopped_s[rank] = self._stopped_s[rank] + passed_s if found is Doing.STOPPED else 0.0
        overdue = set() if late else {rank for rank, due in enumerate(seen) if due < now}
        confirmed, self._suspects = overdue & self._suspects, overdue
        # An order's time is so long that no step's is mistaken for it.
        within_order = any(due - now > CALL_S / 2 for due in seen)
        return Look(
            [(rank, now - seen[rank]) for rank in sorted(confirmed)],
            [rank for rank, stopped_s in enumerate(self._stopped_s) if stopped_s > STOPPED_S],
            min(self._silent_s) - ALIVE_S > (ORDER_RESTS_S if within_order else RESTS_S),
        )
