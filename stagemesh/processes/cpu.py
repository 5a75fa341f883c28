"""What a process did with its time, as the kernel counts it: whether it ran, waited for a core, or neither.

A process that is late because others had the cores is not to blame, and only the kernel knows: for every thread it
counts the nanoseconds that it ran, and those that it was ready to run without a core (/proc/PID/task/TID/schedstat).
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
    """Of one stretch of time."""

    ran_s: float = 0.0
    """All threads together."""
    starved_s: float = 0.0
    """The longest that a thread of it was ready and had no core."""
    on_disk: bool = False
    """A thread waits for a disk, or for memory that is on one."""
    stopped: bool = False
    """By a signal: nothing but another signal lets it go on."""
    ended: bool = False
    """Whoever is its parent is about to hear of it."""


class CpuMeter:
    """Of one process."""

    def __init__(self, pid: int) -> None:
        self._tasks = Path(f"/proc/{pid}/task")
        self._before: dict[str, tuple[int, int]] = {}
        """Thread -> nanoseconds that it ran, and waited for a core, at the last reading."""

    def read(self, passed_s: float) -> CpuUse:
        """Since the last reading, `passed_s` seconds ago. The first one only begins: nothing ran, nobody waited."""
        states: set[str] = set()
        ran_s = starved_s = 0.0
        before, self._before = self._before, {}
        for task in self._tasks.glob("*"):
            try:
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue  # This thread has just ended.
            states.add(state)
            try:
                ran, waited = (int(field) for field in (task / "schedstat").read_text().split()[:2])
            except (OSError, ValueError):
                # Not counted on this system: of a thread that is ready, half of the time is taken for a wait.
                starved_s = max(starved_s, passed_s / 2 if state == "R" else 0.0)
                continue
            self._before[task.name] = ran, waited
            if task.name not in before:
                continue
            new_ran_s, new_waited_s = (ran - before[task.name][0]) / 1e9, (waited - before[task.name][1]) / 1e9
            ran_s += new_ran_s
            # A wait is counted when it is over: one that goes on shows by a thread that is ready and has not run.
            starved_s = max(starved_s, passed_s if state == "R" and not new_ran_s else new_waited_s)
        return CpuUse(
            ran_s=ran_s,
            starved_s=min(starved_s, passed_s),
            on_disk="D" in states,
            stopped=bool(states) and states <= set("Tt"),
            ended=states <= set("ZX"),
        )


class Patience:
    """How long a process is waited for. Time in which it had no core does not count, nor time in which nobody looked.

    Args:
        total_s: what it may take in all.
        idle_s: how long it may do nothing: neither run, nor wait for a core or a disk.
        look_s: how often it is looked at.
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
        """Looks; True when it is waited for no longer."""
        now = self._clock()
        passed_s, self._looked_at = now - self._looked_at, now
        use = self._meter.read(passed_s)
        counted_s = min(passed_s, 2 * self.look_s)
        self._spent_s += max(0.0, counted_s - use.starved_s)
        busy = use.ran_s or use.starved_s or use.on_disk
        self._nothing_s = 0.0 if busy else self._nothing_s + counted_s
        return self._spent_s > self._total_s or self._nothing_s > self._idle_s


async def answered(answer: Awaitable[T], patience: Patience) -> T:
    """What a process answers, which is waited for as long as it goes on. Raises TimeoutError when it does not."""
    task = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait([task], timeout=patience.look_s))[0]:
            if patience.over():
                raise TimeoutError
        return task.result()
    finally:
        task.cancel()
