"""Estimates the offset between a stage's clock and the gateway's, from the messages of each step. Pure.

Each step gives two bounds: its plan did not arrive before it was sent, and its result was not received before it was
sent (Cristian 1989; NTP uses the same four times). The offset is between the tightest bounds. If zero is between them,
the two are assumed to share a clock, as processes of one host do. Monotonic clocks count from a host's boot, so for two
hosts this could only happen if they had booted within the same millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Exchange:
    """Times of plan and result of one step, in microseconds: the first and the last on the gateway's clock, the others
    on the stage's."""

    plan_sent_us: float
    plan_arrived_us: float
    result_sent_us: float
    result_received_us: float

    @property
    def round_trip_us(self) -> float:
        """Time that both messages spent on the network."""
        return (self.result_received_us - self.plan_sent_us) - (self.result_sent_us - self.plan_arrived_us)


@dataclass(frozen=True)
class ClockOffset:
    """A stage's clock minus the gateway's, in microseconds."""

    offset_us: float
    uncertainty_us: float
    """Bound of the error of `offset_us`."""
    shared: bool
    """Whether the two share a clock, so that the offset is zero."""


def estimate(exchanges: Sequence[Exchange]) -> ClockOffset:
    """Returns the offset that fits all exchanges. At least one is needed."""
    low = max(e.result_sent_us - e.result_received_us for e in exchanges)
    high = min(e.plan_arrived_us - e.plan_sent_us for e in exchanges)
    if low > high:
        # The clocks drifted during the trace: the quickest exchange has the tightest bounds.
        best = min(exchanges, key=lambda e: e.round_trip_us)
        low, high = best.result_sent_us - best.result_received_us, best.plan_arrived_us - best.plan_sent_us
    uncertainty_us = abs(high - low) / 2
    if low <= 0 <= high:
        return ClockOffset(0.0, uncertainty_us, shared=True)
    return ClockOffset((low + high) / 2, uncertainty_us, shared=False)
