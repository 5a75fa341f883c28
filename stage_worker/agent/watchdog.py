"""Decides which rank hangs: a rank that writes no heartbeat within the time that it announced itself.

Delays of the host do not count. Such delays are time in which a rank of the group was runnable without a core, and time
in which this process did not run (docs/adr/0014).

A step that was never measured may take long, and so may an order. Two rules find a hang during those as well. A stopped
rank hangs. On a CPU, a group hangs if none of its ranks runs, because a rank only waits for ranks that run.
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
"""Share of CPU time below which a process counts as idle: threads of libraries wake up sometimes."""


class Meter(Protocol):
    """The interface of `CpuMeter` that the watchdog uses."""

    def read(self, passed_s: float) -> CpuUse:
        """See `CpuMeter.read`."""


@dataclass(frozen=True)
class Hang:
    """A rank that hangs, and the reason for the log."""

    rank: int
    why: str


@dataclass
class _Watched:
    """Measurements of one rank since its last heartbeat."""

    meter: Meter
    beat: Beat
    silent_s: float = 0.0
    starved_s: float = 0.0
    """Part of `silent_s` in which a rank of the group was runnable without a core."""
    stopped_s: float = 0.0
    """The last part of `silent_s`, during which the rank was stopped."""
    use: CpuUse = field(default_factory=CpuUse)
    """CPU use of its process since the previous look. It is measured once the rank has been silent for a while."""
    metered: bool = False
    """Whether `meter` was read since the last heartbeat."""

    @property
    def late_s(self) -> float:
        """Seconds by which the rank exceeds the announced time."""
        return self.silent_s - self.starved_s - self.beat.allowed_s


class Watchdog:
    """Watches one group of ranks. The caller calls `look` every `look_s`."""

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
        """Seconds during which no rank has written or run."""

    def look(self) -> Hang | None:
        """Looks at all ranks. Returns a rank that hangs, or None."""
        now = self._clock()
        passed_s, self._looked_at = now - self._looked_at, now
        # A late look counts as one interval: the rest is this process's own delay, or the machine was asleep.
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
        # The rank may have got a core and written a heartbeat while its process was measured.
        return None if found is None or self._memory.read(found.rank) != self._ranks[found.rank].beat else found

    def _look_at(self, watched: _Watched, beat: Beat, passed_s: float, counted_s: float) -> None:
        if beat != watched.beat:
            watched.beat, watched.use, watched.metered = beat, CpuUse(), False
            watched.silent_s = watched.starved_s = watched.stopped_s = 0.0
            return
        watched.silent_s += counted_s
        if watched.silent_s < self._timing.alive_s / 2:
            return
        use, metered, watched.metered = watched.meter.read(passed_s), watched.metered, True
        # The first reading covers a longer time. It only sets the baseline for the next one.
        watched.use = use if metered else CpuUse(ended=use.ended)
        watched.stopped_s = watched.stopped_s + counted_s if watched.use.stopped else 0.0

    def _verdict(self, rank: int, passed_s: float) -> Hang | None:
        watched, timing = self._ranks[rank], self._timing
        if watched.use.ended:
            return None
        if watched.stopped_s > timing.stuck_s:
            return Hang(rank, f"it is stopped ({watched.beat})")
        # A rank that runs may be slow, and gets more time.
        if watched.late_s > (timing.late_s if _busy(watched.use, passed_s) else 0.0):
            return Hang(rank, f"silent for {watched.silent_s:.1f} s, {watched.late_s:.1f} s too long ({watched.beat})")
        waits = any(other.beat.activity in (Activity.STARTING, Activity.ORDER, Activity.LOAD) for other in self._ranks)
        # With CUDA the work is done by the device, and the processes may be idle.
        if self._rests_s > (timing.order_stuck_s if waits else timing.stuck_s) and not self._cuda:
            return Hang(rank, f"no rank runs ({watched.beat})")
        return None


def _busy(use: CpuUse, passed_s: float) -> bool:
    return max(use.ran_s, use.starved_s) > AT_REST * passed_s or use.on_disk or use.ended
