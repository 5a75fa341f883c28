"""The coordinator's times, and how they depend on each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class CoordinatorTiming(Timing):
    """Seconds."""

    # Leases of workers.
    tick_s: float = 0.05
    """Between two looks at the clock."""
    renew_s: float = 0.15
    """Workers renew their lease this often."""
    lease_s: float = 0.6
    """A worker that does not renew for so long is lost, where neither its clock nor ours ran late."""
    stall_s: float = 0.3
    """A tick that comes so late means that this process was not run: it has heard no renewals meanwhile."""
    lateness_half_s: float = 5.0
    """After so long half of an observed lateness still counts."""
    lateness_most_s: float = 6.0
    """No lease is longer by more than this for the sake of late clocks."""
    reconnect_s: float = 1.6
    """After a restart: the longest that a worker takes to call again (its channel's back-off of 1 s and a fifth, and
    its own pause)."""

    # Attempts.
    retry_min_s: float = 0.2
    retry_max_s: float = 2.0
    """Pause before the next attempt; it doubles with each failure in a row."""
    sound_s: float = 10.0
    """A pipeline that served so long was sound: what breaks it is a new failure, not the last one again."""
    apart_s: float = 30.0
    """So long two workers whose link failed are not made neighbours, and a worker that a gateway does not reach is not
    chosen, where there are others."""
    refused_s: float = 60.0
    """So long a worker is not asked again for what it could not do: files or memory may be back by then."""
    settled_s: float = 1.5
    """So long a pipeline that was just formed is left alone by what can wait: what a lost stage had is computed again,
    which needs all cores of one machine."""

    # Moves beside serving.
    move_s: float = 60.0
    """How long workers may take to link, and then how long gateways may take to switch."""
    gone_s: float = 2.0
    """A gateway whose stream ended is waited for so long: it often starts over."""
    verdict_s: float = 3.0
    """How long gateways may take to say whether they switched, when a move fails late."""

    # Pipelines that come and go.
    missed_s: float = 30.0
    """So long a lost worker still counts as a replica of its stage: it may come back."""
    again_s: float = 60.0
    """After moves that failed a pipeline is left as it is for so long, or until the membership changes."""
    leave_s: float = 90.0
    """How long gateways may take to leave a pipeline."""

    # Measured steps.
    fresh_s: float = 8.0
    """An older report of step times says nothing of now."""
    look_s: float = 5.0
    """Between two looks at whether other ranges would be faster."""
    rest_s: float = 60.0
    """Layers do not move by themselves again before so long."""
    longer_rest_s: float = 600.0
    """The same where the last move brought less than half of what is worth one, or failed."""

    # Calls.
    assign_silence_s: float = 60.0
    """Between two messages of an Assign: a worker reports progress several times a second while it loads."""
    offer_s: float = 5.0
    connect_s: float = 8.0
    activate_s: float = 5.0
    release_s: float = 2.0
    close_s: float = 0.5
    """At shutdown: calls that were cancelled get this long to end."""
    progress_s: float = 0.2
    """Changes that are not urgent are told to gateways at most this often."""
    slot_quarantine_s: float = 60.0
    """So long the slot of a gateway that is gone is given to nobody else."""
    stop_grace_s: float = 0.1
    """How long open calls may take to end when the coordinator stops."""
    leader_look_s: float = 0.1
    """Between two tries to open a state that another coordinator has."""
    api_call_s: float = 2.0
    """One call of Kubernetes' API server."""

    def relations(self) -> Iterator[tuple[bool, str]]:
        """What must hold between them."""
        yield self.tick_s < self.renew_s, "tick_s < renew_s"
        yield 3 * self.renew_s <= self.lease_s, "3 renew_s <= lease_s: one lost message costs no lease"
        yield self.tick_s < self.stall_s < self.lease_s, "tick_s < stall_s < lease_s"
        yield self.retry_min_s <= self.retry_max_s, "retry_min_s <= retry_max_s"
        yield self.verdict_s < self.move_s, "verdict_s < move_s"
        yield self.gone_s < self.move_s, "gone_s < move_s"
        yield self.rest_s <= self.longer_rest_s, "rest_s <= longer_rest_s"
        yield self.look_s < self.rest_s, "look_s < rest_s"
