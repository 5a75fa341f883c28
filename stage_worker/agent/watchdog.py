"""How an agent learns that a rank hangs: the rank does not go on within the time that it named itself.

Nobody is blamed for what the host does: time in which a rank of the group was ready and had no core does not count, nor
time in which this process was not run (docs/adr/0014).

What was never measured may take long, and so may an order. There it is seen whether anything goes on: a rank that is
stopped does not, and on a CPU a group of which no thread runs waits for nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stagemesh.processes.cpu import CpuUse

from ..messages.heartbeat import Activity, Beat, Heartbeats
from ..timing import StageTiming

AT_REST = 0.05
"""Of the time: threads that wake now and then, as those of libraries do, are no work."""


class Meter(Protocol):
    """`CpuMeter`, or what stands for it in a test."""

    def read(self, passed_s: float) -> CpuUse:
        """What a process did since the last reading."""


@dataclass(frozen=True)
class Hang:
    """A rank that is to be killed."""

    rank: int
    why: str


@dataclass
class _Watched:
    """A rank, since it was seen to write."""

    meter: Meter
    beat: Beat
    silent_s: float = 0.0
    starved_s: float = 0.0
    """Of that, how long somebody of the group had no core."""
    stopped_s: float = 0.0
    """Of that, how long it was stopped."""
    use: CpuUse = field(default_factory=CpuUse)
    """What it did since the look before, where it has been silent for a while."""
    metered: bool = False
    """It has."""

    @property
    def late_s(self) -> float:
        """Beyond the time that it named."""
        return self.silent_s - self.starved_s - self.beat.allowed_s


class Watchdog:
    """Of one group of ranks. Asked again and again, each `look_s`."""

    def __init__(
        self,
        memory: Heartbeats,
        meters: Sequence[Meter],
        timing: StageTiming,
        *,
        cuda: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory, self._timing, self._cuda, self._clock = memory, timing, cuda, clock
        self._ranks = [_Watched(meter, memory.read(rank)) for rank, meter in enumerate(meters)]
        self._looked_at = clock()
        self._rests_s = 0.0
        """Since a rank wrote or ran."""

    def look(self) -> Hang | None:
        """Looks; the rank that hangs, if one does."""
        now = self._clock()
        passed_s, self._looked_at = now - self._looked_at, now
        # What is beyond is this process's own delay: the machine is busy, or was asleep.
        counted_s = passed_s if passed_s <= 2 * self._timing.look_s else self._timing.look_s
        for rank, watched in enumerate(self._ranks):
            self._look_at(watched, self._memory.read(rank), passed_s, counted_s)
        starved_s = min(counted_s, max(watched.use.starved_s for watched in self._ranks))
        for watched in self._ranks:
            watched.starved_s += starved_s
        rests = all(
            watched.silent_s > self._timing.alive_s and not _busy(watched.use, passed_s) for watched in self._ranks
        )
        self._rests_s = self._rests_s + counted_s if rests else 0.0
        found = next(filter(None, (self._verdict(rank, passed_s) for rank in range(len(self._ranks)))), None)
        # Its process may have waited for a core, have it while it is looked at, and wait again by then.
        return None if found is None or self._wrote(found.rank) else found

    def _look_at(self, watched: _Watched, beat: Beat, passed_s: float, counted_s: float) -> None:
        if beat != watched.beat:
            watched.beat, watched.use, watched.metered = beat, CpuUse(), False
            watched.silent_s = watched.starved_s = watched.stopped_s = 0.0
            return
        watched.silent_s += counted_s
        if watched.silent_s < self._timing.alive_s / 2:
            return
        use, metered, watched.metered = watched.meter.read(passed_s), watched.metered, True
        # The first reading is of a longer time, and only begins.
        watched.use = use if metered else CpuUse(ended=use.ended)
        watched.stopped_s = watched.stopped_s + counted_s if watched.use.stopped else 0.0

    def _verdict(self, rank: int, passed_s: float) -> Hang | None:
        watched, timing = self._ranks[rank], self._timing
        if watched.use.ended:
            return None
        if watched.stopped_s > timing.stuck_s:
            return Hang(rank, f"it is stopped ({watched.beat})")
        # One that runs is slow rather than stuck, for a while.
        if watched.late_s > (timing.late_s if _busy(watched.use, passed_s) else 0.0):
            return Hang(rank, f"silent for {watched.silent_s:.1f} s, {watched.late_s:.1f} s too long ({watched.beat})")
        waits = any(other.beat.activity in (Activity.STARTING, Activity.ORDER, Activity.LOAD) for other in self._ranks)
        # On CUDA devices nobody can tell: the work is the device's.
        if self._rests_s > (timing.order_stuck_s if waits else timing.stuck_s) and not self._cuda:
            return Hang(rank, f"no rank runs ({watched.beat})")
        return None

    def _wrote(self, rank: int) -> bool:
        return self._memory.read(rank) != self._ranks[rank].beat


def _busy(use: CpuUse, passed_s: float) -> bool:
    return max(use.ran_s, use.starved_s) > AT_REST * passed_s or use.on_disk or use.ended
