"""All times of `serve`. It makes one object at its start, scaled by `--time-scale`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class ServeTiming(Timing):
    """Seconds."""

    listen_s: float = 60.0
    """Until a service listens. Time in which it had no core does not count."""
    restart_s: float = 0.2
    """Pause before a service is restarted that died soon after its start for the second time. It grows each time, up to
    the next. After the first time there is no pause."""
    restart_most_s: float = 5.0
    stable_s: float = 5.0
    """A service that ran for so long before it died is restarted at once."""
    watch_s: float = 0.1
    """Interval of looks at children and at the mesh."""
    end_look_s: float = 0.02
    """Interval of looks at a child that was told to end."""
    end_s: float = 1.5
    """Until workers and the coordinator have ended."""
    http_s: float = 2.0
    """Deadline of a question to the gateway."""

    def relations(self) -> Iterator[tuple[bool, str]]:
        """See `Timing`."""
        yield self.restart_s < self.restart_most_s, "restart_s < restart_most_s"
        yield self.end_look_s < self.end_s, "end_look_s < end_s"
