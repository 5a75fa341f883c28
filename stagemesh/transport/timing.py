"""Times that transports keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class TransportTiming(Timing):
    """One for all kinds: each takes what it needs."""

    connect_s: float = 5.0
    """TCP: until a connection must be made, where the caller of `connect` says nothing else."""
    preamble_s: float = 5.0
    """TCP: until a connection must have said who it is."""
    self_probe_s: float = 0.5
    """UCX: what a message to oneself through shared memory may take (ucx/self_probe.py). A sender that lives and was
    descheduled while it copied holds it up, too."""
    self_probe_look_s: float = 0.05
    """UCX: of the time between two calls of `progress`, no more than this counts as waiting for that message: nobody
    ran, or this process computed meanwhile."""
    unready_sleep_s: float = 0.001
    """UCX: how long `arm` sleeps where a descriptor stays readable though nothing is there."""

    def relations(self) -> Iterator[tuple[bool, str]]:
        yield self.unready_sleep_s < self.self_probe_look_s, "unready_sleep_s < self_probe_look_s"
        yield 2 * self.self_probe_look_s <= self.self_probe_s, "2 self_probe_look_s <= self_probe_s"
