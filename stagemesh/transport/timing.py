"""Times of transports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class TransportTiming(Timing):
    """Times of all kinds of transport. Each kind uses some of them."""

    connect_s: float = 5.0
    """TCP: time within which a connection must be established, unless the caller of `connect` gives another one."""
    preamble_s: float = 5.0
    """TCP: time within which an accepted connection must have sent its preamble."""
    self_probe_s: float = 0.5
    """UCX: longest time of the self-probe's message (ucx/self_probe.py). A sender that loses its core during a copy
    delays it, too."""
    self_probe_look_s: float = 0.05
    """UCX: longest part of the time between two calls of `progress` that counts as waiting for that message. In a
    longer gap, this process computed or did not run."""
    unready_sleep_s: float = 0.001
    """UCX: time that `arm` sleeps while a descriptor stays readable although nothing is pending."""

    def relations(self) -> Iterator[tuple[bool, str]]:
        yield self.unready_sleep_s < self.self_probe_look_s, "unready_sleep_s < self_probe_look_s"
        yield 2 * self.self_probe_look_s <= self.self_probe_s, "2 self_probe_look_s <= self_probe_s"
