"""All times of `serve`. It makes one object at its start, scaled by `--time-scale`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class ServeTiming(Timing):
    """Times in seconds."""

    listen_s: float = 60.0
    """Time until a service must listen. Time in which it had no core does not count."""
    restart_s: float = 0.2
    """Pause before the restart of a service that died soon after its start for the second time in a row. It grows up to
    `restart_most_s`. The first restart has no pause."""
    restart_most_s: float = 5.0
    stable_s: float = 5.0
    """A service that ran for this long before it died is restarted at once."""
    watch_s: float = 0.1
    """Interval of checks of children and of the mesh."""
    end_look_s: float = 0.02
    """Interval of checks of a child that was told to end."""
    end_s: float = 1.5
    """Time until workers and the coordinator must have ended."""
    http_s: float = 2.0
    """Deadline of a request to the gateway."""

    def relations(self) -> Iterator[tuple[bool, str]]:
        """Yields the relations between these times; see `Timing`."""
        yield self.restart_s < self.restart_most_s, "restart_s < restart_most_s"
        yield self.end_look_s < self.end_s, "end_look_s < end_s"
