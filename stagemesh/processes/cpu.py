"""Measures how a process spent its time: it ran, it waited for a core, or neither.

A process may be late only because others had the cores. The kernel counts, for every thread, the nanoseconds that it
ran, and those that it was runnable without a core (/proc/PID/task/TID/schedstat).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class CpuUse:
    """The use of an interval by a process."""

    ran_s: float = 0.0
    """CPU seconds of all threads."""
    starved_s: float = 0.0
    """Seconds for which a thread was runnable without a core, for the thread that waited longest."""
    on_disk: bool = False
    """Whether a thread waits for a disk now, for example for memory that was swapped out."""
    stopped: bool = False
    """Whether all threads are stopped by a signal now."""
    ended: bool = False
    """Whether the process has no threads any more, or is a zombie."""


class CpuMeter:
    """Measures one process."""

    def __init__(self, pid: int) -> None:
        self._tasks = Path(f"/proc/{pid}/task")
        self._before: dict[str, tuple[int, int]] = {}
        """Thread -> nanoseconds that it had run, and had waited for a core, at the last reading."""

    def read(self, passed_s: float) -> CpuUse:
        """Measures the time since the last reading, `passed_s` seconds ago. The first one only sets the baseline."""
        states: set[str] = set()
        ran_s = starved_s = 0.0
        before, self._before = self._before, {}
        for task in self._tasks.glob("*"):
            try:
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue  # The thread has just ended.
            states.add(state)
            try:
                ran, waited = (int(field) for field in (task / "schedstat").read_text().split()[:2])
            except (OSError, ValueError):
                # The system does not count waits. Half of the time of a runnable thread counts as a wait.
                starved_s = max(starved_s, passed_s / 2 if state == "R" else 0.0)
                continue
            self._before[task.name] = ran, waited
            if task.name not in before:
                continue
            new_ran_s, new_waited_s = (ran - before[task.name][0]) / 1e9, (waited - before[task.name][1]) / 1e9
            ran_s += new_ran_s
            # The kernel adds a wait when it is over. A runnable thread that has not run is still waiting.
            starved_s = max(starved_s, passed_s if state == "R" and not new_ran_s else new_waited_s)
        return CpuUse(
            ran_s=ran_s,
            starved_s=min(starved_s, passed_s),
            on_disk="D" in states,
            stopped=bool(states) and states <= set("Tt"),
            ended=states <= set("ZX"),
        )


class Patience:
    """A deadline for a process. Time in which the process had no core, or was not watched, does not count.

    Args:
        total_s: total seconds.
        idle_s: seconds in which it does nothing: it neither runs nor waits for a core or a disk.
        look_s: interval at which `over` is called.
    """

    def __init__(
        self, pid: int, *, total_s: float, idle_s: float, look_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.look_s = look_s
        self._meter = CpuMeter(pid)
        self._total_s, self._idle_s, self._clock = total_s, idle_s, clock
        self._spent_s = self._nothing_s = 0.0
        self._looked_at = clock()

    def over(self) -> bool:
        """Looks at the process. Returns whether the deadline has passed."""
        now = self._clock()
        passed_s, self._looked_at = now - self._looked_at, now
        use = self._meter.read(passed_s)
        counted_s = min(passed_s, 2 * self.look_s)
        self._spent_s += max(0.0, counted_s - use.starved_s)
        busy = use.ran_s or use.starved_s or use.on_disk
        self._nothing_s = 0.0 if busy else self._nothing_s + counted_s
        return self._spent_s > self._total_s or self._nothing_s > self._idle_s


async def answered(answer: Awaitable[T], patience: Patience) -> T:
    """Waits for a process's answer. Raises TimeoutError when `patience` is over."""
    task = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait([task], timeout=patience.look_s))[0]:
            if patience.over():
                raise TimeoutError
        return task.result()
    finally:
        task.cancel()
