"""How late this process runs, told with each renewal of its lease: a lease should not end because the host is busy."""

from __future__ import annotations

import time
from collections.abc import Callable

from .watchdog import Meter


class Lateness:
    """Of this process, of late: the longest that it was not run when it should have been, halved each `half_life_s`."""

    def __init__(self, half_life_s: float, meter: Meter, clock: Callable[[], float] = time.monotonic) -> None:
        """`meter`: of this process."""
        self._half_life_s, self._meter, self._clock = half_life_s, meter, clock
        self._noted_at = clock()
        self._late_s = 0.0

    def note(self, planned_s: float) -> float:
        """To be called again and again, `planned_s` after the last time; seconds."""
        now = self._clock()
        passed_s, self._noted_at = now - self._noted_at, now
        # By its own clock, or by the kernel's: the thread that waited may be another one that carries the renewal.
        late_s = max(passed_s - planned_s, self._meter.read(passed_s).starved_s)
        self._late_s = max(late_s, self._late_s * 0.5 ** (passed_s / self._half_life_s))
        return self._late_s
