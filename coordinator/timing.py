"""The coordinator's time-outs and intervals, and the relations between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class CoordinatorTiming(Timing):
    """All times are in seconds."""

    # Leases of workers.
    tick_s: float = 0.05
    """Interval between ticks."""
    renew_s: float = 0.15
    """Interval at which workers renew their lease."""
    lease_s: float = 0.6
    """A worker that does not renew for this long is lost, if neither its process nor this one runs late."""
    stall_s: float = 0.3
    """A longer gap between ticks means that this process was stopped, and heard no renewals meanwhile."""
    lateness_half_s: float = 5.0
    """Half-life of an observed lateness."""
    lateness_most_s: float = 6.0
    """Lateness extends a lease by at most this much."""
    reconnect_s: float = 1.6
    """The longest that a worker takes to call again after this process restarts: its channel's back-off of 1.2 s, and
    its own pause."""

    # Attempts.
    retry_min_s: float = 0.2
    retry_max_s: float = 2.0
    """Pause before the next attempt; it doubles with each failure in a row."""
    sound_s: float = 10.0
    """When a pipeline breaks after serving this long, its count of failures in a row starts again."""
    apart_s: float = 30.0
    """How long to avoid two workers as neighbours whose link failed, and a worker that a gateway does not reach. They
    are still chosen if there are no others."""
    refused_s: float = 60.0
    """How long a worker is not asked again for what it could not do: files or memory may be back by then."""
    settled_s: float = 1.5
    """How long work that can wait stays off a pipeline that was just formed. Meanwhile the lost stage's pages are
    computed again, which needs all cores of one machine."""

    # Moves while a pipeline serves.
    move_s: float = 60.0
    """How long workers may take to link, and then how long gateways may take to switch."""
    gone_s: float = 2.0
    """How long to wait for a gateway whose stream ended: it often connects again."""
    verdict_s: float = 3.0
    """How long gateways may take to say whether they switched, when a move fails late."""

    # Pipelines that come and go.
    missed_s: float = 30.0
    """How long a lost worker still counts as a replica of its stage: it may come back."""
    again_s: float = 60.0
    """How long a pipeline stays as it is after its moves failed, unless the membership changes."""
    leave_s: float = 90.0
    """How long gateways may take to leave a pipeline."""

    # Measured steps.
    fresh_s: float = 8.0
    """Older reports of step times are ignored."""
    look_s: float = 5.0
    """Interval between checks whether other ranges would be faster."""
    rest_s: float = 60.0
    """Shortest time between two automatic moves of layers."""
    longer_rest_s: float = 600.0
    """Used instead of `rest_s` if the last move failed, or gained less than half of `GAIN`."""

    # Calls.
    assign_silence_s: float = 60.0
    """Longest silence in an Assign: a worker reports progress several times a second while it loads."""
    offer_s: float = 5.0
    connect_s: float = 8.0
    activate_s: float = 5.0
    release_s: float = 2.0
    close_s: float = 0.5
    """How long cancelled calls may take to end at shutdown."""
    progress_s: float = 0.2
    """Shortest interval between messages to gateways when no change is urgent."""
    slot_quarantine_s: float = 60.0
    """How long the slot of a gateway that is gone is not given to another one."""
    stop_grace_s: float = 0.1
    """How long open calls may take to end when the coordinator stops."""
    leader_look_s: float = 0.1
    """Interval between attempts to open a state folder that another coordinator has open."""
    api_call_s: float = 2.0
    """Time-out of one call to Kubernetes' API server."""

    def relations(self) -> Iterator[tuple[bool, str]]:
        """The relations that must hold."""
        yield self.tick_s < self.renew_s, "tick_s < renew_s"
        yield 3 * self.renew_s <= self.lease_s, "3 renew_s <= lease_s: one lost message costs no lease"
        yield self.tick_s < self.stall_s < self.lease_s, "tick_s < stall_s < lease_s"
        yield self.retry_min_s <= self.retry_max_s, "retry_min_s <= retry_max_s"
        yield self.verdict_s < self.move_s, "verdict_s < move_s"
        yield self.gone_s < self.move_s, "gone_s < move_s"
        yield self.rest_s <= self.longer_rest_s, "rest_s <= longer_rest_s"
        yield self.look_s < self.rest_s, "look_s < rest_s"
