"""How late this process runs. Each renewal of the lease reports it, so that a busy host does not end the lease."""

from __future__ import annotations

import time
from collections.abc import Callable

from .watchdog import Meter


class Lateness:
    """The longest recent delay of this process. It halves every `half_life_s`."""

    def __init__(self, half_life_s: float, meter: Meter, clock: Callable[[], float] = time.monotonic) -> None:
        """`meter` measures this process."""
        self._half_life_s, self._meter, self._clock = half_life_s, meter, clock
        self._noted_at = clock()
        self._late_s = 0.0

    def note(self, planned_s: float) -> float:
        """Returns the lateness in seconds. The caller plans each call for `planned_s` after the last one."""
        now = self._clock()
        passed_s, self._noted_at = now - self._noted_at, now
        # This thread may have been on time while the thread that sends the renewal waited for a core.
        late_s = max(passed_s - planned_s, self._meter.read(passed_s).starved_s)
        self._late_s = max(late_s, self._late_s * 0.5 ** (passed_s / self._half_life_s))
        return self._late_s
