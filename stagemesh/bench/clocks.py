"""How far a stage's clock is from the gateway's, from messages that cross between them. Pure.

Each step gives two bounds: its plan did not arrive before it was sent, and its result was not received before it was
sent (Cristian 1989; NTP takes the same four times). The offset lies between the tightest of them. Processes of one host
share a clock, and then zero lies within: monotonic clocks count from a host's boot, so two hosts whose clocks agree
that closely would have booted within the same millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Exchange:
    """One step's plan and result: microseconds, the outer two on the gateway's clock, the inner two on the stage's."""

    plan_sent_us: int
    plan_arrived_us: int
    result_sent_us: int
    result_received_us: int

    @property
    def round_trip_us(self) -> int:
        """Time on the way, there and back."""
        return (self.result_received_us - self.plan_sent_us) - (self.result_sent_us - self.plan_arrived_us)


@dataclass(frozen=True)
class ClockOffset:
    """A stage's clock minus the gateway's, in microseconds."""

    offset_us: float
    uncertainty_us: float
    """The true offset is at most so far from `offset_us`."""
    shared: bool
    """Zero is possible, and taken: the two share a clock."""


def estimate(exchanges: Sequence[Exchange]) -> ClockOffset:
    """The offset that fits all exchanges; at least one is needed."""
    low = max(e.result_sent_us - e.result_received_us for e in exchanges)
    high = min(e.plan_arrived_us - e.plan_sent_us for e in exchanges)
    if low > high:
        # The clocks drifted while the trace was taken: the quickest exchange knows best.
        best = min(exchanges, key=lambda e: e.round_trip_us)
        low, high = best.result_sent_us - best.result_received_us, best.plan_arrived_us - best.plan_sent_us
    uncertainty_us = abs(high - low) / 2
    if low <= 0 <= high:
        return ClockOffset(0.0, uncertainty_us, shared=True)
    return ClockOffset((low + high) / 2, uncertainty_us, shared=False)
