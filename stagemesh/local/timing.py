"""Times of `serve`: made once where it starts, from `--time-scale`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class ServeTiming(Timing):
    """Of the supervisor and its children."""

    listen_s: float = 60.0
    """What a service may take until it listens; time in which it had no core does not count."""
    restart_s: float = 0.2
    """Before a service that died soon after its start, and for the second time, is started again; more each time, up to
    the next. The first time it is started at once."""
    restart_most_s: float = 5.0
    stable_s: float = 5.0
    """A service that was up for so long before it died is started again at once."""
    watch_s: float = 0.1
    """How often children and the mesh are looked at."""
    end_look_s: float = 0.02
    """How often a child that was told to end is looked at."""
    end_s: float = 1.5
    """What workers and the coordinator may take to end."""
    http_s: float = 2.0
    """What the gateway may take to say how the mesh is."""

    def relations(self) -> Iterator[tuple[bool, str]]:
        """See `Timing`."""
        yield self.restart_s < self.restart_most_s, "restart_s < restart_most_s"
        yield self.end_look_s < self.end_s, "end_look_s < end_s"
